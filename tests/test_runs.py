"""What training leaves on the disk: whole, resumable, movable; and who may have seen what."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, call, shell
from test_train import fit
from torch.utils._pytree import tree_flatten

import models
from plumbing.data import read_data
from plumbing.files import read_json, write_json
from plumbing.guards import check_unseen
from plumbing.runs import collect, read_run
from util import InputError, Stopped

SHARED = {"config.json", "log.csv", "oof.csv", "test_predictions.csv", "submission.csv", "metrics.json", "curves.png",
          "roc.png"}  # fmt: skip
OWN = ("best.pt", "last.pt", "log.csv", "oof.csv", "test.csv", "metrics.json")
TABLES = ("oof.csv", "test_predictions.csv", "submission.csv")


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def change(path, edit):
    """Edit a JSON file in place."""
    content = read_json(path)
    edit(content)
    write_json(path, content)


def change_checkpoint(path, edit):
    """Edit a checkpoint in place."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


# ---------------------------------------------------------------- contents
def test_a_run_leaves_what_the_contract_says(runs_dir, data_dir):
    data = read_data(data_dir)
    for name in ("resnet", "chipnet", "cropnet"):
        run = runs_dir / name
        finder = {"crop.json", "saliency.pt", "fold0_network.pt", "fold1_network.pt"} if name == "cropnet" else set()
        own = {f"fold{k}_{kind}" for k in (0, 1) for kind in OWN}
        assert names(run) == SHARED | own | {f"finder/{file}" for file in finder}
        oof = pd.read_csv(run / "oof.csv", dtype=str)
        assert list(oof) == ["image_name", "fold", "target", "prob"]
        assert oof["image_name"].tolist() == data.train["image_name"].tolist()
        assert oof["fold"].tolist() == data.train["fold"].astype(str).tolist()
        assert oof["target"].tolist() == data.train["target"].astype(str).tolist()
        test = pd.read_csv(run / "test_predictions.csv", dtype={"image_name": str})
        assert test["fold"].tolist() == [0] * 4 + [1] * 4
        submission = pd.read_csv(run / "submission.csv", dtype={"image_name": str})
        assert submission["image_name"].tolist() == data.submission["image_name"].tolist()
        mean = test.groupby("image_name")["prob"].mean()
        assert np.allclose(submission["target"], mean[submission["image_name"]])
        metrics = read_json(run / "metrics.json")
        assert metrics["pooled"]["rows"] == 24
        assert [fold["fold"] for fold in metrics["folds"]] == [0, 1]
        log = pd.read_csv(run / "log.csv")
        assert log[["fold", "epoch"]].to_numpy().tolist() == [[0, 1], [1, 1]]
        assert {"train_loss", "valid_loss", "valid_auc", "lr", "seconds", "images_per_second"} < set(log)
        assert models.load_checkpoint(run / "fold1_best.pt")[1]["trained_on"] == {
            "folds_sha256": data.folds_sha256, "fold": 1,
        }  # fmt: skip


def test_folds_gather_in_one_run_whatever_the_order(data_dir, runs_dir, tmp_path, monkeypatch):
    for k in (1, 0):
        monkeypatch.setattr(sys, "argv", ["train.py", "--fold", str(k)])
        run = fit(data_dir, tmp_path, "--fold", k)
    for name in TABLES:
        assert (run / name).read_bytes() == (runs_dir / "resnet" / name).read_bytes()
    for fold in read_json(run / "metrics.json")["folds"]:  # every call is on record, not the last alone
        assert fold["argv"] == ["train.py", "--fold", str(fold["fold"])]
        assert torch.__version__.startswith(fold["versions"]["torch"])
    before = names(run)
    for words, message in ((["--fold", 0], "finished"), (["--fold", 0, "--seed", 1, "--resume"], "seed")):
        with pytest.raises(InputError, match=message):
            fit(data_dir, tmp_path, *words)
    assert names(run) == before
    (run / "fold1_gates.png").touch()
    fit(data_dir, tmp_path, "--fold", 0, "--seed", 1, "--overwrite")
    assert names(run) == SHARED | {f"fold0_{kind}" for kind in OWN}
    assert pd.read_csv(run / "oof.csv")["fold"].unique().tolist() == [0]


def test_a_call_killed_between_a_fold_and_the_shared_files_is_made_good(data_dir, runs_dir, tmp_path):
    whole = runs_dir / "resnet"
    for number, lost in enumerate((["metrics.json", "oof.csv"], [], ["fold1_metrics.json", "fold1_test.csv"])):
        runs = tmp_path / str(number)
        run = shutil.copytree(whole, runs / "resnet")
        for name in lost:
            (run / name).unlink()
        (run / f"oof.csv.{os.getpid()}.tmp").touch()
        shutil.copy(run / "fold0_oof.csv", run / "oof.csv")  # of one fold alone
        fit(data_dir, runs, "--resume")
        assert names(run) == names(whole)
        for name in TABLES:
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
        scored = [read_json(folder / "metrics.json") for folder in (run, whole)]
        assert scored[0]["pooled"] == scored[1]["pooled"]


def test_a_call_killed_while_it_opened_its_run_is_made_good(data_dir, runs_dir, tmp_path):
    run = tmp_path / "cropnet"
    shutil.copytree(runs_dir / "cropnet" / "finder", run / "finder")
    (run / "finder" / "saliency.pt").unlink()
    shutil.copy(runs_dir / "cropnet" / "config.json", run)
    (run / "metrics.json.17.tmp").touch()
    fit(data_dir, tmp_path, "--fold", 0, "--limit", 2, "--overwrite", model="cropnet")
    assert (run / "finder" / "saliency.pt").exists()
    (tmp_path / "resnet").mkdir()
    (tmp_path / "resnet" / "config.json.17.tmp").touch()
    fit(data_dir, tmp_path, "--fold", 0, "--limit", 2)
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="mine"):
        fit(data_dir, tmp_path, "--name", "mine", "--overwrite")
    assert names(tmp_path / "mine") == {"thesis.txt"}


# ---------------------------------------------------------------- resuming
def assert_same_training(one, two):
    """Same predictions, log but for times, weights, optimizers and averages."""
    for name in (*TABLES, *(name for name in names(one) if "gates" in name or "prune" in name)):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    logs = [pd.read_csv(run / "log.csv").drop(columns=["seconds", "images_per_second"]) for run in (one, two)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    for name, part in (("fold0_best.pt", "state_dict"), ("fold0_last.pt", "state")):
        flat = [tree_flatten(torch.load(run / name, weights_only=True)[part]) for run in (one, two)]
        assert flat[0][1] == flat[1][1]
        for a, b in zip(flat[0][0], flat[1][0], strict=True):
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
    more = ["--fold", "0", "--epochs", "3", "--patience", "3", "--dropout", "0.5", "--batch_size", "5"]
    more += RESUMED[model]
    straight, runs = fit(data_dir, tmp_path / "a", *more, model=model), tmp_path / "b"
    for epoch in (1, 2, 3):
        with pytest.raises(Stopped, match=f"fold 0 epoch {epoch}.*--resume"):
            fit(data_dir, runs, *more, "--max_hours", 0, *["--resume"] * (epoch > 1), model=model)
        if epoch == 1:
            with pytest.raises(InputError, match="interrupted"):
                fit(data_dir, runs, *more, model=model)
    assert_same_training(straight, fit(data_dir, runs, *more, "--resume", model=model))


def test_a_signal_or_a_kill_costs_the_epoch_alone(data_dir, tmp_path):
    words = ["--fold", 0, "--epochs", 9, "--patience", 9, "--ema", "0.9", "--workers", 2, "--batch_size", 4]
    straight, runs = fit(data_dir, tmp_path / "a", *words, model="chipnet"), tmp_path / "b"
    command = [sys.executable, ROOT / "train.py", "--model", "chipnet", "--data_dir", data_dir, "--runs_dir", runs,
               *SMALL_MODEL, *words]  # fmt: skip
    log, done = runs / "chipnet" / "fold0_log.csv", 0
    for number, group in ((signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, True)):
        more = ["--resume"] if done else []
        process = subprocess.Popen([str(word) for word in [*command, *more]], cwd=tmp_path, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)  # fmt: skip
        give_up = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < done + 2:  # one more epoch, and the header
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
        os.killpg(process.pid, number) if group else process.send_signal(number)  # Ctrl-C goes to the whole group
        error = process.communicate(timeout=60)[1]
        done = len(pd.read_csv(log))
        assert done < 9
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130, error
            assert "with --resume" in error
            assert "Traceback" not in error
    assert_same_training(straight, fit(data_dir, runs, *words, "--resume", model="chipnet"))


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_ctrl_c_while_a_checkpoint_is_written_is_no_full_disk(tmp_path, monkeypatch, writes):
    class File(io.FileIO):
        left = writes

        def write(self, content):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().write(content)

    monkeypatch.setattr(models, "open", File, raising=False)
    with pytest.raises(KeyboardInterrupt):
        models.save_plain(tmp_path / "last.pt", state=torch.zeros(3000))
    assert not list(tmp_path.iterdir())


def test_time_is_up(data_dir, tmp_path):
    words = ["--model", "resnet", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    result = shell("train", *words, "--epochs", 3, "--max_hours", "1e-9", cwd=tmp_path)
    assert result.returncode == 3
    assert "--resume" in result.stderr.splitlines()[-1]
    assert "\r" not in result.stderr  # no bars where there is no terminal
    assert len(pd.read_csv(tmp_path / "resnet" / "fold0_log.csv")) == 1
    assert not (tmp_path / "resnet" / "fold1_log.csv").exists()


@pytest.mark.parametrize("key", ["state", "progress"])
def test_a_checkpoint_that_cannot_be_resumed_is_named(data_dir, tmp_path, key):
    with pytest.raises(Stopped):
        fit(data_dir, tmp_path, "--fold", 0, "--max_hours", 0)
    change_checkpoint(tmp_path / "resnet" / "fold0_last.pt", lambda content: content.pop(key))
    with pytest.raises(InputError, match="fold0_last.pt.*--overwrite"):
        fit(data_dir, tmp_path, "--fold", 0, "--resume")


def test_a_run_that_has_no_finished_fold_is_no_run_yet(data_dir, tmp_path):
    with pytest.raises(Stopped):
        fit(data_dir, tmp_path, "--fold", 0, "--max_hours", 0)
    with pytest.raises(InputError, match="--resume"):
        read_run(tmp_path / "resnet")


# ---------------------------------------------------------------- who has seen what
def test_the_one_rule():
    for trained_on in (None, {"folds_sha256": "x", "fold": 1}):
        check_unseen("it", trained_on, "x", 1)
    for trained_on in ({"folds_sha256": "x", "fold": 0}, {"folds_sha256": "y", "fold": 1}, {"fold": 1}, {},
                       {"folds_sha256": "x", "fold": None}):  # fmt: skip
        with pytest.raises(InputError, match="it comes from.*fold 1"):
            check_unseen("it", trained_on, "x", 1)


def test_starting_weights_that_saw_the_held_out_images_are_refused(data_dir, runs_dir, tmp_path):
    own = shutil.copy(runs_dir / "resnet" / "fold0_best.pt", tmp_path / "pre.pt")  # whatever its name
    for words in ([], ["--fold", 1], ["--fold", 1, "--fsg"]):
        with pytest.raises(InputError, match="pre.pt.*fold 1"):
            fit(data_dir, tmp_path / "runs", "--weights", own, *words)
    foreign = shutil.copytree(runs_dir / "resnet", tmp_path / "foreign")
    for k in (0, 1):
        change_checkpoint(foreign / f"fold{k}_best.pt", lambda content: content["trained_on"].update(folds_sha256="x"))
    with pytest.raises(InputError, match="foreign.*fold 0"):
        fit(data_dir, tmp_path / "runs", "--weights", foreign)
    with pytest.raises(InputError, match="fold0_best.pt.*fold 1"):
        call("crop", "--source", "saliency", "--backbone", "regnet_tiny", "--device", "cpu", "--data_dir", data_dir,
             "--weights", runs_dir / "resnet" / "fold0_best.pt", "--output_dir", tmp_path / "crops")  # fmt: skip
    assert not (tmp_path / "runs").exists()
    fit(data_dir, tmp_path / "runs", "--weights", own, "--fold", 0, "--limit", 2)
    plain = {key[9:]: value for key, value in torch.load(own, weights_only=True)["state_dict"].items()
             if key.startswith("backbone.")}  # fmt: skip
    torch.save(plain, tmp_path / "plain.pt")  # says nothing of where it is from
    fit(data_dir, tmp_path / "plain", "--weights", tmp_path / "plain.pt", "--fold", 1, "--limit", 2)


def test_crops_and_guides_by_networks_that_saw_the_held_out_images_are_refused(data_dir, runs_dir, tmp_path):
    crops = shutil.copytree(data_dir / "crops" / "chipnet", tmp_path / "crops")
    with pytest.raises(InputError, match="crops.*fold 0"):  # of the other rows' maps by networks that saw fold 0
        fit(data_dir, tmp_path / "runs", "--guide", crops, "--fold", 0, model="chipnet")
    change(crops / "crop.json", lambda facts: facts.update(folds=[0]))  # as of a ChipNet of fold 0 alone
    with pytest.raises(InputError, match="crops.*fold 1"):
        fit(data_dir, tmp_path / "runs", "--crop_dir", crops, model="cropnet")
    with pytest.raises(InputError, match="crops.*fold 1"):
        fit(data_dir, tmp_path / "runs", "--crop_dir", crops, "--fold", 1, model="resnet")
    assert not (tmp_path / "runs").exists()
    fit(data_dir, tmp_path / "runs", "--crop_dir", crops, "--fold", 0, "--limit", 2, model="cropnet")
    saliency = call("crop", "--source", "saliency", "--data_dir", data_dir, "--backbone", "regnet_tiny",
                    "--weights", "none", "--device", "cpu", "--output_dir", tmp_path)  # fmt: skip
    guided = fit(data_dir, tmp_path / "runs", "--guide", saliency, "--limit", 2, model="chipnet")
    assert read_json(guided / "config.json")["inputs"]["guide"]
    np.save(saliency / "train_attention.npy", np.ones((5, 2, 2), np.float32))
    with pytest.raises(InputError, match="train_attention.npy.*5"):
        fit(data_dir, tmp_path / "other", "--guide", saliency, model="chipnet")


def test_everything_of_other_folds_is_refused(data_dir, runs_dir, source, tmp_path):
    other = call("preprocess", "--train_csv", source / "train.csv", "--output_dir", tmp_path / "other", "--size", 64,
                 "--n_folds", 2, "--seed", 5)  # fmt: skip
    crops = ["--crop_dir", data_dir / "crops" / "chipnet"]
    for more, model in ((crops, "cropnet"), (["--guide", crops[1]], "chipnet"),
                        (["--weights", runs_dir / "resnet"], "resnet")):  # fmt: skip
        with pytest.raises(InputError, match="other folds"):
            fit(other, tmp_path / "runs", *more, model=model)
    with pytest.raises(InputError, match="other folds"):
        call("crop", "--source", "attention", "--run", runs_dir / "chipnet", "--data_dir", other, "--device", "cpu")
    assert not (tmp_path / "runs").exists()


def test_arrays_that_do_not_match_their_table_are_refused(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("crops"))
    np.save(copy / "train_64.npy", np.zeros((5, 64, 64, 3), np.uint8))
    with pytest.raises(InputError, match="train_64.npy.*24"):
        fit(copy, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- moving
def predict(run, images, output):
    call("predict", "--run", run, images / "0024.jpg", images / "0025.jpg", "--device", "cpu", "--no-pictures",
         "--output", output)  # fmt: skip
    return (output / "predictions.csv").read_bytes()


def test_runs_made_with_relative_paths_predict_from_anywhere_without_the_data(data_dir, source, tmp_path, monkeypatch):
    tour, images = tmp_path / "tour", source / "images"
    shutil.copytree(data_dir, tour / "data", ignore=shutil.ignore_patterns("crops"))
    monkeypatch.chdir(tour)
    fit("data", "runs", model="chipnet")
    call("crop", "--run", "runs/chipnet", "--data_dir", "data", "--backbone", "regnet_tiny", "--weights", "none",
         "--device", "cpu")  # fmt: skip
    fit("data", "runs", model="cropnet")
    call("ensemble", "mean", "--runs_dir", "runs")
    before = [predict(tour / "runs" / name, images, tmp_path / "before" / name) for name in ("cropnet", "ensemble")]
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(tour / "runs", tmp_path / "far" / "kept")
    monkeypatch.chdir(tmp_path / "far" / "away")
    shutil.rmtree(tour)
    after = [predict(tmp_path / "far" / "kept" / name, images, tmp_path / "after" / name)
             for name in ("cropnet", "ensemble")]  # fmt: skip
    assert before == after
    assert predict(Path("..", "kept", "ensemble"), images, tmp_path / "third") == after[1]


def test_a_run_goes_on_however_its_data_is_named(data_dir, runs_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path / "data")
    fit(tmp_path / "data", tmp_path / "runs", "--fold", 0, model="cropnet")
    os.rename(tmp_path / "data", tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    run = fit("renamed", "runs", "--fold", 1, model="cropnet")
    for name in TABLES:
        assert (run / name).read_bytes() == (runs_dir / "cropnet" / name).read_bytes()
    change(tmp_path / "renamed" / "crops" / "chipnet" / "crop.json",
           lambda facts: facts["sha256"].update({"train_64.npy": "other"}))  # fmt: skip
    with pytest.raises(InputError, match="crop train"):
        fit("renamed", "runs", "--fold", 1, "--resume", model="cropnet")


def other_network(runs):
    change_checkpoint(runs / "cropnet" / "fold0_best.pt", lambda content: content["state_dict"]["head.1.bias"].add_(1))


def other_saliency(runs):
    shutil.copy(runs / "cropnet" / "finder" / "fold0_network.pt", runs / "cropnet" / "finder" / "saliency.pt")


def other_chipnet(runs):
    shutil.copy(runs / "cropnet" / "finder" / "fold1_network.pt", runs / "cropnet" / "finder" / "fold0_network.pt")


def edited_oof(runs):
    table = pd.read_csv(runs / "cropnet" / "oof.csv", dtype={"image_name": str})
    table.assign(prob=0.5).to_csv(runs / "cropnet" / "oof.csv", index=False)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(other_network, "fold0_best.pt"), (other_saliency, "saliency.pt"), (other_chipnet, "fold0_network.pt"),
     (edited_oof, "oof.csv")],
)  # fmt: skip
def test_exchanged_files_are_noticed(runs_dir, source, tmp_path, spoil, named):
    runs = shutil.copytree(runs_dir, tmp_path / "runs")
    spoil(runs)
    for name in ("cropnet", "mean"):
        with pytest.raises(InputError, match=named):
            predict(runs / name, source / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_trained_again_is_noticed(data_dir, runs_dir, source, tmp_path):
    runs = shutil.copytree(runs_dir, tmp_path / "runs")
    fit(data_dir, runs, "--overwrite", "--seed", 5)
    with pytest.raises(InputError, match="resnet.*metrics.json"):
        predict(runs / "mean", source / "images", tmp_path / "out")
    call("ensemble", "mean", "--runs_dir", runs, "--name", "mean", "--overwrite")
    predict(runs / "mean", source / "images", tmp_path / "out")


def test_collecting_again_changes_nothing(data_dir, runs_dir, tmp_path):
    run = shutil.copytree(runs_dir / "resnet", tmp_path / "resnet")
    collect(run, read_data(data_dir))
    for name in SHARED - {"curves.png", "roc.png"}:
        assert (run / name).read_bytes() == (runs_dir / "resnet" / name).read_bytes(), name
