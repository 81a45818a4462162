"""What a run claims, checked against its files: whole runs pass, changed ones are named."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call, shell
from test_runs import change, change_checkpoint, edited_oof, other_network
from test_train import fit

from plumbing.data import MetaEncoder, read_data
from plumbing.files import read_json, sha256, write_table
from plumbing.runs import write_run
from util import InputError


@pytest.fixture
def runs(runs_dir, tmp_path):
    """A copy of all runs, to spoil."""
    return shutil.copytree(runs_dir, tmp_path / "runs")


def audit(*words):
    call("audit", *words, "--device", "cpu")


def edit_oof(run, data_dir, edit):
    """Change oof.csv and score it anew, hashes and all."""
    data, metrics = read_data(data_dir), read_json(run / "metrics.json")
    oof, test = (pd.read_csv(run / name, dtype={"image_name": str}) for name in ("oof.csv", "test_predictions.csv"))
    facts = [{key: fold[key] for key in ("fold", "checkpoint") if key in fold} for fold in metrics["folds"]]
    write_run(run, edit(oof), test, data, facts)


def test_whole_runs_and_blends_pass_with_their_members(runs_dir, capsys):
    audit(runs_dir / "ensemble", runs_dir / "mean")
    out = capsys.readouterr().out
    assert "WRONG" not in out
    for name in ("ensemble", "mean", "resnet", "chipnet", "cropnet"):
        assert sum(line.startswith(f"ok    {name}, ") for line in out.splitlines()) == 3, out


@pytest.mark.parametrize("more", [["--fold", 1], ["--limit", 3, "--fsg", "--ema", 0.9]])
def test_runs_of_one_fold_and_dry_runs_pass(data_dir, tmp_path, more):
    audit(fit(data_dir, tmp_path, *more))


def claimed(run, data_dir):
    """Predictions of a network that knew the targets."""
    edit_oof(run, data_dir, lambda oof: oof.assign(prob=0.1 + 0.8 * oof["target"]))


def other_targets(run, data_dir):
    edit_oof(run, data_dir, lambda oof: oof.assign(target=np.roll(oof["target"], 1)))


def lost_row(run, data_dir):
    edit_oof(run, data_dir, lambda oof: oof[1:])


def row_twice(run, data_dir):
    edit_oof(run, data_dir, lambda oof: pd.concat([oof[1:], oof[1:2]]))


def better_score(run, data_dir):
    change(run / "metrics.json", lambda metrics: metrics["ranked"].update(auc=0.99))


def better_interval(run, data_dir):
    change(run / "metrics.json", lambda metrics: metrics["pooled"]["auc_interval"].reverse())


def no_hashes(run, data_dir):
    change(run / "metrics.json", lambda metrics: metrics.pop("sha256"))


def cut_off(run, data_dir):
    (run / "fold0_best.pt").write_bytes((run / "fold0_best.pt").read_bytes()[:1000])


def scored_anew(run, edit):
    """Change the network of fold 0, and its hash."""
    change_checkpoint(run / "fold0_best.pt", edit)
    digest = sha256(run / "fold0_best.pt")
    change(run / "metrics.json", lambda metrics: metrics["folds"][0].update(checkpoint=digest))


def hashed_network(run, data_dir):
    scored_anew(run, lambda content: content["state_dict"]["head.1.bias"].add_(1))


def encoder_of_all_rows(run, data_dir):
    columns = MetaEncoder.fit(read_data(data_dir).train, ["age_approx"]).columns
    scored_anew(run, lambda content: content["encoder"].update(columns))


@pytest.mark.parametrize(
    ("spoil", "check", "word"),
    [
        (lambda run, _: edited_oof(run.parent), "scores", "oof.csv"),
        (lambda run, _: other_network(run.parent), "networks", "fold0_best.pt"),
        (cut_off, "networks", "fold0_best.pt"),
        (claimed, "networks", "predicted again"),
        (hashed_network, "networks", "predicted again"),
        (encoder_of_all_rows, "networks", ""),
        (other_targets, "scores", "rows"),
        (lost_row, "scores", "23"),
        (row_twice, "scores", "24"),
        (better_score, "scores", "AUC"),
        (better_interval, "scores", ""),
        (no_hashes, "scores", "sha256"),
    ],
)
def test_what_was_changed_is_named(runs, data_dir, capsys, spoil, check, word):
    spoil(runs / "cropnet", data_dir)
    with pytest.raises(InputError, match=f"cropnet, {check}"):
        audit(runs / "cropnet")
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert any(f", {check}: " in line and word in line for line in wrong), wrong


def test_a_foreign_or_changed_data_folder_is_named(runs, data_dir, source, tmp_path):
    other = call("preprocess", "--train_csv", source / "train.csv", "--output_dir", tmp_path / "other", "--size", 64,
                 "--n_folds", 2, "--seed", 5)  # fmt: skip
    with pytest.raises(InputError, match="resnet, data"):
        audit(runs / "resnet", "--data_dir", other)
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    audit(runs / "resnet", "--data_dir", moved)
    array = np.load(moved / "train_64.npy", mmap_mode="r+")
    array[0] += 1
    array.flush()
    with pytest.raises(InputError, match="train_64.npy"):
        audit(runs / "resnet", "--data_dir", moved)
    table = pd.read_csv(moved / "train.csv", dtype={"image_name": str})
    write_table(moved / "train.csv", table.assign(fold=1 - table["fold"]))
    with pytest.raises(InputError, match="train.csv"):
        audit(runs / "resnet", "--data_dir", moved)


def test_a_blend_whose_member_was_trained_again_is_named(runs, data_dir):
    fit(data_dir, runs, "--overwrite", "--seed", 5)
    with pytest.raises(InputError, match="resnet.*metrics.json"):
        audit(runs / "mean")
    audit(runs / "resnet")


def test_command_ends_with_one_line_and_status_2(runs, tmp_path):
    edited_oof(runs)
    result = shell("audit", runs / "cropnet", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("audit.py: error: 2 checks failed")
    assert result.stderr.count("\n") == 1
    assert torch.load(runs / "cropnet" / "fold0_best.pt", weights_only=True)  # nothing was written
