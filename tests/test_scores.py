"""Scores, their intervals, and ranks."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import scores
import tasks
import train
from util import FOLD, ID, PROB, TARGET

BINARY = tasks.Binary(("1",), "auc")


# ---------------------------------------------------------------- scores
def test_scores_under_weights_are_sklearns_with_ties():
    rng = np.random.default_rng(0)
    target, prob = rng.integers(0, 2, 200), rng.integers(0, 12, 200) / 12
    weight = rng.integers(0, 3, 200)
    expected = roc_auc_score(target, prob, sample_weight=weight)
    ranked = scores.Ranked(target, prob)
    assert ranked.auc(weight) == pytest.approx(expected, abs=1e-12)
    assert ranked.auc() == pytest.approx(roc_auc_score(target, prob), abs=1e-12)
    expected = average_precision_score(target, prob, sample_weight=weight)
    assert ranked.average_precision(weight) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(scores.auc(np.ones(3), prob[:3]))
    assert np.isnan(ranked.auc(target))  # no negative was drawn
    assert np.isnan(ranked.average_precision(target))
    for name in ("auc", "ap", "f1"):  # a row of weight 2 is there twice
        metric, both = scores.OF_LABELS[name], (target[:, None].astype(float), prob[:, None])
        twice = metric.of(*(np.repeat(part, weight, axis=0) for part in both))
        assert metric.resampled(*both)(weight) == pytest.approx(twice, abs=1e-12)


def test_a_prediction_that_is_not_a_number_never_wins():
    target, prob = np.array([[0], [0], [1], [1]]), np.array([[0.1], [0.2], [0.3], [np.nan]])
    assert np.isnan(auc := tasks.main_score(BINARY, target, prob))
    assert not train.Progress(best_epoch=1, best_score=0.5).note({"epoch": 2, "seconds": 1}, auc)


def test_partial_auc_is_the_area_above_80_percent_sensitivity():
    target = np.array([0, 0, 1, 1])
    assert scores.partial_auc(target, np.array([0.1, 0.2, 0.8, 0.9])) == pytest.approx(0.2)
    assert scores.partial_auc(target, np.array([0.9, 0.8, 0.2, 0.1])) == pytest.approx(0, abs=1e-9)
    assert scores.partial_auc(target, np.full(4, 0.5)) == pytest.approx(0.02)


def test_interval_covers_the_auc_and_widens_with_groups():
    rng = np.random.default_rng(1)
    target = np.repeat(rng.integers(0, 2, 60), 5)  # five like images a patient
    prob = np.repeat(rng.normal(size=60), 5) + target
    rows, groups = np.arange(300), np.repeat(np.arange(60), 5)
    both = target[:, None], prob[:, None]
    alone, together = (tasks.score(BINARY, *both, g)["auc_interval"] for g in (rows, groups))
    weights = next(scores.bootstrap_weights(groups)).reshape(60, 5)
    assert (weights == weights[:, :1]).all()  # a patient is drawn whole
    assert weights.sum() == 300
    assert together[0] < alone[0] < roc_auc_score(target, prob) < alone[1] < together[1]


def test_scores_of_folds_with_their_mean():
    prob = np.array([0.1, 0.9, 0.2, 0.8, 0.7, 0.3, 0.6, 0.5])
    oof = pd.DataFrame({ID: list("abcdefgh"), FOLD: [0, 0, 0, 0, 2, 2, 2, 2], TARGET: [0, 1] * 4, PROB: prob})
    found = tasks.score_folds(BINARY, oof, pd.Series(range(8), index=list("abcdefgh")), [0, 2])
    assert [(fold["fold"], fold["rows"], fold["positives"]) for fold in found["folds"]] == [(0, 4, 2), (2, 4, 2)]
    assert [fold["auc"] for fold in found["folds"]] == [1.0, 0.0]
    assert found["mean_auc"] == 0.5
    assert found["pooled"]["auc"] == pytest.approx(roc_auc_score(oof[TARGET], prob))
    ranks = scores.rank_in_fold(prob[:, None], oof[FOLD])
    assert found["ranked"]["auc"] == pytest.approx(roc_auc_score(oof[TARGET], ranks))
    alone = tasks.score(BINARY, np.zeros((3, 1)), np.arange(3.0)[:, None], np.arange(3))  # of one class
    assert (alone["auc"], alone["auc_interval"], alone["positives"]) == (None, None, 0)


# ---------------------------------------------------------------- ranks and rows
def test_a_rank_is_the_share_of_predictions_below():
    history = np.array([0.4, 0.1, 0.2, 0.2])
    assert scores.rank_among(history, np.array([0.0, 0.2, 0.3, 0.4, 1.0])).tolist() == [0, 0.5, 0.75, 0.875, 1]
    prob, fold = np.array([0.1, 0.9, 0.8, 0.2]), np.array([0, 0, 1, 1])
    assert scores.rank_in_fold(prob[:, None], fold)[:, 0].tolist() == [0.25, 0.75, 0.75, 0.25]


def test_a_dry_run_takes_the_first_rows_of_both_classes():
    target, rows = np.array([0, 0, 0, 1, 0, 1, 1]), np.array([1, 2, 3, 4, 6])
    assert tasks.pick_rows(target, rows, None).tolist() == [1, 2, 3, 4, 6]
    assert tasks.pick_rows(target, rows, 2).tolist() == [1, 2, 3, 6]
