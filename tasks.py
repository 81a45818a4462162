"""What a target is and how predictions of it are judged: binary, 0 or 1, for now.

References:
    Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 1997: why rows of a patient are
    resampled together.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from util import FOLD, ID, PROB, TARGET, InputError

MIN_TPR = 0.8  # the ISIC 2024 score: area under the ROC curve above this sensitivity
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_ROWS = 40_000_000  # resampled in total at most; above 40,000 rows there are fewer samples
FEWEST_SAMPLES = 200


def read_target(table: pd.DataFrame, path: Path, positive: str | None = None) -> np.ndarray:
    """Targets of a table as int (N,), 1 for the value `positive` if that is given; InputError unless all are 0 or 1."""
    column = table[TARGET]
    if positive is not None:
        column = (column.astype(str) == positive).astype(float).where(column.notna())
    values = pd.to_numeric(column, errors="coerce")
    bad = ~values.isin([0, 1])
    if bad.any():
        row, found = table[bad].iloc[0], ", ".join(map(str, pd.unique(table[TARGET])[:5]))
        what = f"target of {row[ID]} is {str(row[TARGET])!r}, but targets are binary"
        raise InputError(f"{path}: {what}; write 0 or 1, or pass --positive with one of {found}")
    return values.to_numpy(dtype=int)


def pick_rows(target: np.ndarray, rows: np.ndarray, limit: int | None) -> np.ndarray:
    """Those rows, in order, or the first `limit` of each class among them."""
    if limit is None:
        return rows
    return np.sort(np.concatenate([rows[target[rows] == label][:limit] for label in (0, 1)]))


# ---------------------------------------------------------------- scores
def weighted_auc(target: np.ndarray, prob: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """Area under the ROC curve of weighted rows, ties counted half; NaN if one class only, or a NaN prediction."""
    return Ranked(target, prob).auc(weight)


class Ranked:
    """Rows (N,) sorted by prediction once, for the AUC under many weights."""

    def __init__(self, target: np.ndarray, prob: np.ndarray):
        self.defined = not np.isnan(prob).any()
        self.order = np.argsort(prob, kind="stable")
        ordered, positive = np.asarray(prob)[self.order], np.asarray(target)[self.order] > 0
        self.positives, self.negative = np.flatnonzero(positive), ~positive
        self.below = np.searchsorted(ordered, ordered[positive])  # rows with a lower prediction than each positive
        self.not_above = np.searchsorted(ordered, ordered[positive], side="right")

    def auc(self, weight: np.ndarray | float = 1.0) -> float:
        """AUC with row weights (N,)."""
        weight = np.broadcast_to(weight, self.order.shape)[self.order]
        negatives = np.concatenate([[0.0], np.cumsum(weight * self.negative)])  # weight of the first rows
        positive = weight[self.positives]
        pairs = positive.sum() * negatives[-1]
        won = positive @ (negatives[self.below] + negatives[self.not_above]) / 2
        return float(won / pairs) if pairs > 0 and self.defined else float("nan")


def bootstrap_weights(group: np.ndarray) -> Iterator[np.ndarray]:
    """Row weights (N,) of bootstrap samples that draw whole groups, since rows of a group are alike."""
    rng = np.random.default_rng(0)
    code, names = pd.factorize(group)
    for _ in range(min(BOOTSTRAP_SAMPLES, max(FEWEST_SAMPLES, BOOTSTRAP_ROWS // len(group)))):
        yield np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[code]


def interval(values: list[float]) -> list[float]:
    """The middle 95 % of bootstrap values."""
    return [float(bound) for bound in np.nanquantile(values, [0.025, 0.975])]


def auc_interval(target: np.ndarray, prob: np.ndarray, group: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the AUC over groups."""
    ranked = Ranked(target, prob)
    return interval([ranked.auc(weight) for weight in bootstrap_weights(group)])


def partial_auc(target: np.ndarray, prob: np.ndarray, min_tpr: float = MIN_TPR) -> float:
    """Area under the ROC curve above `min_tpr` sensitivity, 0 to 1 - min_tpr. The score of ISIC 2024: with classes and
    scores flipped, sensitivity becomes specificity."""
    from sklearn.metrics import roc_auc_score

    f = 1 - min_tpr
    standardised = roc_auc_score(1 - target, -prob, max_fpr=f)
    return float(f**2 / 2 + (f - f**2 / 2) / 0.5 * (standardised - 0.5))


def score(target: np.ndarray, prob: np.ndarray, group: np.ndarray) -> dict:
    """AUC with its 95 % interval, average precision and partial AUC; None if one class is missing."""
    from sklearn.metrics import average_precision_score

    result = {"rows": len(target), "positives": int(target.sum())}
    if not 0 < target.sum() < len(target):
        return result | dict.fromkeys(("auc", "auc_interval", "average_precision", "partial_auc"))
    return result | {
        "auc": weighted_auc(target, prob),
        "auc_interval": auc_interval(target, prob, group),
        "average_precision": float(average_precision_score(target, prob)),
        "partial_auc": partial_auc(target, prob),
    }


def rank_among(history: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """Share of `history` (H,) below each prediction (N,), ties counted half: 0 to 1."""
    history = np.sort(history)
    return (np.searchsorted(history, prob) + np.searchsorted(history, prob, side="right")) / (2 * len(history))


def rank_in_fold(prob: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Rank of every row among the rows of its fold, since networks of different folds are calibrated differently."""
    ranks = np.empty(len(prob))
    for k in np.unique(fold):
        ranks[fold == k] = rank_among(prob[fold == k], prob[fold == k])
    return ranks


def score_folds(oof: pd.DataFrame, group: pd.Series, folds: list[int]) -> dict:
    """Scores of held-out predictions: of every fold, their mean AUC, over all rows, and over ranks inside folds. group:
    of every image, by image_name."""
    groups, fold = group[oof[ID]].to_numpy(), oof[FOLD].to_numpy()
    target, prob = oof[TARGET].to_numpy(), oof[PROB].to_numpy()
    each = [{"fold": k, **score(target[fold == k], prob[fold == k], groups[fold == k])} for k in folds]
    return {
        "folds": each,
        "mean_auc": float(np.mean([part["auc"] for part in each])),
        "pooled": score(target, prob, groups),
        "ranked": score(target, rank_in_fold(prob, fold), groups),
    }
