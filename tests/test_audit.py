"""What a run claims, checked against its files: whole runs pass, changed ones are named."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import call, change, read
from test_train import fit

from plumbing.data import MetaEncoder, read_data
from plumbing.files import read_json, sha256
from plumbing.runs import write_run
from util import InputError


def audit(*words):
    call("audit", *words, "--device", "cpu")


def test_whole_runs_and_blends_pass_with_their_members(runs_dir, capsys):
    audit(runs_dir / "ensemble", runs_dir / "mean")
    lines = capsys.readouterr().out.splitlines()
    for name in ("ensemble", "mean", "resnet", "chipnet", "cropnet"):
        assert sum(line.startswith(f"ok    {name}, ") for line in lines) == 3, lines
    assert not any("WRONG" in line for line in lines)


@pytest.mark.parametrize("more", [["--fold", 1], ["--limit", 3, "--fsg", "--ema", 0.9]])
def test_runs_of_one_fold_and_dry_runs_pass(data_dir, tmp_path, more):
    audit(fit(data_dir, tmp_path, *more))


# ways to spoil a run
def edit_oof(edit):
    """Change oof.csv, and write all scores and hashes anew, as if it had always been so."""

    def spoil(run, data_dir):
        tables = [read(run / name) for name in ("oof.csv", "test_predictions.csv")]
        folds = read_json(run / "metrics.json")["folds"]
        facts = [{key: fold[key] for key in ("fold", "checkpoint")} for fold in folds]
        write_run(run, edit(tables[0]), tables[1], read_data(data_dir), facts)

    return spoil


def edit_network(edit):
    """Change the network of fold 0, and its hash."""

    def spoil(run, data_dir):
        change(run / "fold0_best.pt", lambda content: edit(content, read_data(data_dir).train))
        digest = sha256(run / "fold0_best.pt")
        change(run / "metrics.json", lambda metrics: metrics["folds"][0].update(checkpoint=digest))

    return spoil


SPOILT = {
    "another network": (lambda run, _: shutil.copy(run / "fold1_best.pt", run / "fold0_best.pt"), "networks: .*0_best"),
    "another network, hashed": (edit_network(lambda c, _: c["state_dict"]["head.1.bias"].add_(1)), "networks: .*again"),
    "an encoder that saw fold 0": (
        edit_network(lambda c, train: c["encoder"].update(MetaEncoder.fit(train, ["age_approx"]).columns)), "networks"),
    "no network's predictions": (edit_oof(lambda oof: oof.assign(prob=0.1 + 0.8 * oof["target"])), "networks: .*again"),
    "other targets": (edit_oof(lambda oof: oof.assign(target=np.roll(oof["target"], 1))), "scores"),
    "a lost row": (edit_oof(lambda oof: oof[1:]), "scores: 23"),
    "a row twice": (edit_oof(lambda oof: pd.concat([oof[1:], oof[1:2]])), "scores: 24"),
    "a better score": (lambda run, _: change(run / "metrics.json", lambda m: m["ranked"].update(auc=0.99)), "scores"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_was_changed_is_named(runs, data_dir, what):
    spoil, named = SPOILT[what]
    spoil(runs / "cropnet", data_dir)
    with pytest.raises(InputError, match=f"cropnet, {named}"):
        audit(runs / "cropnet")


def test_a_foreign_or_changed_data_folder_is_named(runs, data_dir, source, tmp_path):
    words = ["--train_csv", source / "train.csv", "--size", 64, "--n_folds", 2, "--seed", 5]
    other = call("preprocess", *words, "--output_dir", tmp_path / "other")
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    audit(runs / "resnet", "--data_dir", moved)
    np.save(moved / "train_64.npy", np.load(moved / "train_64.npy") + 1)
    for folder, named in ((other, "data: "), (moved, "data: .*train_64.npy")):
        with pytest.raises(InputError, match=f"resnet, {named}"):
            audit(runs / "resnet", "--data_dir", folder)
