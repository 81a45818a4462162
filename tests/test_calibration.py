"""Calibration and thresholds, and that no row teaches its own."""

import numpy as np
import pytest

import calibration
import tasks

BINARY = tasks.Binary(("1",), "auc")
CLASSES = tasks.MultiClass(("a", "b", "c"), "auc")


def biased(n=3000):
    """Predictions that are too sure and too high, as of focal loss and balanced sampling, and their true outcomes."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-2, 1, (n, 1))
    target = (rng.random((n, 1)) < 1 / (1 + np.exp(-logit))).astype(float)
    return target, 1 / (1 + np.exp(-(3 * logit + 2)))


def test_scale_and_bias_are_found_and_make_probabilities_true():
    target, prob = biased()
    fit = calibration.fit_calibration(BINARY, target, prob)
    assert fit["scale"] == pytest.approx(1 / 3, abs=0.06)
    assert fit["bias"][0] == pytest.approx(-2 / 3, abs=0.15)
    found = calibration.calibrate(BINARY, target, prob, np.arange(len(target)), np.arange(len(target)) % 3)
    assert found["before"]["ece"] > 0.1 > 0.03 > found["after"]["ece"]
    assert found["after"]["brier"] < found["before"]["brier"]
    order = np.argsort(calibration.calibrated(BINARY, prob, found)[:, 0], kind="stable")
    assert (np.diff(prob[order, 0]) >= 0).all()  # ranks, and so the AUC, stay


def test_classes_are_calibrated_together_and_sum_to_one():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=(2000, 3))
    true = np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    target = np.array([[rng.choice(3, p=p)] for p in true], float)
    sure = np.exp(4 * logit + [1, 0, 0])
    prob = sure / sure.sum(axis=1, keepdims=True)
    found = calibration.calibrate(CLASSES, target, prob, np.arange(2000), np.arange(2000) % 2)
    assert found["after"]["ece"] < 0.05 < found["before"]["ece"]
    assert np.allclose(calibration.calibrated(CLASSES, prob, found).sum(axis=1), 1)
    assert found["thresholds"] == {}


def test_thresholds_keep_their_promise_on_rows_they_did_not_learn_from():
    target, prob = biased()
    found = calibration.calibrate(BINARY, target, prob, np.arange(len(target)), np.arange(len(target)) % 3)
    for name, row in found["thresholds"]["1"].items():
        if name != "balanced_accuracy":
            assert row["sensitivity"] == pytest.approx(float(name.split()[1]), abs=0.06)
    best = found["thresholds"]["1"]["balanced_accuracy"]
    assert best["sensitivity"] + best["specificity"] > 1.3
    part = np.arange(len(target)) % 3
    flipped = np.where(part[:, None] == 0, 1 - target, target)  # labels of part 0 teach the others, not itself
    other = calibration.calibrate(BINARY, flipped, prob, np.arange(len(target)), part)
    assert other["after"]["ece"] > found["after"]["ece"]


def test_too_few_rows_and_quantities_have_no_calibration():
    target, prob = np.array([[0.0], [1.0]] * 9), np.full((18, 1), 0.5)
    assert calibration.calibrate(BINARY, target, prob, np.arange(18), np.arange(18) % 2) is None
    size = tasks.Regression(("size",), "mae")
    values, part = np.arange(40.0)[:, None], np.arange(40) % 2
    assert calibration.calibrate(size, values, values, np.arange(40), part) is None
    group = np.zeros(40)  # one patient: no half can teach the other
    target = np.arange(40.0)[:, None] % 2
    assert calibration.calibrate(BINARY, target, np.full((40, 1), 0.5), group, np.zeros(40)) is None
