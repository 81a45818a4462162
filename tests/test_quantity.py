"""Quantities with classes between cuts: strata, weights, losses, scores of images and cases, the report."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_MODEL, call, read
from sklearn import metrics

import losses
import scores
import tasks
from util import InputError

CUTS = (5.0, 10.0)
TASK = tasks.Regression(("size",), "mae", mean=7.0, std=4.0, cuts=CUTS)


@pytest.fixture(scope="module")
def polyps(source, tmp_path_factory):
    """The small images as frames of 12 lesions of 6 patients, with sizes."""
    folder = tmp_path_factory.mktemp("polyps")
    table = read(source / "train.csv")[["image_name", "target"]]
    row = np.arange(len(table))
    table["lesion_id"], table["patient_id"] = [f"l{i // 2}" for i in row], [f"p{i // 4}" for i in row]
    table["size_mm"], table["frame"] = np.array([3, 5, 7, 10, 4, 12, 2, 8, 15, 5, 6, 11])[row // 2], row % 2
    table.drop(columns="target").to_csv(folder / "train.csv", index=False)
    call("preprocess", "--train_csv", folder / "train.csv", "--image_dir", source / "images", "--target_col", "size_mm",
         "--cut", 5, 10, "--group_col", "lesion_id", "--size", 64, "--n_folds", 2,
         "--output_dir", folder / "data")  # fmt: skip
    return folder / "data"


def test_classes_between_cuts_are_the_clinics():
    for value in (np.array([0.5, 5, 5.1, 9.9, 10, 20]), torch.tensor([0.5, 5, 5.1, 9.9, 10, 20])):
        assert scores.bands_of(value, CUTS).tolist() == [0, 0, 1, 1, 2, 2]
    assert scores.bands_of(np.array([9.9, 10]), (10,)).tolist() == [0, 1]
    assert TASK.band_names == ["up to 5", "5 to 10", "from 10"]
    assert TASK.strata(np.array([[5.0], [np.nan], [10.0]])).tolist() == [1, 0, 3]
    assert tasks.task_of(json.loads(json.dumps(TASK.facts()))) == TASK
    old = {key: value for key, value in tasks.Binary(("1",), "auc").facts().items() if key != "cuts"}
    assert tasks.task_of(old) == tasks.Binary(("1",), "auc")  # runs of older versions


def test_scores_of_a_confusion_matrix_are_sklearns():
    rng = np.random.default_rng(0)
    true, taken = rng.integers(0, 3, 200), rng.integers(0, 2, 200)  # the last class is never predicted
    found = scores.of_confusion(scores.confusion(true, taken, 3))
    assert found["f1"] == pytest.approx(metrics.f1_score(true, taken, average="macro"))
    assert found["f1_weighted"] == pytest.approx(metrics.f1_score(true, taken, average="weighted"))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, taken))
    assert found["accuracy"] == pytest.approx((true == taken).mean())


def test_a_threshold_has_the_best_macro_f1_of_all():
    rng = np.random.default_rng(1)
    value = rng.normal(size=60).round(1)  # with ties
    above = value + rng.normal(size=60) > 0.8
    best = max(metrics.f1_score(above, value >= edge, average="macro") for edge in [*np.unique(value), 99])
    limit = scores.find_cut(above, value)
    assert metrics.f1_score(above, value >= limit, average="macro") == pytest.approx(best)
    assert not (value >= scores.find_cut(np.zeros(60, bool), value)).any()
    assert (value >= scores.find_cut(np.ones(60, bool), value)).all()


def test_thresholds_are_learned_from_the_other_folds():
    target = np.tile([3.0, 7.0, 12.0], 20)
    fold = np.repeat([0, 1], 30)
    found = scores.score_bands(CUTS, target, target / 2, np.arange(60), fold)  # predictions of half the size
    assert found["learned"]
    assert found["5, 10"]["f1"] == 1
    assert found["thresholds"] == [2.5, 4.75]
    assert found["5, 10"]["f1_of_baseline"] == pytest.approx(1 / 6)
    assert found["10"]["confusion"] == [[40, 0], [0, 20]]
    alone = scores.score_bands(CUTS, target, target / 2, np.arange(60), np.zeros(60))
    assert not alone["learned"]
    assert alone["thresholds"] == list(CUTS)
    assert alone["5, 10"]["f1"] < 0.5
    moved = np.where(fold == 1, target / 2, target)  # thresholds of the one fold are wrong for the other
    assert scores.score_bands(CUTS, target, moved, np.arange(60), fold)["5, 10"]["accuracy"] < 0.7


def test_cases_of_several_images():
    oof = pd.DataFrame({"image_name": list("abcdef"), "fold": [0, 0, 0, 1, 1, 1], "target": [1.0, 3, 2, 5, 5, 5],
                        "pred": [2.0, 9, 3, 4, 6, 7]})  # fmt: skip
    case = pd.Series(list("xxxyyz"), index=oof["image_name"])
    found = tasks.by_case(tasks.Regression(("mm",), "mae"), oof, case)
    assert found[["target", "pred"]].to_numpy().tolist() == [[2, 3], [5, 5], [5, 7]]
    binary = oof.assign(target=[1, 0, 1, 1, 1, 0], prob=[0.2, 0.4, 0.9, 0.5, 0.7, 0.1])
    found = tasks.score_folds(tasks.Binary(("1",), "auc"), binary, case, [0, 1], case=case)["cases"]
    assert (found["rows"], found["left_out"], found["auc"]) == (2, 1, 1.0)


def test_weights_of_sizes_act_on_millimetres():
    target = np.array([[3.0], [5.0], [7.0], [10.0], [30.0]])
    goal = torch.from_numpy(TASK.goal(target))
    for name in ("weighted", "smooth_l1", "cumulative"):
        plain = losses.loss_of(TASK, name, goal + 0.5, goal, torch.tensor([1.0]))
        heavy = losses.loss_of(TASK, name, goal + 0.5, goal, torch.tensor([1.0, 3.0, 5.0]))
        assert torch.allclose(heavy / plain, torch.tensor([1.0, 1.0, 3.0, 5.0, 5.0])), name


def test_the_weighted_loss_mixes_three():
    logit, goal = torch.tensor([[2.0], [0.2]]), torch.zeros(2, 1)
    assert losses.weighted_size_loss(logit, goal).ravel().tolist() == pytest.approx(
        [0.25 * 2 + 0.25 * 4 + 0.5 * 1.5, 0.25 * 0.2 + 0.25 * 0.04 + 0.5 * 0.02]
    )
    assert losses.weighted_size_loss(logit, goal, alpha=0, beta=0, gamma=1)[0].item() == pytest.approx(1.5)


def test_ordinal_cross_entropy_falls_on_the_right_side_of_every_cut():
    logit = torch.linspace(-2, 2, 401).unsqueeze(1)
    middles = []
    for size in (3.0, 7.0, 12.0):
        goal = torch.full_like(logit, (size - 7) / 4)
        loss = losses.loss_of(TASK, "cumulative", logit, goal, torch.tensor([1.0]))
        middles.append(TASK.prob(logit[loss.argmin(), 0]).item())
    assert middles[0] < 5 < middles[1] < 10 < middles[2]
    sure = losses.cumulative_loss(torch.zeros(1, 1), torch.ones(1, 1), cuts=(0.0,))
    assert sure.item() == pytest.approx(np.log(2))  # on the cut nothing is known


def test_preprocessing_keeps_sizes_in_proportion_and_says_what_lies_where(polyps, capsys):
    table = read(polyps / "train.csv")
    bands = scores.bands_of(table["target"].to_numpy(), CUTS)
    assert set(table.groupby("fold")["lesion_id"].nunique()) == {6}
    assert all(set(bands[table["fold"] == k]) == {0, 1, 2} for k in (0, 1))
    statistics = pd.read_csv(polyps / "statistics.csv")
    assert statistics["cases"].tolist() == [6, 6]
    assert statistics["cases up to 5"].sum() == 5
    assert statistics["images from 10"].sum() == 8
    assert statistics["greatest size_mm"].max() == 15


@pytest.mark.parametrize(("flags", "words"), [
    (["--group_col", "lesion_id"], "values of patient_id lie in several folds"), (["--group_col", "patient_id"], ""),
    (["--group_col", "none"], "values of lesion_id lie in several folds"),
    (["--case_col", "polyp"], "no column 'polyp'"), (["--cut", 10, 5], "--cut 10 5"), (["--cut", 5, 99], "in no row"),
    (["--cut", 5, "--task", "binary", "--positive", 5], "for quantities"),
])  # fmt: skip
def test_preprocessing_warns_or_refuses(polyps, source, tmp_path, capsys, flags, words):
    table = pd.read_csv(polyps / "train.csv", dtype=str).drop(columns=["fold", "width", "height"])
    table.rename(columns={"target": "size_mm"}).to_csv(tmp_path / "train.csv", index=False)
    words_of = ["--train_csv", tmp_path / "train.csv", "--image_dir", source / "images", "--target_col", "size_mm",
                "--cut", 5, 10, "--size", 64, "--n_folds", 2, "--output_dir", tmp_path / "data", *flags]  # fmt: skip
    try:
        call("preprocess", *words_of)
        said = capsys.readouterr().out
    except InputError as error:
        said = str(error)
    assert words in said
    assert ("warning" in said) == ("several folds" in words)


def test_a_training_scores_images_lesions_and_classes_and_reports_them(polyps, tmp_path):
    where = ["--data_dir", polyps, "--runs_dir", tmp_path, "--name", "size", "--augment", "square"]
    flags = ["--loss", "weighted", "--pos_weight", 1, 3, 5]
    run = call("train", "--model", "resnet", *where, *SMALL_MODEL, *flags)
    found = json.loads((run / "metrics.json").read_text())
    oof = read(run / "oof.csv")
    lesion = read(polyps / "train.csv").set_index("image_name")["lesion_id"].loc[oof["image_name"]].to_numpy()
    by = oof.groupby(lesion)[["target", "pred"]].median()
    assert found["cases"]["rows"] == 12
    assert found["cases"]["mae"] == pytest.approx((by["target"] - by["pred"]).abs().mean())
    assert np.array(found["bands"]["5, 10"]["confusion"]).sum() == 24
    assert np.array(found["cases"]["bands"]["5, 10"]["confusion"]).sum() == 12
    page = call("report", run).read_text()
    for words in ("Confusion matrix of cases", "Error over the images of cases", "Predictions by the true value",
                  "12 cases (lesion_id)", "f1_weighted"):  # fmt: skip
        assert words in page


def test_what_needs_cuts_says_so(polyps, source, data_dir, tmp_path):
    where = ["--runs_dir", tmp_path, *SMALL_MODEL]
    with pytest.raises(InputError, match="3: of up to 5, 5 to 10, from 10"):
        call("train", "--model", "resnet", "--data_dir", polyps, *where, "--pos_weight", 1, 2)
    with pytest.raises(InputError, match="cumulative is not for binary"):
        call("train", "--model", "resnet", "--data_dir", data_dir, *where, "--loss", "cumulative")
