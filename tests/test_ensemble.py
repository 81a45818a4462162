"""Joining and blending runs."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import call, hashes

import blends
import ensemble
from blends import BLENDS, Blend, learn_weights
from plumbing.files import read_json, sha256, write_json
from tasks import rank_among, rank_in_fold, weighted_auc
from util import InputError

TABLES = ("oof.csv", "test_predictions.csv")


@pytest.fixture
def runs(runs_dir, tmp_path):
    """A copy that tests may spoil."""
    return shutil.copytree(runs_dir, tmp_path / "runs")


def blend(runs, mode, *more, name="b"):
    return call("ensemble", mode, "--runs_dir", runs, "--name", name, *more)


def read(run, name="oof.csv"):
    return pd.read_csv(run / name, dtype={"image_name": str})


def spoil(run, change, tables=("oof.csv",)):
    """Change tables of a run as if it had written them so."""
    metrics = read_json(run / "metrics.json")
    for name in tables:
        change(read(run, name)).to_csv(run / name, index=False)
        metrics["sha256"][name] = sha256(run / name)
    write_json(run / "metrics.json", metrics)


# ---------------------------------------------------------------- how to blend
def test_given_weights_of_a_mean_are_those_of_the_mean(runs):
    out = blend(runs, "mean", "--weights", "resnet=3", "cropnet=1")
    assert np.allclose(read(out)["prob"], 0.75 * read(runs / "resnet")["prob"] + 0.25 * read(runs / "cropnet")["prob"])
    assert [member["weight"] for member in read_json(out / "config.json")["members"]] == [0, 0.25, 0.75]
    submission = read(out, "submission.csv")
    assert submission["image_name"].tolist() == ["0027", "0026", "0025", "0024"]
    parts = [read(runs / name, "submission.csv")["target"] for name in ("resnet", "cropnet")]
    assert np.allclose(submission["target"], 0.75 * parts[0] + 0.25 * parts[1])


def test_logit_and_rank_blends(runs):
    probs = np.column_stack([read(runs / n)["prob"] for n in ("chipnet", "cropnet", "resnet")])
    logit = np.log(probs / (1 - probs)).mean(axis=1)
    assert np.allclose(read(blend(runs, "logit"))["prob"], 1 / (1 + np.exp(-logit)))
    fold = read(runs / "resnet")["fold"].to_numpy()
    ranks = np.column_stack([rank_in_fold(p, fold) for p in probs.T]).mean(axis=1)
    assert np.allclose(read(blend(runs, "rank", name="r"))["prob"], ranks)


def test_a_blend_is_one_row(runs, monkeypatch):
    monkeypatch.setitem(blends.BLENDS, "square", Blend(value=lambda prob, history: prob**2, score=np.sqrt))
    out = blend(runs, "square", "--runs", "resnet", "cropnet")
    for name in TABLES:
        parts = [read(runs / run, name)["prob"] for run in ("resnet", "cropnet")]
        assert np.allclose(read(out, name)["prob"], np.sqrt((parts[0] ** 2 + parts[1] ** 2) / 2))


@pytest.mark.parametrize("mode", sorted(BLENDS))
def test_a_test_image_scores_the_same_alone(runs, mode):
    together = read(blend(runs, mode), "submission.csv").set_index("image_name")["target"]
    for name in ("resnet", "chipnet", "cropnet"):
        spoil(runs / name, lambda table: table[table["image_name"] == "0025"], TABLES[1:])
    alone = read(blend(runs, mode, name="c"), "submission.csv")
    assert alone["image_name"].tolist() == ["0025"]
    assert alone["target"].item() == together["0025"]
    if mode == "rank":  # among the held-out rows of each fold, by each network
        parts = [(read(runs / n), read(runs / n, TABLES[1])) for n in ("resnet", "chipnet", "cropnet")]
        ranks = [rank_among(oof["prob"][oof["fold"] == k], test["prob"][test["fold"] == k])
                 for oof, test in parts for k in (0, 1)]  # fmt: skip
        assert alone["target"].item() == pytest.approx(np.mean(ranks))


def test_row_order_does_not_matter(runs):
    first = read(blend(runs, "mean"))
    spoil(runs / "resnet", lambda table: table.sample(frac=1, random_state=0))
    merged = first.merge(read(blend(runs, "mean", name="c")), on=["image_name", "fold", "target"], validate="1:1")
    assert np.allclose(merged["prob_x"], merged["prob_y"])
    assert len(merged) == 24


def test_blends_nest_and_are_not_taken_by_default(runs):
    members = read_json(runs / "ensemble" / "config.json")["members"]
    assert {m["run"] for m in members} == {"../chipnet", "../cropnet", "../resnet"}
    out = blend(runs, "mean", "--runs", "mean", "resnet")
    for name in TABLES:
        expected = (read(runs / "mean", name)["prob"] + read(runs / "resnet", name)["prob"]) / 2
        assert np.allclose(read(out, name)["prob"], expected)


# ---------------------------------------------------------------- learned weights
def test_one_run_alone_keeps_its_scores(runs):
    out = blend(runs, "weights", "--runs", "resnet")
    before, after = (read_json(run / "metrics.json") for run in (runs / "resnet", out))
    assert after["ranked"]["auc"] == before["ranked"]["auc"]
    assert after["learned"]["gain"] == 0


def test_greedy_weights_find_the_better_runs():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 400)
    good, noise = target + rng.normal(size=(2, 400)), rng.normal(size=400)
    weights = learn_weights(np.column_stack([*good, noise]), target)
    assert weights.sum() == pytest.approx(1)
    assert min(weights[:2]) > 0.3 > weights[2]


def test_cross_fitting_shows_no_gain_where_there_is_none():
    """In-sample, greedy weights of 20 noise runs look good; cross-fitted they must not."""
    rng = np.random.default_rng(0)
    target, values, fold = rng.integers(0, 2, 120), rng.uniform(size=(120, 20)), np.arange(120) % 3
    outside = ensemble.cross_fit(BLENDS["weights"], values, target, fold)
    assert weighted_auc(target, values @ learn_weights(values, target)) > 0.62
    assert weighted_auc(target, rank_in_fold(outside, fold)) < 0.58


def test_rows_of_a_part_do_not_teach_their_own_weights():
    rng = np.random.default_rng(1)
    target, values, fold = rng.integers(0, 2, 60), rng.uniform(size=(60, 4)), np.arange(60) % 2
    before = ensemble.cross_fit(BLENDS["weights"], values, target, fold)
    changed = np.where(fold == 0, 1 - target, target)  # other labels in part 0
    after = ensemble.cross_fit(BLENDS["weights"], values, changed, fold)
    assert (before[fold == 0] == after[fold == 0]).all()
    assert not (before[fold == 1] == after[fold == 1]).all()


def test_what_a_learned_blend_leaves_is_cross_fitted(runs):
    names = ("chipnet", "cropnet", "resnet")
    fold, target = read(runs / "resnet")["fold"].to_numpy(), read(runs / "resnet")["target"].to_numpy()
    values = np.column_stack([rank_in_fold(read(runs / name)["prob"].to_numpy(), fold) for name in names])
    found = read(runs / "ensemble")["prob"].to_numpy()
    for k in (0, 1):
        assert np.allclose(found[fold == k], values[fold == k] @ learn_weights(values[fold != k], target[fold != k]))
    weights = [member["weight"] for member in read_json(runs / "ensemble" / "config.json")["members"]]
    assert np.allclose(weights, learn_weights(values, target))  # for new images


def test_single_fold_is_cross_fitted_by_halves(runs):
    for name in ("resnet", "cropnet"):
        spoil(runs / name, lambda table: table[table["fold"] == 0], TABLES)
    out = blend(runs, "weights", "--runs", "resnet", "cropnet")
    assert set(read(out)["fold"]) == {0}
    assert read_json(out / "metrics.json")["learned"]["gain_interval"] is not None


# ---------------------------------------------------------------- what is refused, and what is replaced
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t[1:], "resnet"),
        (lambda t: t.assign(fold=1 - t["fold"]), "resnet"),
        (lambda t: t.assign(target=1 - t["target"]), "resnet"),
        (lambda t: t.assign(prob=np.nan), "resnet"),
        (lambda t: t.drop(columns="prob"), "'prob'"),
    ],
)
def test_runs_that_do_not_match_are_refused(runs, change, word):
    spoil(runs / "resnet", change)
    with pytest.raises(InputError, match=word):
        blend(runs, "mean")
    assert not (runs / "b").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--runs", "nothing"], "nothing"),
        (["--runs", "resnet", "resnet"], "once"),
        (["--runs", "resnet", "b"], "not b|missing|No such"),
        (["--weights", "resnet"], "NAME=NUMBER"),
        (["--weights", "other=1"], "chipnet, cropnet, resnet"),
        (["--weights", "resnet=-1", "cropnet=2"], "positive"),
        (["--weights", "resnet=0"], "positive"),
        (["--weights", "resnet=nan"], "positive"),
    ],
)
def test_bad_words(runs, more, word):
    with pytest.raises((InputError, FileNotFoundError), match=word):
        blend(runs, "mean", *more)


def test_changed_tables_other_folds_and_empty_folders_are_refused(runs, tmp_path):
    table = read(runs / "chipnet")
    table.assign(prob=table["target"]).to_csv(runs / "chipnet" / "oof.csv", index=False)
    with pytest.raises(InputError, match=r"chipnet.*oof\.csv"):
        blend(runs, "mean")
    config = read_json(runs / "resnet" / "config.json")
    config["inputs"]["folds"] = "other"
    write_json(runs / "resnet" / "config.json", config)
    with pytest.raises(InputError, match="resnet has other folds"):
        blend(runs, "mean", "--runs", "cropnet", "resnet")
    with pytest.raises(InputError, match=str(tmp_path / "nothing")):
        blend(tmp_path / "nothing", "mean")


def test_a_blend_made_anew_leaves_nothing_of_the_old_one_and_runs_are_never_replaced(runs):
    out = blend(runs, "mean", "--runs", "resnet", "cropnet")
    assert (out / "submission.csv").exists()
    for name in ("resnet", "cropnet"):
        metrics = read_json(runs / name / "metrics.json")
        for table in ("test_predictions.csv", "submission.csv"):
            (runs / name / table).unlink()
            del metrics["sha256"][table]
        write_json(runs / name / "metrics.json", metrics)
    with pytest.raises(InputError, match="--overwrite"):
        blend(runs, "mean", "--runs", "resnet", "cropnet")
    blend(runs, "mean", "--runs", "resnet", "cropnet", "--overwrite")
    assert not list(out.glob("*submission*")) + list(out.glob("test_*"))
    assert set(read_json(out / "metrics.json")["sha256"]) == {"oof.csv"}
    with pytest.raises(InputError, match="cropnet"):  # chipnet alone has test predictions
        blend(runs, "mean", "--runs", "cropnet", "chipnet", name="c")
    before = hashes(runs / "chipnet")
    with pytest.raises(InputError, match="chipnet"):
        blend(runs, "mean", "--runs", "resnet", "--overwrite", name="chipnet")
    assert hashes(runs / "chipnet") == before
