"""Joining and blending runs."""

import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import call

import ensemble
import util
from util import InputError


@pytest.fixture
def runs(runs_dir, tmp_path):
    """A copy that tests may spoil."""
    return shutil.copytree(runs_dir, tmp_path / "runs")


def blend(runs, mode, *more, name="b"):
    return call("ensemble", mode, "--runs_dir", runs, "--name", name, *more)


def oof(run):
    return pd.read_csv(run / "oof.csv", dtype={"image_name": str})


def test_mean_of_given_weights_is_the_weighted_mean(runs):
    out = blend(runs, "mean", "--weights", "resnet=3", "cropnet=1")
    expected = 0.75 * oof(runs / "resnet")["prob"] + 0.25 * oof(runs / "cropnet")["prob"]
    assert np.allclose(oof(out)["prob"], expected)
    members = util.read_json(out / "config.json")["members"]
    assert [m["weight"] for m in members] == [0, 0.25, 0.75]
    submission = pd.read_csv(out / "submission.csv", dtype=str)
    assert submission["image_name"].tolist() == ["0027", "0026", "0025", "0024"]


def test_logit_and_rank_blends(runs):
    probs = np.column_stack([oof(runs / n)["prob"] for n in ("chipnet", "cropnet", "resnet")])
    logit = np.log(probs / (1 - probs)).mean(axis=1)
    assert np.allclose(oof(blend(runs, "logit"))["prob"], 1 / (1 + np.exp(-logit)))
    fold = oof(runs / "resnet")["fold"].to_numpy()
    ranks = np.column_stack([util.rank_in_fold(p, fold) for p in probs.T]).mean(axis=1)
    assert np.allclose(oof(blend(runs, "rank", name="r"))["prob"], ranks)


def test_row_order_does_not_matter(runs):
    first = oof(blend(runs, "mean"))
    table = oof(runs / "resnet").sample(frac=1, random_state=0)
    table.to_csv(runs / "resnet" / "oof.csv", index=False)
    second = oof(blend(runs, "mean", name="c"))
    merged = first.merge(second, on=["image_name", "fold", "target"], validate="one_to_one")
    assert np.allclose(merged["prob_x"], merged["prob_y"])
    assert len(merged) == 24


def test_blends_nest_and_are_not_taken_by_default(runs):
    members = util.read_json(runs / "ensemble" / "config.json")["members"]
    assert {m["run"].rsplit("/", 1)[1] for m in members} == {"chipnet", "cropnet", "resnet"}
    out = blend(runs, "mean", "--runs", "mean", "resnet")
    expected = (oof(runs / "mean")["prob"] + oof(runs / "resnet")["prob"]) / 2
    assert np.allclose(oof(out)["prob"], expected)


def test_one_run_alone_keeps_its_scores(runs):
    out = blend(runs, "weights", "--runs", "resnet")
    before, after = (util.read_json(r / "metrics.json") for r in (runs / "resnet", out))
    assert after["ranked"]["auc"] == before["ranked"]["auc"]
    assert after["learned"]["gain"] == 0


def test_greedy_weights_find_the_better_runs():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 400)
    good, noise = target + rng.normal(size=(2, 400)), rng.normal(size=400)
    weights = ensemble.fit_weights(np.column_stack([*good, noise]), target)
    assert weights.sum() == pytest.approx(1)
    assert min(weights[:2]) > 0.3 > weights[2]


def test_cross_fitting_shows_no_gain_where_there_is_none():
    """In-sample, greedy weights of 20 noise runs look good; cross-fitted they must not."""
    rng = np.random.default_rng(0)
    target, values = rng.integers(0, 2, 120), rng.uniform(size=(120, 20))
    fold = np.arange(120) % 3
    inside = values @ ensemble.fit_weights(values, target)
    outside = ensemble.cross_fit(partial(ensemble.learn_weights, values, target), values, fold)
    assert util.weighted_auc(target, inside) > 0.62
    assert util.weighted_auc(target, util.rank_in_fold(outside, fold)) < 0.58


def test_rows_of_a_part_do_not_teach_their_own_weights():
    rng = np.random.default_rng(1)
    target, values, fold = rng.integers(0, 2, 60), rng.uniform(size=(60, 4)), np.arange(60) % 2
    before = ensemble.cross_fit(partial(ensemble.learn_weights, values, target), values, fold)
    changed = np.where(fold == 0, 1 - target, target)  # other labels in part 0
    after = ensemble.cross_fit(partial(ensemble.learn_weights, values, changed), values, fold)
    assert (before[fold == 0] == after[fold == 0]).all()
    assert not (before[fold == 1] == after[fold == 1]).all()


def test_zoom_weights_share_between_crops_and_whole_images():
    cropped = np.array([False, True, False, True])
    weights = util.zoom_weights(np.array([1.0, 0.5, 0.1]), cropped, 0.2, 1.0)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights[:, cropped].sum(axis=1), [0.2, 0.7, 1.0])
    assert np.allclose(weights[1], [0.15, 0.35, 0.15, 0.35])


def test_zoom_is_found_where_the_crop_knows_more_when_it_zooms():
    rng = np.random.default_rng(0)
    target, side = rng.integers(0, 2, 900), rng.uniform(0.2, 1, 900)
    whole = target + rng.normal(0, np.where(side < 0.6, 3, 1))
    crop = target + rng.normal(0, np.where(side < 0.6, 1, 3))
    values = np.column_stack([util.rank_in_fold(v, np.zeros(900)) for v in (whole, crop)])
    cropped, fold = np.array([False, True]), np.arange(900) % 3
    _, slope = ensemble.fit_zoom(values, target, side, cropped)
    assert slope >= 0.75
    learn = partial(ensemble.learn_zoom, values, target, side, cropped)
    blend = ensemble.cross_fit(learn, values, fold)
    assert util.weighted_auc(target, blend) > util.weighted_auc(target, values.mean(axis=1)) + 0.02


def test_zoom_blend_of_runs(runs, data_dir):
    out = blend(runs, "zoom", "--runs", "resnet", "cropnet")
    boxes = pd.read_csv(data_dir / "crops" / "chipnet" / "test_boxes.csv").set_index(
        pd.Index([f"{i:04d}" for i in range(24, 28)])
    )
    short = util.read_data(data_dir).test.set_index("image_name")[["width", "height"]].min(axis=1)
    side = ((boxes["x1"] - boxes["x0"]) / short).to_numpy()
    base, slope = util.read_json(out / "config.json")["zoom"]
    share = np.clip(base + slope * (1 - side), 0, 1)
    parts = [pd.read_csv(runs / name / "test_predictions.csv") for name in ("resnet", "cropnet")]
    expected = sum(
        w * part.groupby("fold")["prob"].rank(pct=True).to_numpy().reshape(2, 4)
        for w, part in zip((1 - share, share), parts, strict=True)
    )
    found = pd.read_csv(out / "test_predictions.csv")["prob"].to_numpy().reshape(2, 4)
    assert np.allclose(found, expected)
    with pytest.raises(InputError, match="runs on whole images with runs on crops"):
        blend(runs, "zoom", "--runs", "resnet", "chipnet", name="c")


def test_single_fold_is_cross_fitted_by_halves(runs):
    for name in ("resnet", "cropnet", "chipnet"):
        for file in ("oof.csv", "test_predictions.csv"):
            table = pd.read_csv(runs / name / file, dtype={"image_name": str})
            table[table["fold"] == 0].to_csv(runs / name / file, index=False)
    out = blend(runs, "weights", "--runs", "resnet", "cropnet")
    assert set(oof(out)["fold"]) == {0}
    assert util.read_json(out / "metrics.json")["learned"]["gain_interval"] is not None


def spoil(runs, name, change):
    table = oof(runs / name)
    change(table).to_csv(runs / name / "oof.csv", index=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[1:], "only chipnet predicts 0000"),
        (lambda t: t.assign(fold=1 - t["fold"]), "do not match"),
        (lambda t: t.assign(target=1 - t["target"]), "do not match"),
        (lambda t: t.assign(prob=np.nan), r"prob of 0000 is .nan.; it must be a number"),
        (lambda t: t.drop(columns="prob"), "no column 'prob'"),
        (lambda t: pd.concat([t, t[:1]]), "do not match|more than once"),
    ],
)
def test_runs_that_do_not_match_are_refused(runs, change, words):
    spoil(runs, "resnet", change)
    with pytest.raises(InputError, match=words):
        blend(runs, "mean")
    assert not (runs / "b").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--runs", "nothing"], "nothing"),
        (["--runs", "resnet", "resnet"], "once"),
        (["--weights", "resnet"], "NAME=NUMBER"),
        (["--weights", "other=1"], "the runs are"),
        (["--weights", "resnet=-1"], "positive"),
    ],
)
def test_bad_words(runs, more, words):
    with pytest.raises(InputError, match=words):
        blend(runs, "mean", *more)


def test_runs_of_other_data_are_refused(runs):
    config = util.read_json(runs / "resnet" / "config.json")
    config["data"]["folds_sha256"] = "other"
    util.write_json(runs / "resnet" / "config.json", config)
    with pytest.raises(InputError, match="other data or folds"):
        blend(runs, "mean")
    with pytest.raises(InputError, match="trained on other folds than"):
        blend(runs, "mean", "--runs", "resnet")


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        blend(tmp_path, "mean")
