"""From scores to probabilities: calibration and thresholds, learned from held-out predictions and cross-fitted.

A calibration is a scale and a bias per output on the logits: temperature scaling with the bias that balanced sampling
makes necessary. Thresholds of a label are those of the best balanced accuracy and of given sensitivities.

References:
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017: temperature, expected calibration error.
    Alexandari et al., Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation,
    ICML 2020: the bias.
"""

import numpy as np

from scores import known_labels
from tasks import Task, prob_of

BINS = 15  # of the expected calibration error
SENSITIVITIES = (0.8, 0.9, 0.95)
FIT_ROWS = 20_000  # that a calibration is fitted to at most
FEWEST = 10  # rows of every class, below which nothing is fitted


def parts_of(task: Task, target: np.ndarray, group: np.ndarray, fold: np.ndarray) -> np.ndarray | None:
    """Parts (N,) that teach each other: the folds, or if one fold alone was trained two halves with whole groups; None
    if a half would lack a class."""
    from sklearn.model_selection import StratifiedGroupKFold

    if len(np.unique(fold)) > 1:
        return fold
    part, strata = np.zeros(len(target), dtype=int), task.strata(target)
    try:
        part[next(StratifiedGroupKFold(2).split(strata, strata, group))[1]] = 1
    except ValueError:  # one group, or one row of each stratum
        pass
    whole = all((part == i).any() and task.members(target[part == i]).any(axis=0).all() for i in (0, 1))
    return part if whole else None


def calibrated(task: Task, prob: np.ndarray, fit: dict) -> np.ndarray:
    """Calibrated predictions (N, K)."""
    return prob_of(task, fit["scale"] * task.logit(prob) + np.array(fit["bias"]))


def fit_calibration(task: Task, target: np.ndarray, prob: np.ndarray) -> dict:
    """{"scale": a number, "bias": one per output} with the least log loss."""
    from scipy.optimize import minimize

    rows = np.random.default_rng(0).permutation(len(target))[:FIT_ROWS]
    goal, prob = task.goal(target[rows]), prob[rows]
    known = ~np.isnan(goal)

    def loss(x: np.ndarray) -> float:
        safe = np.clip(calibrated(task, prob, {"scale": np.exp(x[0]), "bias": x[1:]}), 1e-7, 1 - 1e-7)
        positive = np.where(known, goal, 0) * np.log(safe)
        negative = 0 if task.sums_to_1 else np.where(known, 1 - goal, 0) * np.log(1 - safe)
        return -(positive + negative).sum() / len(goal) + 1e-4 * np.square(x).sum()  # finite if classes are separable

    found = minimize(loss, np.zeros(1 + prob.shape[1]), method="BFGS").x
    return {"scale": float(np.exp(found[0])), "bias": found[1:].tolist()}


def calibration_error(task: Task, target: np.ndarray, prob: np.ndarray) -> dict:
    """Expected calibration error of the labels, or of the likeliest class, and the Brier score."""
    goal = task.goal(target)
    if task.sums_to_1:
        sure, right = prob.max(axis=1), prob.argmax(axis=1) == target[:, 0]
    else:
        sure, right = prob[~np.isnan(goal)], goal[~np.isnan(goal)]
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs((sure - right)[place == bin_].sum()) for bin_ in range(BINS)]
    return {"ece": float(sum(gaps) / len(sure)), "brier": float(np.nansum(np.square(prob - goal)) / len(goal))}


def find_thresholds(target: np.ndarray, prob: np.ndarray) -> dict[str, float]:
    """Thresholds of one label (n,) by what they are for: a prediction that reaches one is positive."""
    values = np.unique(prob)
    positive, negative = np.sort(prob[target == 1]), np.sort(prob[target == 0])
    sensitivity = 1 - np.searchsorted(positive, values) / len(positive)
    specificity = np.searchsorted(negative, values) / len(negative)
    found = {"balanced_accuracy": values[np.argmax(sensitivity + specificity)]}
    for wanted in SENSITIVITIES:
        found[f"sensitivity {wanted}"] = values[np.flatnonzero(sensitivity >= wanted)[-1]]
    return {name: float(value) for name, value in found.items()}


def cross_fitted_thresholds(target: np.ndarray, prob: np.ndarray, part: np.ndarray) -> dict[str, dict]:
    """Thresholds of one label learned from all rows, with the sensitivity and specificity that thresholds of the other
    parts have on each part."""
    found = {name: {"threshold": value} for name, value in find_thresholds(target, prob).items()}
    above = {name: np.zeros(len(prob), bool) for name in found}
    for label in np.unique(part):
        for name, value in find_thresholds(target[part != label], prob[part != label]).items():
            above[name][part == label] = prob[part == label] >= value
    for name, decided in above.items():
        found[name]["sensitivity"] = float(decided[target == 1].mean())
        found[name]["specificity"] = float((~decided)[target == 0].mean())
    return found


def calibrate(task: Task, target: np.ndarray, prob: np.ndarray, group: np.ndarray, fold: np.ndarray) -> dict | None:
    """Calibration and thresholds (by label) of held-out predictions, and what they are worth on rows they were not
    learned from; None for a quantity, or if a class has too few rows in a part."""
    known = ~np.isnan(target).all(axis=1)
    target, prob, group, fold = target[known], prob[known], group[known], fold[known]
    if not task.probabilistic or (task.members(target).sum(axis=0) < FEWEST).any():
        return None
    if (part := parts_of(task, target, group, fold)) is None:
        return None
    after = np.empty(prob.shape)
    for label in np.unique(part):
        fit = fit_calibration(task, target[part != label], prob[part != label])
        after[part == label] = calibrated(task, prob[part == label], fit)
    thresholds = {}
    for column, rows, label, values in () if task.sums_to_1 else known_labels(target, prob):
        if all(len(np.unique(label[part[rows] != k])) == 2 for k in np.unique(part)):
            thresholds[task.names[column]] = cross_fitted_thresholds(label, values, part[rows])
    return fit_calibration(task, target, prob) | {
        "before": calibration_error(task, target, prob),
        "after": calibration_error(task, target, after),
        "thresholds": thresholds,
    }
