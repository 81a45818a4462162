"""Joining and blending runs."""

import shutil

import numpy as np
import pytest
from conftest import call, change, read, rewrite

import blends
import ensemble
from blends import BLENDS, learn_weights
from plumbing.files import read_json
from scores import auc, rank_among, rank_in_fold
from tasks import Binary, MultiClass, MultiLabel, Regression
from util import InputError

BINARY = Binary(("1",), "auc")
SQUARE = (lambda task, prob, history: prob**2), (lambda task, average, history: np.sqrt(average))
NAMES, OOF, TEST = ("chipnet", "cropnet", "resnet"), "oof.csv", "test_predictions.csv"


def blend(runs, mode, *more, name="b"):
    return call("ensemble", mode, "--runs_dir", runs, "--name", name, *more)


def test_blends_average_by_weights_and_nest(runs, monkeypatch):
    probs = {name: np.column_stack([read(runs / run / name)["prob"] for run in NAMES]) for name in (OOF, TEST)}
    out = blend(runs, "mean", "--weights", "resnet=3", "cropnet=1")
    assert [member["weight"] for member in read_json(out / "config.json")["members"]] == [0, 0.25, 0.75]
    assert read(out / "submission.csv")["image_name"].tolist() == ["0027", "0026", "0025", "0024"]
    nested = blend(runs, "mean", "--runs", "b", "chipnet", name="nested")
    monkeypatch.setitem(blends.BLENDS, "square", blends.Blend(*SQUARE))  # one row
    logit, square = (blend(runs, mode, name=mode) for mode in ("logit", "square"))
    for name, prob in probs.items():
        assert np.allclose(read(out / name)["prob"], prob @ [0, 0.25, 0.75])
        assert np.allclose(read(nested / name)["prob"], prob @ [0.5, 0.125, 0.375])
        assert np.allclose(read(square / name)["prob"], np.sqrt((prob**2).mean(axis=1)))
        assert np.allclose(read(logit / name)["prob"], 1 / (1 + np.exp(-np.log(prob / (1 - prob)).mean(axis=1))))
    rewrite(runs / "resnet" / OOF, lambda table: table.sample(frac=1, random_state=0))  # rows are joined by image
    again = blend(runs, "mean", "--weights", "resnet=3", "cropnet=1", name="again")
    assert np.allclose(read(again / OOF)["prob"], read(out / OOF)["prob"])
    default = read_json(runs / "ensemble" / "config.json")["members"]  # no blends unless they are named
    assert {member["run"] for member in default} == {f"../{name}" for name in NAMES}


def test_test_images_are_ranked_among_the_held_out_rows_of_their_fold(runs):
    found = read(blend(runs, "rank") / TEST)
    tables = [(read(runs / name / OOF), read(runs / name / TEST)) for name in NAMES]
    for k in (0, 1):  # and so the same however many there are
        ranks = [rank_among(*(table["prob"][table["fold"] == k].to_numpy() for table in pair)) for pair in tables]
        assert np.allclose(found["prob"][found["fold"] == k], np.mean(ranks, axis=0))


def test_cross_fitting_shows_no_gain_where_there_is_none_and_no_row_teaches_its_own_weights():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 400)
    good, noise = target + rng.normal(size=(2, 400)), rng.normal(size=400)
    weights = learn_weights(BINARY, np.column_stack([*good, noise])[..., None], target[:, None])
    assert (weights.sum(), min(weights[:2]) > 0.3 > weights[2]) == (pytest.approx(1), True)
    rng, fold, learned = np.random.default_rng(0), np.arange(120) % 3, BLENDS["weights"]
    target, values = rng.integers(0, 2, (120, 1)), rng.uniform(size=(120, 20, 1))
    extra = np.empty((120, 0))
    outside = ensemble.cross_fit(learned, BINARY, values, extra, target, fold)
    inside = blends.average_of(values, learn_weights(BINARY, values, target))
    assert auc(target[:, 0], inside[:, 0]) > 0.62  # in-sample, noise looks good
    assert auc(target[:, 0], rank_in_fold(outside, fold)[:, 0]) < 0.58
    other = np.where(fold[:, None] == 0, 1 - target, target)  # labels of part 0
    changed = ensemble.cross_fit(learned, BINARY, values, extra, other, fold)
    assert [(outside == changed)[fold == k].all() for k in range(3)] == [True, False, False]


def test_what_a_learned_blend_leaves_is_cross_fitted(runs):
    fold, target = (read(runs / "resnet" / OOF)[column].to_numpy() for column in ("fold", "target"))
    values = np.stack([rank_in_fold(read(runs / name / OOF)[["prob"]].to_numpy(), fold) for name in NAMES], axis=1)
    target = target[:, None]
    found = read(runs / "ensemble" / OOF)["prob"].to_numpy()
    for k in (0, 1):
        learned = learn_weights(BINARY, values[fold != k], target[fold != k])
        assert np.allclose(found[fold == k], values[fold == k, :, 0] @ learned)
    weights = [member["weight"] for member in read_json(runs / "ensemble" / "config.json")["members"]]
    assert np.allclose(weights, learn_weights(BINARY, values, target))  # for new images
    alone = read_json(blend(runs, "weights", "--runs", "resnet") / "metrics.json")
    assert alone["ranked"]["auc"] == read_json(runs / "resnet" / "metrics.json")["ranked"]["auc"]
    assert alone["learned"]["gain"] == 0
    for name in NAMES:  # of one fold alone, halves teach each other
        for table in (OOF, TEST):
            rewrite(runs / name / table, lambda t: t[t["fold"] == 0])
    half = blend(runs, "weights", name="half")
    assert read_json(half / "metrics.json")["learned"]["gain_interval"] is not None


def test_runs_that_do_not_match_and_odd_weights_are_refused(runs, tmp_path):
    for words in (["resnet"], ["other=1"], ["resnet=-1", "cropnet=2"], ["resnet=0"], ["resnet=nan"]):
        with pytest.raises(InputError, match="NAME=NUMBER.*chipnet, cropnet, resnet"):
            blend(runs, "mean", "--weights", *words)
    for edit in (lambda t: t[1:], lambda t: t.assign(fold=1 - t["fold"]), lambda t: t.assign(target=1 - t["target"]),
                 lambda t: t.assign(prob=np.nan), lambda t: t.drop(columns="prob")):  # fmt: skip
        shutil.copytree(runs / "resnet", runs / "other", dirs_exist_ok=True)
        rewrite(runs / "other" / OOF, edit)
        with pytest.raises(InputError, match="other"):
            blend(runs, "mean", "--runs", "chipnet", "resnet", "other")
        assert not (runs / "b").exists()
    with pytest.raises(InputError, match="nothing"):
        blend(tmp_path / "nothing", "mean")


def test_a_blend_made_anew_leaves_nothing_of_the_old_one(runs):
    words = ["--runs", "resnet", "cropnet"]
    out = blend(runs, "mean", *words)
    for name in words[1:]:  # as if there had been no test images
        change(runs / name / "metrics.json", lambda metrics: metrics.update(sha256={OOF: metrics["sha256"][OOF]}))
    blend(runs, "mean", *words, "--overwrite")
    assert not list(out.glob("*submission*")) + list(out.glob("test_*"))
    assert set(read_json(out / "metrics.json")["sha256"]) == {OOF}
    with pytest.raises(InputError, match="cropnet"):  # chipnet alone has test predictions
        blend(runs, "mean", "--runs", "cropnet", "chipnet", name="c")


@pytest.mark.parametrize("with_features", [False, True])
def test_a_stack_is_boosted_on_the_rows_of_other_folds_and_predicts_new_images(runs, source, tmp_path, with_features):
    words = ["--runs", "resnet", "chipnet", "--meta_cols", "sex"]
    if with_features:
        call("features", "--run", runs / "chipnet", "--output_dir", tmp_path / "f", "--t_class", 0, "--device", "cpu")
        words += ["--features", tmp_path / "f"]
    out = blend(runs, "stack", *words)
    with np.load(out / "stack.npz") as file:
        values, extra, target = (file[key] for key in ("values", "extra", "target"))
    oof, fold = read(out / OOF), read(out / OOF)["fold"].to_numpy()
    assert extra.shape == (24, 4 + 128 * with_features)  # of sex two words, unknown, missing
    assert np.allclose(values[:, 0, 0], rank_in_fold(read(runs / "resnet" / OOF)[["prob"]].to_numpy(), fold)[:, 0])
    if with_features:
        assert np.allclose(extra[:, 4:], np.load(tmp_path / "f" / "train.npy"))
    for k in (0, 1):
        model = blends.Boosted(BINARY, values[fold != k], extra[fold != k], target[fold != k])
        assert np.allclose(oof["prob"][fold == k], model(values[fold == k], extra[fold == k])[:, 0])
    assert read_json(out / "metrics.json")["learned"]["gain_interval"] is not None
    shutil.rmtree(tmp_path / "f", ignore_errors=True)  # the run holds all that it needs
    images = ["--csv", source / "test.csv", "--no-pictures", "--device", "cpu", source / "images"]
    found = read(call("predict", "--run", out, "--output", tmp_path / "out", *images) / "predictions.csv")
    expected = read(out / TEST).groupby("image_name")["prob"].mean()
    found = found.set_index("image_name")["prob"][expected.index]
    assert np.allclose(found, expected, atol=1e-3)


def test_a_stack_boosts_every_kind_of_target():
    rng = np.random.default_rng(0)
    signal, extra = rng.normal(size=(200, 1)), np.full((200, 1), np.nan)
    classes = MultiClass(("a", "b", "c"), "auc")
    target = np.digitize(signal, [-0.5, 0.5]).astype(float)
    prob = rng.uniform(size=(200, 2, 3))
    prob[:, 0, 0] = signal[:, 0]
    found = blends.Boosted(classes, prob, extra, target)(prob, extra)
    assert (found.argmax(axis=1) == target[:, 0]).mean() > 0.95
    assert np.allclose(found.sum(axis=1), 1)
    labels = np.concatenate([signal > 0, signal < 0.5, np.ones((200, 1))], axis=1).astype(float)  # the last is constant
    labels[:50, 0] = np.nan
    found = blends.Boosted(MultiLabel(("a", "b", "c"), "auc"), prob, extra, labels)(prob, extra)
    assert ((found[50:] > 0.5) == labels[50:]).all(axis=1).mean() > 0.95
    quantity = Regression(("q",), "mae")
    found = blends.Boosted(quantity, prob[:, :, :1], extra, signal)(prob[:, :, :1], extra)
    assert np.abs(found - signal).mean() < 0.2


def test_a_stack_takes_features_of_its_own_runs_alone(runs, tmp_path):
    call("features", "--run", runs / "chipnet", "--output_dir", tmp_path / "f", "--t_class", 0, "--device", "cpu")
    for words, says in ((["--runs", "resnet", "cropnet"], "features.py"), (["--weights", "resnet=1"], "--weights")):
        with pytest.raises(InputError, match=says):
            blend(runs, "stack", "--features", tmp_path / "f", *words)
    with pytest.raises(InputError, match="--features"):
        blend(runs, "mean", "--features", tmp_path / "f")
    assert not (runs / "b").exists()
