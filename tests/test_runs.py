"""What training leaves on the disk: whole, resumable, movable; and who may have seen what."""

import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL_CROP, SMALL_MODEL, call, change, read
from test_train import fit
from torch.utils._pytree import tree_flatten

import models
from plumbing.data import read_data
from plumbing.files import read_json
from plumbing.guards import check_unseen
from util import InputError, Stopped

TABLES = ("oof.csv", "test_predictions.csv", "submission.csv")
SHARED = {"config.json", "log.csv", *TABLES, "metrics.json", "curves.png"}
OWN = ("best.pt", "inputs.png", "last.pt", "log.csv", "oof.csv", "test.csv", "metrics.json")


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_same_tables(one, two):
    for name in TABLES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


# ---------------------------------------------------------------- contents
def test_a_run_leaves_what_the_contract_says(runs_dir, data_dir):
    data, networks = read_data(data_dir), ("fold0_network.pt", "fold1_network.pt", "saliency.pt")
    keys = ["image_name", "fold", "target"]
    for name in ("resnet", "chipnet", "cropnet"):
        run, finder = runs_dir / name, {f"finder/{file}" for file in ("crop.json", *networks) if name == "cropnet"}
        assert names(run) == SHARED | {f"fold{k}_{kind}" for k in (0, 1) for kind in OWN} | finder
        oof, test, submission = (read(run / table) for table in TABLES)
        pd.testing.assert_frame_equal(oof[keys], data.train[keys])
        assert test["fold"].tolist() == [0] * 4 + [1] * 4
        assert submission["image_name"].tolist() == data.submission["image_name"].tolist()
        assert np.allclose(submission["target"], test.groupby("image_name")["prob"].mean()[submission["image_name"]])
        log, metrics = pd.read_csv(run / "log.csv"), read_json(run / "metrics.json")
        assert (metrics["pooled"]["rows"], [fold["fold"] for fold in metrics["folds"]]) == (24, [0, 1])
        assert log[["fold", "epoch"]].to_numpy().tolist() == [[0, 1], [1, 1]]
        trained_on = models.load_checkpoint(run / "fold1_best.pt")[1]["trained_on"]
        assert trained_on == {"folds_sha256": data.folds_sha256, "fold": 1}


def test_folds_gather_in_one_run_whatever_the_order(data_dir, runs_dir, tmp_path, monkeypatch):
    for k in (1, 0):
        monkeypatch.setattr(sys, "argv", ["train.py", "--fold", str(k)])
        run = fit(data_dir, tmp_path, "--fold", k)
    assert_same_tables(run, runs_dir / "resnet")
    for fold in read_json(run / "metrics.json")["folds"]:  # every call is on record, not the last alone
        assert fold["argv"] == ["train.py", "--fold", str(fold["fold"])]
        assert torch.__version__.startswith(fold["versions"]["torch"])
    before = names(run)
    for words, message in (([], "finished"), (["--seed", 1, "--resume"], "seed")):
        with pytest.raises(InputError, match=message):
            fit(data_dir, tmp_path, "--fold", 0, *words)
    assert names(run) == before
    (run / "fold1_gates.npy").touch()
    fit(data_dir, tmp_path, "--fold", 0, "--seed", 1, "--overwrite")
    assert names(run) == SHARED | {f"fold0_{kind}" for kind in OWN}  # nothing is left of the old run
    assert pd.read_csv(run / "oof.csv")["fold"].unique().tolist() == [0]


@pytest.mark.parametrize("lost", [("metrics.json", "curves.png"), (), ("fold1_metrics.json", "fold1_test.csv")])
def test_a_call_killed_between_a_fold_and_the_shared_files_is_made_good(data_dir, runs_dir, tmp_path, lost):
    whole, run = runs_dir / "resnet", shutil.copytree(runs_dir / "resnet", tmp_path / "resnet")
    for name in lost:
        (run / name).unlink()
    (run / "metrics.json.17.tmp").touch()
    shutil.copy(run / "fold0_oof.csv", run / "oof.csv")  # of one fold alone
    fit(data_dir, tmp_path, "--resume")
    assert names(run) == names(whole)
    assert_same_tables(run, whole)


def test_a_call_killed_while_it_opened_its_run_is_made_good(data_dir, runs_dir, tmp_path):
    with pytest.raises(KeyboardInterrupt), mock.patch.object(shutil, "copyfile", side_effect=KeyboardInterrupt):
        fit(data_dir, tmp_path, "--limit", 2, model="cropnet")
    for name in ("metrics.json", "finder/fold0_network.pt"):
        (tmp_path / "cropnet" / f"{name}.17.tmp").touch()
    run = fit(data_dir, tmp_path, "--limit", 2, model="cropnet")
    assert names(run) == names(runs_dir / "cropnet")
    assert not list(run.rglob("*.tmp"))


# ---------------------------------------------------------------- resuming
def assert_same_training(one, two):
    """Same predictions, gates, log but for times, weights, optimizers and averages."""
    assert_same_tables(one, two)
    for name in ["fold0_best.pt", *(name for name in names(one) if "gates" in name or "prune" in name)]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    logs = [pd.read_csv(run / "log.csv").drop(columns=["seconds", "images_per_second"]) for run in (one, two)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    last = [torch.load(run / "fold0_last.pt", weights_only=True)["state"] for run in (one, two)]
    for a, b in zip(*(tree_flatten(state)[0] for state in last), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


RESUMED = {
    "resnet": ["--mixup", "0.4", "--label_smoothing", "0.1", "--accumulate", "2", "--workers", "1"],
    "chipnet": ["--ema", "0.7", "--pos_weight", "2", "--loss", "bce", "--amp", "fp16"],
    "cropnet": ["--sampler", "shuffle", "--schedule", "cosine"],
    "fusion": ["--clip_grad", "0.1", "--fsg", "--gate_init", "hard"],
    "fsg_vit": ["--backbone", "vit_tiny", "--routing", "sequential", "--layer_decay", "0.8", "--ema", "0.9"],
}


@pytest.mark.parametrize("model", RESUMED)
def test_a_run_resumed_after_every_epoch_equals_an_uninterrupted_one(data_dir, runs_dir, tmp_path, model):
    more = ["--fold", 0, "--epochs", 3, "--patience", 3, "--dropout", 0.5, "--batch_size", 5, *RESUMED[model]]
    straight, runs = fit(data_dir, tmp_path / "a", *more, model=model), tmp_path / "b"
    for epoch in (1, 2, 3):
        with pytest.raises(Stopped, match=f"fold 0 epoch {epoch}.*--resume"):
            fit(data_dir, runs, *more, "--max_hours", 0, *["--resume"] * (epoch > 1), model=model)
        with pytest.raises(InputError, match="interrupted"):
            fit(data_dir, runs, *more, model=model)
    assert_same_training(straight, fit(data_dir, runs, *more, "--resume", model=model))


# train.py, to which a signal comes after so many calls of one of its functions
SIGNALLED = """
import os, signal, sys, dataset, train
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start without it
number, whom, name, left = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
function, sys.argv[1:5] = getattr(train, name), []

def call(*args):
    global left
    result, left = function(*args), left - 1
    if left == 0:
        os.kill(0 if whom == "group" else os.getpid(), number)
    return result

setattr(train, name, call)
dataset.hair_bank(64)  # drawn once, not in each loader process
train.util.run_script(train.main, train.get_args_parser())
"""


def test_a_signal_or_a_kill_costs_the_epoch_alone(data_dir, tmp_path):
    words = ["--fold", 0, "--epochs", 5, "--patience", 5, "--ema", "0.9", "--workers", 1, "--batch_size", 4]
    straight, runs = fit(data_dir, tmp_path / "a", *words, model="chipnet"), tmp_path / "b"
    command = ["--model", "chipnet", "--data_dir", data_dir, "--runs_dir", runs, *SMALL_MODEL, *words]
    for when, status, more in (
        ([int(signal.SIGINT), "group", "mix_and_smooth", 5], 130, []),  # Ctrl-C, in the second epoch
        ([int(signal.SIGTERM), "alone", "write_table", 2], 130, ["--resume"]),  # the log is ahead of the checkpoint
        ([int(signal.SIGKILL), "group", "write_table", 2], -9, ["--resume"]),
    ):
        line = [str(word) for word in (sys.executable, "-c", SIGNALLED, *when, *command, *more)]
        done = subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, timeout=120)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        assert "with --resume" in done.stderr or status < 0
    assert len(pd.read_csv(runs / "chipnet" / "fold0_log.csv")) == 4
    assert_same_training(straight, fit(data_dir, runs, *words, "--resume", model="chipnet"))


def test_ctrl_c_while_a_checkpoint_is_written_is_no_full_disk(tmp_path, monkeypatch):
    class File(io.FileIO):
        def write(self, content):
            if self.tell() > 100:
                raise KeyboardInterrupt
            return super().write(content)

    monkeypatch.setattr(models, "open", File, raising=False)
    with pytest.raises(KeyboardInterrupt):
        models.save_plain(tmp_path / "last.pt", state=torch.zeros(3000))
    assert not names(tmp_path)


# ---------------------------------------------------------------- who has seen what
def test_the_one_rule():
    for trained_on in (None, {"folds_sha256": "x", "fold": 1}):
        check_unseen("it", trained_on, "x", 1)
    for fold, folds in ((0, "x"), (1, "y"), (None, "x")):
        with pytest.raises(InputError, match="it comes from.*fold 1"):
            check_unseen("it", {"folds_sha256": folds, "fold": fold}, "x", 1)


def test_starting_weights_that_saw_the_held_out_images_are_refused(data_dir, runs_dir, tmp_path):
    own, foreign = tmp_path / "pre.pt", shutil.copytree(runs_dir / "resnet", tmp_path / "foreign")
    shutil.copy(runs_dir / "resnet" / "fold0_best.pt", own)  # whatever its name
    for k in (0, 1):
        change(foreign / f"fold{k}_best.pt", lambda content: content["trained_on"].update(folds_sha256="x"))
    for weights, more, named in ((own, [], "fold 1"), (own, ["--fold", 1], "fold 1"), (foreign, [], "fold 0")):
        with pytest.raises(InputError, match=f"{weights.name}.*{named}"):
            fit(data_dir, tmp_path / "runs", "--weights", weights, *more)
    words = ["--data_dir", data_dir, "--output_dir", tmp_path / "crops"]
    with pytest.raises(InputError, match="pre.pt.*fold 1"):
        call("crop", "--source", "saliency", *words, *SMALL_CROP, "--weights", own)
    assert not (tmp_path / "runs").exists()
    fit(data_dir, tmp_path / "runs", "--weights", own, "--fold", 0, "--limit", 2)
    state = torch.load(own, weights_only=True)["state_dict"].items()
    torch.save({key[9:]: value for key, value in state if key.startswith("backbone.")}, own)  # says not whose
    fit(data_dir, tmp_path / "plain", "--weights", own, "--fold", 1, "--limit", 2)


def test_crops_and_guides_by_networks_that_saw_the_held_out_images_are_refused(data_dir, runs_dir, tmp_path):
    crops, runs = shutil.copytree(data_dir / "crops" / "chipnet", tmp_path / "crops"), tmp_path / "runs"
    with pytest.raises(InputError, match="crops.*fold 0"):  # maps of the other rows are by networks that saw fold 0
        fit(data_dir, runs, "--guide", crops, "--fold", 0, model="chipnet")
    change(crops / "crop.json", lambda facts: facts.update(folds=[0]))  # as of a ChipNet of fold 0 alone
    for model, more in (("cropnet", []), ("resnet", ["--fold", 1])):
        with pytest.raises(InputError, match="crops.*fold 1"):
            fit(data_dir, runs, "--crop_dir", crops, *more, model=model)
    assert not runs.exists()
    fit(data_dir, runs, "--crop_dir", crops, "--fold", 0, "--limit", 2, model="cropnet")
    words = ["--source", "saliency", "--data_dir", data_dir, "--output_dir", tmp_path, "--views", 1]
    guide, loss = ["--guide", call("crop", *words, *SMALL_CROP)], []
    for weight in (0, 3):
        run = fit(data_dir, runs, *guide, "--guide_weight", weight, "--name", weight, "--limit", 2, model="chipnet")
        loss.append(pd.read_csv(run / "log.csv")["train_loss"].mean())
    assert loss[1] > loss[0] + 0.1


# ---------------------------------------------------------------- moving
def predict(run, source, output):
    images = [source / "images" / f"{name}.jpg" for name in ("0024", "0025")]
    call("predict", *images, "--run", run, "--output", output, "--device", "cpu", "--no-pictures")
    return (output / "predictions.csv").read_bytes()


def test_runs_of_relative_paths_predict_from_anywhere_without_data(data_dir, runs_dir, source, tmp_path, monkeypatch):
    tour, kept = tmp_path / "tour", tmp_path / "far" / "kept"
    shutil.copytree(data_dir, tour / "data", ignore=shutil.ignore_patterns("crops"))
    shutil.copytree(runs_dir / "chipnet", tour / "runs" / "chipnet")
    monkeypatch.chdir(tour)
    call("crop", "--data_dir", "data", *SMALL_CROP, "--views", 1)
    fit("data", "runs", model="cropnet")
    call("ensemble", "mean", "--runs_dir", "runs")
    before = [predict(Path("runs", name), source, tmp_path / f"{name}1") for name in ("cropnet", "ensemble")]
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(tour / "runs", kept)
    monkeypatch.chdir(tmp_path / "far" / "away")
    call("report", kept / "ensemble", "--device", "cpu")  # which reads the data
    shutil.rmtree(tour)
    for run in ("cropnet", "ensemble"):
        assert predict(kept / run, source, tmp_path / f"{run}2") == before[run == "ensemble"]
        assert predict(Path("..", "kept", run), source, tmp_path / f"{run}3") == before[run == "ensemble"]


def test_a_run_goes_on_however_its_data_is_named(data_dir, runs_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path / "renamed")
    shutil.copytree(runs_dir / "cropnet", tmp_path / "runs" / "cropnet", ignore=shutil.ignore_patterns("fold1_*"))
    monkeypatch.chdir(tmp_path)
    assert_same_tables(fit("renamed", "runs", "--fold", 1, model="cropnet"), runs_dir / "cropnet")
    change(Path("renamed/crops/chipnet/crop.json"), lambda facts: facts["sha256"].update({"train_64.npy": "other"}))
    with pytest.raises(InputError, match="crop train"):
        fit("renamed", "runs", "--fold", 1, "--resume", model="cropnet")


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("cropnet/fold0_best.pt", "resnet/fold0_best.pt"),
        ("cropnet/finder/saliency.pt", "resnet/fold0_best.pt"),
        ("resnet/metrics.json", "chipnet/metrics.json"),
    ],
)
def test_exchanged_files_of_members_are_noticed(runs, source, tmp_path, path, other):
    shutil.copy(runs / other, runs / path)
    with pytest.raises(InputError, match=path):
        predict(runs / "mean", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
