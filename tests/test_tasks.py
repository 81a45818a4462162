"""Targets, scores, their intervals, and ranks."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import tasks
import train
from util import FOLD, ID, PROB, TARGET, InputError


# ---------------------------------------------------------------- targets
def target_of(*values, positive=None):
    table = pd.DataFrame({ID: [f"im{i}" for i in range(len(values))], TARGET: values})
    return tasks.read_target(table, "t.csv", positive).tolist()


@pytest.mark.parametrize("values", [(0, 1), (0.0, 1.0), (False, True), ("0", "1")])
def test_targets_are_read_from_any_spelling_of_0_and_1(values):
    assert target_of(*values) == [0, 1]


@pytest.mark.parametrize("value", [None, 2, 0.5, np.inf, "benign"])
def test_other_targets_are_refused_by_row(value):
    with pytest.raises(InputError, match=rf"t\.csv.*im1.*'{'nan' if value is None else value}'.*; "):
        target_of(0, value, 1)


def test_one_label_of_several_can_be_the_positive_one():
    labels = ["benign", "malignant", "benign", "scar"]
    assert target_of(*labels, positive="malignant") == [0, 1, 0, 0]
    assert target_of(0, 1, 2, positive="2") == [0, 0, 1]
    with pytest.raises(InputError, match=r"(?=.*binary)(?=.*--positive)(?=.*malignant)(?=.*scar)"):
        target_of(*labels)  # says that more than two classes are too many, and how to reduce them
    with pytest.raises(InputError, match="im1"):
        target_of("benign", None, positive="benign")  # a missing label is no negative one


# ---------------------------------------------------------------- scores
def test_weighted_auc_is_sklearns_with_ties_and_weights():
    rng = np.random.default_rng(0)
    target, prob = rng.integers(0, 2, 200), rng.integers(0, 12, 200) / 12
    weight = rng.integers(0, 3, 200)
    expected = roc_auc_score(target, prob, sample_weight=weight)
    assert tasks.weighted_auc(target, prob, weight) == pytest.approx(expected, abs=1e-12)
    assert tasks.Ranked(target, prob).auc() == pytest.approx(roc_auc_score(target, prob), abs=1e-12)
    assert np.isnan(tasks.weighted_auc(np.ones(3), prob[:3]))
    assert np.isnan(tasks.weighted_auc(target, prob, target))  # no negative was drawn


def test_a_prediction_that_is_not_a_number_never_wins():
    assert np.isnan(auc := tasks.weighted_auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, np.nan])))
    assert not train.Progress(best_epoch=1, best_valid_auc=0.5).note({"epoch": 2, "valid_auc": auc, "seconds": 1})


def test_partial_auc_is_the_area_above_80_percent_sensitivity():
    target = np.array([0, 0, 1, 1])
    assert tasks.partial_auc(target, np.array([0.1, 0.2, 0.8, 0.9])) == pytest.approx(0.2)
    assert tasks.partial_auc(target, np.array([0.9, 0.8, 0.2, 0.1])) == pytest.approx(0, abs=1e-9)
    assert tasks.partial_auc(target, np.full(4, 0.5)) == pytest.approx(0.02)


def test_interval_covers_the_auc_and_widens_with_groups():
    rng = np.random.default_rng(1)
    target = np.repeat(rng.integers(0, 2, 60), 5)  # five like images a patient
    prob = np.repeat(rng.normal(size=60), 5) + target
    rows, groups = np.arange(300), np.repeat(np.arange(60), 5)
    alone, together = (tasks.auc_interval(target, prob, g) for g in (rows, groups))
    weights = next(tasks.bootstrap_weights(groups)).reshape(60, 5)
    assert (weights == weights[:, :1]).all()  # a patient is drawn whole
    assert weights.sum() == 300
    assert together[0] < alone[0] < roc_auc_score(target, prob) < alone[1] < together[1]


def test_scores_of_folds_with_their_mean():
    prob = np.array([0.1, 0.9, 0.2, 0.8, 0.7, 0.3, 0.6, 0.5])
    oof = pd.DataFrame({ID: list("abcdefgh"), FOLD: [0, 0, 0, 0, 2, 2, 2, 2], TARGET: [0, 1] * 4, PROB: prob})
    scores = tasks.score_folds(oof, pd.Series(range(8), index=list("abcdefgh")), [0, 2])
    assert [(fold["fold"], fold["rows"], fold["positives"]) for fold in scores["folds"]] == [(0, 4, 2), (2, 4, 2)]
    assert [fold["auc"] for fold in scores["folds"]] == [1.0, 0.0]
    assert scores["mean_auc"] == 0.5
    assert scores["pooled"]["auc"] == pytest.approx(roc_auc_score(oof[TARGET], prob))
    assert scores["ranked"]["auc"] == pytest.approx(roc_auc_score(oof[TARGET], tasks.rank_in_fold(prob, oof[FOLD])))
    assert set(tasks.score(np.zeros(3, int), np.arange(3.0), np.arange(3)).values()) == {3, 0, None}  # of one class


# ---------------------------------------------------------------- ranks and rows
def test_a_rank_is_the_share_of_predictions_below():
    history = np.array([0.4, 0.1, 0.2, 0.2])
    assert tasks.rank_among(history, np.array([0.0, 0.2, 0.3, 0.4, 1.0])).tolist() == [0, 0.5, 0.75, 0.875, 1]
    prob, fold = np.array([0.1, 0.9, 0.8, 0.2]), np.array([0, 0, 1, 1])
    assert tasks.rank_in_fold(prob, fold).tolist() == [0.25, 0.75, 0.75, 0.25]


def test_a_dry_run_takes_the_first_rows_of_both_classes():
    target, rows = np.array([0, 0, 0, 1, 0, 1, 1]), np.array([1, 2, 3, 4, 6])
    assert tasks.pick_rows(target, rows, None).tolist() == [1, 2, 3, 4, 6]
    assert tasks.pick_rows(target, rows, 2).tolist() == [1, 2, 3, 6]
