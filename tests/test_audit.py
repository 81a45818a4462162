"""What a run claims, derived again: good runs pass, and every kind of tampering is named."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import shell

import util
from dataset import MetaEncoder
from util import InputError


@pytest.fixture
def run(runs_dir, data_dir, tmp_path):
    """A copy of the cropnet run, its crops and its data, that tests may spoil."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    run = shutil.copytree(runs_dir / "cropnet", tmp_path / "runs" / "cropnet")
    change(run / "config.json", lambda c: c["args"].update(
        data_dir=str(data), crop_dir=str(data / "crops" / "chipnet")))  # fmt: skip
    return run


def change(path, edit):
    """Edit a json or csv file in place."""
    if path.suffix == ".json":
        content = util.read_json(path)
        edit(content)
        util.write_json(path, content)
    else:
        table = pd.read_csv(path, dtype={"image_name": str})
        edited = edit(table)
        util.write_table(path, table if edited is None else edited)


def rehash(path, facts):
    """Make the recorded hash of a file that of its new content."""
    change(facts, lambda c: c["sha256"].update({path.name: util.sha256(path)}))


def audit(*runs):
    args = util.get_args_parser().parse_args(["audit", *map(str, runs)])
    util.audit(args)


def test_good_runs_and_blends_pass(runs_dir, data_dir, capsys):
    audit(runs_dir / "ensemble", runs_dir / "mean")
    out = capsys.readouterr().out
    assert "WRONG" not in out
    assert "ok     ensemble: blend: 24 rows of 3 members blended again, weights cross-fitted" in out
    assert "ok     mean: blend: 24 rows of 3 members blended again, weights given" in out
    assert "ok     chipnet: oof: 24 rows" in out  # members are audited too
    assert "ok     cropnet: crops: 24 boxes, by 2 networks as hashed" in out
    assert "of 5 runs: what they claim follows from their files" in out


def swap_folds(table):
    return table.assign(fold=1 - table["fold"])


def flip_first(column, value):
    def edit(table):
        table[column] = table[column].astype(object)
        table.loc[0, column] = value

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("oof.csv", flip_first("prob", 0.999), "metrics.json: sha256: oof.csv is"),
        ("oof.csv", flip_first("prob", 1.5), "files: .*prob of 0000 is '1.5'; it must"),
        ("oof.csv", flip_first("prob", "high"), "files: .*prob of 0000 is 'high'; it must"),
        ("oof.csv", flip_first("target", 0), "oof: oof.csv .* image_name 0000, fold ., target"),
        ("oof.csv", swap_folds, "oof: oof.csv .* image_name 0000, fold ., target"),
        ("oof.csv", lambda t: t[1:], "oof: oof.csv lacks image_name 0000"),
        ("oof.csv", lambda t: pd.concat([t, t[:1]]), "oof: oof.csv has 0000 more than once"),
        ("test_predictions.csv", lambda t: t[:-1], "test_predictions.csv lacks image_name 0027"),
        ("test_predictions.csv", flip_first("prob", 0.999), "test: submission.csv: 0024 is"),
        ("metrics.json", lambda c: c.pop("sha256"), "'sha256' is nowhere recorded: another v"),
        ("metrics.json", lambda c: c["sha256"].pop("oof.csv"), "'oof.csv' is nowhere recorded"),
        ("submission.csv", lambda t: t[::-1], "test: submission.csv has other rows or order"),
        ("log.csv", flip_first("valid_auc", 0.0), "log: fold 0 by log.csv: best_valid_auc is"),
        ("log.csv", flip_first("epoch", 2), r"log: log.csv: fold 0 has epochs \[2\]"),
        ("metrics.json", lambda c: c["ranked"].update(auc=0.99), "ranked: auc is 0.99"),
        ("metrics.json", lambda c: c["pooled"]["auc_interval"].reverse(), "pooled: auc_interval"),
        ("metrics.json", lambda c: c["folds"][1].update(rows=13), "fold 1: rows is 13"),
        ("metrics.json", lambda c: c["folds"].pop(), "oof.csv should not have"),
        ("metrics.json", lambda c: c["folds"][0].update(best_epoch=2), "fold 0 .*best_epoch is 2"),
        ("config.json", lambda c: c["data"].update(folds_sha256="x"), "folds_sha256 is x"),
        ("config.json", lambda c: c["spec"].update(hidden=9), "fold0_best.pt: spec is"),
        ("config.json", lambda c: c["data"]["arrays"].update({"chipnet/train_64.npy": "x"}),
         "sha256 of arrays: chipnet/train_64.npy"),
        ("config.json", lambda c: c["crop"].update(rule="original"), "was cropped again since"),
    ],
)  # fmt: skip
def test_changed_file_is_named(run, name, edit, words, capsys):
    change(run / name, edit)
    with pytest.raises(InputError, match="checks failed; cropnet: "):
        audit(run)
    out = capsys.readouterr().out
    assert any(re.search(words, line) for line in out.splitlines() if line[:5] == "WRONG"), out


def test_swapped_network_is_named(run, runs_dir):
    first, second = run / "fold0_best.pt", run / "fold1_best.pt"
    third = shutil.copy(first, run / "third")
    shutil.copy(second, first)
    with pytest.raises(InputError, match=r"networks: .*fold0_best\.pt is the network of fold 1"):
        audit(run)
    shutil.copy(runs_dir / "resnet" / "fold0_best.pt", first)  # of the same fold
    with pytest.raises(InputError, match=r"fold0_best\.pt is not the network that was scored"):
        audit(run)
    shutil.copy(third, first)
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(InputError, match="networks: "):
        audit(run)


def test_encoder_that_saw_held_out_rows_is_named(run):
    path = run / "fold0_best.pt"
    content = torch.load(path, weights_only=True)
    train = util.read_data(run.parent.parent / "data").train
    content["encoder"] |= MetaEncoder.fit(train, ["age_approx"]).columns
    torch.save(content, path)
    change(run / "metrics.json", lambda c: c["folds"][0].update(checkpoint=util.sha256(path)))
    with pytest.raises(InputError, match="encoder of fold 0, fitted to its training rows, age_app"):
        audit(run)


def test_patient_on_both_sides_and_other_folds_are_named(run):
    data = run.parent.parent / "data"
    change(data / "train.csv", flip_first("fold", 1 - pd.read_csv(data / "train.csv")["fold"][0]))
    with pytest.raises(InputError, match=r"train\.csv was changed after preprocessing"):
        audit(run)
    rehash(data / "train.csv", data / "preprocess.json")
    with pytest.raises(InputError, match="files: .*patient_id p0 lies in folds . and ."):
        audit(run)
    change(data / "train.csv", lambda t: t.assign(fold=np.arange(24) // 12))  # whole, but others
    rehash(data / "train.csv", data / "preprocess.json")
    with pytest.raises(InputError, match="data: folds of the data"):
        audit(run)


def test_changed_boxes_and_arrays_are_named(run, data_dir):
    data = run.parent.parent / "data"
    crops = data / "crops" / "chipnet"

    def record_crops():
        rehash(crops / "train_boxes.csv", crops / "crop.json")
        change(run / "config.json", lambda c: c.update(crop=util.read_json(crops / "crop.json")))

    change(crops / "train_boxes.csv", flip_first("x0", 1.0))
    np.save(data / "test_64.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"data: sha256 in .*data: test_64\.npy is"):
        audit(run)
    shutil.copy(data_dir / "test_64.npy", data)
    with pytest.raises(InputError, match=r"data: sha256 in .*chipnet: train_boxes\.csv is"):
        audit(run)
    shutil.copy(data_dir / "crops" / "chipnet" / "train_boxes.csv", crops)
    change(crops / "train_boxes.csv", flip_first("oof", 0))
    record_crops()
    with pytest.raises(InputError, match="crops: oof in train_boxes.csv: 0000 is 0, it should be"):
        audit(run)
    change(crops / "crop.json", lambda c: c.update(folds=[0]))
    change(crops / "train_boxes.csv", lambda t: t.assign(
        oof=(util.read_data(data).train["fold"] == 0).astype(int)))  # fmt: skip
    record_crops()
    with pytest.raises(InputError, match="networks cropped held-out images they had seen"):
        audit(run)


def test_network_that_found_the_boxes_must_be_the_same(run, runs_dir, tmp_path):
    chipnet = shutil.copytree(runs_dir / "chipnet", tmp_path / "runs" / "chipnet")
    crops = tmp_path / "data" / "crops" / "chipnet"
    change(crops / "crop.json", lambda c: c.update(run=str(chipnet)))
    change(run / "config.json", lambda c: c["crop"].update(run=str(chipnet)))
    audit(run)
    shutil.copy(chipnet / "fold1_best.pt", chipnet / "fold0_best.pt")
    with pytest.raises(InputError, match=r"crops: .*fold0_best\.pt is the network of fold 1"):
        audit(run)


def test_blend_that_was_not_cross_fitted_is_named(runs_dir, data_dir, tmp_path, capsys):
    blend = shutil.copytree(runs_dir / "ensemble", tmp_path / "ensemble")
    data, config = util.read_data(data_dir), util.read_json(blend / "config.json")
    oof = util.read_predictions(blend, "oof.csv", ["fold", "target", "prob"])
    members = [util.read_predictions(Path(m["run"]), "oof.csv", ["prob"])["prob"]
               for m in config["members"]]  # fmt: skip
    ranks = [util.rank_in_fold(prob, oof["fold"]) for prob in members]
    inside = util.combine("rank", np.column_stack(ranks), [m["weight"] for m in config["members"]])
    learned = util.read_metrics(blend)["learned"]
    test = util.read_predictions(blend, "test_predictions.csv", ["fold", "prob"])
    util.write_run(blend, oof.assign(prob=inside), test, data, [{"fold": 0}, {"fold": 1}],
                   learned=learned)  # fmt: skip
    with pytest.raises(InputError, match=r"checks failed; ensemble: blend: prob of oof: \('00"):
        audit(blend)
    assert capsys.readouterr().out.count("WRONG") == 1  # all else agrees with itself
    change(blend / "config.json", lambda c: c["members"][0].update(weight=0.9))
    with pytest.raises(InputError, match="blend: config.json: members is"):
        audit(blend)


def test_command_ends_with_one_line_and_status_2(tmp_path):
    result = shell("util", "audit", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("util.py: error: 1 checks failed; nowhere: files: nowhere")
    assert result.stderr.count("\n") == 1
