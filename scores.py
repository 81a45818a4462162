"""How predictions are judged: ranks, metrics, and their intervals over groups.

A new metric is a row of one of the tables at the end. Arrays: target (N, T), NaN if unknown; prob (N, K).

References:
    Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 1997: why rows of a patient are
    resampled together.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

MIN_TPR = 0.8  # the ISIC 2024 score: area under the ROC curve above this sensitivity
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_ROWS = 40_000_000  # resampled in total at most; above 40,000 rows there are fewer samples
FEWEST_SAMPLES = 200


# ---------------------------------------------------------------- ranks and resampling
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
        """Area under the ROC curve with row weights (N,), ties counted half; NaN if one class only, or a NaN."""
        weight = np.broadcast_to(weight, self.order.shape)[self.order]
        negatives = np.concatenate([[0.0], np.cumsum(weight * self.negative)])  # weight of the first rows
        positive = weight[self.positives]
        pairs = positive.sum() * negatives[-1]
        won = positive @ (negatives[self.below] + negatives[self.not_above]) / 2
        return float(won / pairs) if pairs > 0 and self.defined else float("nan")

    def average_precision(self, weight: np.ndarray | float = 1.0) -> float:
        """Mean precision at the positives with row weights (N,); NaN as for the AUC."""
        weight = np.broadcast_to(weight, self.order.shape)[self.order]
        above = [part.sum() - np.concatenate([[0.0], np.cumsum(part)])[self.below]
                 for part in (weight, weight * ~self.negative)]  # fmt: skip
        positive = weight[self.positives]
        both = 0 < positive.sum() < weight.sum() and self.defined
        return float(positive @ (above[1] / np.maximum(above[0], 1e-30)) / positive.sum()) if both else float("nan")


def rank_among(history: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """Share of `history` (H,) below each prediction (N,), ties counted half: 0 to 1."""
    history = np.sort(history)
    return (np.searchsorted(history, prob) + np.searchsorted(history, prob, side="right")) / (2 * len(history))


def rank_columns(history: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """rank_among of every column: history (H, K), prob (N, K)."""
    return np.column_stack([rank_among(old, new) for old, new in zip(history.T, prob.T, strict=True)])


def rank_in_fold(prob: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Rank of every prediction (N, K) among those of its fold, since networks of different folds are calibrated
    differently."""
    ranks = np.empty(prob.shape)
    for k in np.unique(fold):
        ranks[fold == k] = rank_columns(prob[fold == k], prob[fold == k])
    return ranks


def bootstrap_weights(group: np.ndarray) -> Iterator[np.ndarray]:
    """Row weights (N,) of bootstrap samples that draw whole groups, since rows of a group are alike."""
    rng = np.random.default_rng(0)
    code, names = pd.factorize(group)
    for _ in range(min(BOOTSTRAP_SAMPLES, max(FEWEST_SAMPLES, BOOTSTRAP_ROWS // len(group)))):
        yield np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[code]


def interval(values: list[float]) -> list[float]:
    """The middle 95 % of bootstrap values."""
    return [float(bound) for bound in np.nanquantile(values, [0.025, 0.975])]


# ---------------------------------------------------------------- classes of a quantity
def bands_of(value, cuts):
    """Class of every value (an array or a tensor) between cuts: 0 up to the first one, the last from its cut on, as
    clinics sort polyps (up to 5 mm, between, 10 mm and more)."""
    return sum((value > cut) * 1 for cut in cuts[:-1]) + (value >= cuts[-1]) * 1


def find_cut(above: np.ndarray, value: np.ndarray) -> float:
    """Threshold on predicted values (n,) that tells best which rows are above a cut, bool (n,): by macro F1."""
    order = np.argsort(value, kind="stable")
    value, hits = value[order], np.concatenate([[0], np.cumsum(above[order])])
    below, n = np.arange(len(value) + 1), len(value)  # the first so many rows are taken for below
    f1 = 2 * (hits[-1] - hits) / np.maximum(hits[-1] + n - below, 1)
    f1 = f1 + 2 * (below - hits) / np.maximum(n - hits[-1] + below, 1)
    edges = np.concatenate([[value[0]], (value[1:] + value[:-1]) / 2, [np.nextafter(value[-1], np.inf)]])
    apart = np.concatenate([[True], value[1:] > value[:-1], [True]])
    return float(edges[np.argmax(np.where(apart, f1, -1))])


def confusion(true: np.ndarray, taken: np.ndarray, classes: int, weight=None) -> np.ndarray:
    """Rows of every true class that are taken for each (classes, classes), or the sum of their weights."""
    return np.bincount(true * classes + taken, weight, minlength=classes**2).reshape(classes, classes)


def of_confusion(counts: np.ndarray) -> dict[str, float]:
    """Scores of a confusion matrix: F1 as the mean of classes and weighted by their rows, balanced accuracy, accuracy.
    """
    rows, right = counts.sum(axis=1), counts.diagonal()
    there, known = rows + counts.sum(axis=0) > 0, rows > 0
    f1 = 2 * right / np.maximum(rows + counts.sum(axis=0), 1e-30)
    return {
        "f1": float(f1[there].mean()),
        "f1_weighted": float(f1 @ rows / rows.sum()),
        "balanced_accuracy": float((right[known] / rows[known]).mean()),
        "accuracy": float(right.sum() / rows.sum()),
    }


def decide_bands(cuts: tuple, target: np.ndarray, value: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, list, bool]:
    """(class that each predicted value (N,) is taken for, thresholds on predictions learned from all rows, whether they
    were learned). The thresholds of a fold are learned from the other folds; of a single fold they are the cuts."""
    band = bands_of(target, cuts)

    def learn(rows: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate([find_cut(band[rows] > j, value[rows]) for j in range(len(cuts))])

    if len(np.unique(fold)) == 1:
        return bands_of(value, cuts), list(cuts), False
    taken = np.empty(len(value), dtype=int)
    for k in np.unique(fold):
        taken[fold == k] = (value[fold == k, None] >= learn(fold != k)).sum(axis=1)
    return taken, learn(np.full(len(fold), True)).tolist(), True


def score_bands(cuts: tuple, target: np.ndarray, value: np.ndarray, group: np.ndarray, fold: np.ndarray) -> dict:
    """Scores of predicted values (N,) as classes of the true ones (N,) between cuts, and of every cut alone, beside
    those of always saying the commonest class; `f1` with its 95 % interval over groups."""
    band, (taken, thresholds, learned) = bands_of(target, cuts), decide_bands(cuts, target, value, fold)
    views = {", ".join(f"{cut:g}" for cut in cuts): (band, taken, len(cuts) + 1)}
    views |= {f"{cut:g}": (1 * (band > j), 1 * (taken > j), 2) for j, cut in enumerate(cuts)}
    found = {"thresholds": thresholds, "learned": learned}
    for name, (true, guess, classes) in views.items():
        counts = confusion(true, guess, classes)
        constant = confusion(true, np.full_like(true, counts.sum(axis=1).argmax()), classes)
        again = [of_confusion(confusion(true, guess, classes, weight))["f1"] for weight in bootstrap_weights(group)]
        found[name] = of_confusion(counts) | {"f1_interval": interval(again), "confusion": counts.tolist()}
        found[name] |= {f"{key}_of_baseline": score for key, score in of_confusion(constant).items()}
    return found


# ---------------------------------------------------------------- scores
def known_labels(target: np.ndarray, prob: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(column, which rows are known, their target, their prediction) of every label or class with both yes and no."""
    labels = target if target.shape == prob.shape else target == np.arange(prob.shape[1])
    for column in range(prob.shape[1]):
        known = ~np.isnan(labels[:, column].astype(float))
        label = labels[known, column].astype(int)
        if 0 < label.sum() < known.sum():
            yield column, known, label, prob[known, column]


def mean_over_labels(score: Callable) -> Callable:
    """Mean of a score of one label (target (n,), prob (n,)) over the labels with yes and no among them, or NaN."""

    def mean(target: np.ndarray, prob: np.ndarray) -> float:
        values = [score(label, values) for *_, label, values in known_labels(target, prob)]
        return float(np.mean(values)) if values else float("nan")

    return mean


def auc(target: np.ndarray, prob: np.ndarray) -> float:
    """Area under the ROC curve of one label; NaN if one class only, or a NaN prediction."""
    return Ranked(target, prob).auc()


def average_precision(target: np.ndarray, prob: np.ndarray) -> float:
    """Average precision of one label; NaN as for the AUC."""
    return Ranked(target, prob).average_precision()


def partial_auc(target: np.ndarray, prob: np.ndarray, min_tpr: float = MIN_TPR) -> float:
    """Area under the ROC curve above `min_tpr` sensitivity, 0 to 1 - min_tpr. The score of ISIC 2024: with classes and
    scores flipped, sensitivity becomes specificity."""
    from sklearn.metrics import roc_auc_score

    f = 1 - min_tpr
    standardised = roc_auc_score(1 - target, -prob, max_fpr=f)
    return float(f**2 / 2 + (f - f**2 / 2) / 0.5 * (standardised - 0.5))


def log_loss(target: np.ndarray, prob: np.ndarray) -> float:
    """Cross-entropy of one label, or of classes (n, 1) with prob (n, K)."""
    safe = np.clip(prob, 1e-7, 1 - 1e-7)
    if prob.ndim == 1:
        return float(-np.log(np.where(target == 1, safe, 1 - safe)).mean())
    return float(-np.log(safe[np.arange(len(target)), target[:, 0].astype(int)]).mean())


def of_decision(name: str, **options) -> Callable:
    """A score of scikit-learn for decisions: one label at 1/2, or of classes the likeliest."""

    def score(target: np.ndarray, prob: np.ndarray) -> float:
        from sklearn import metrics

        decision = prob.argmax(axis=1) if prob.ndim == 2 else (prob >= 0.5).astype(int)
        with warnings.catch_warnings(action="ignore"):  # a class that only predictions have
            return float(getattr(metrics, name)(np.ravel(target).astype(int), decision, **options))

    return score


def kappa(target: np.ndarray, prob: np.ndarray) -> float:
    """Quadratic kappa of classes in order, also of those that are neither there nor predicted."""
    return of_decision("cohen_kappa_score", weights="quadratic", labels=range(prob.shape[1]))(target, prob)


def of_values(score: Callable) -> Callable:
    """A score of known quantities (n,) and predictions (n,); NaN if fewer than two are known."""

    def value(target: np.ndarray, prob: np.ndarray) -> float:
        known = ~np.isnan(target[:, 0])
        return float(score(target[known, 0], prob[known, 0])) if known.sum() > 1 else float("nan")

    return value


def spearman(target: np.ndarray, prob: np.ndarray) -> float:
    """Rank correlation; 0 if either is constant."""
    ranks = pd.Series(target).rank(), pd.Series(prob).rank()
    return 0.0 if min(part.nunique() for part in ranks) < 2 else float(np.corrcoef(*ranks)[0, 1])


def r2(target: np.ndarray, prob: np.ndarray) -> float:
    """Share of the variance explained."""
    return 1 - np.square(target - prob).sum() / max(np.square(target - target.mean()).sum(), 1e-30)


@dataclass(frozen=True)
class Metric:
    """A score of target (n, T) and prob (n, K). sign: -1 if less is better; ranks: it depends on the order of
    predictions alone; ordinal: it needs classes in order; baseline: its value for the best constant prediction."""

    of: Callable
    sign: int = 1
    ranked: Callable | None = None  # the same of one label as a method of Ranked
    ranks: bool = False
    ordinal: bool = False
    baseline: Callable | None = None

    def resampled(self, target: np.ndarray, prob: np.ndarray) -> Callable[[np.ndarray], float]:
        """Function of bootstrap weights (n,): the score with every row repeated so many times."""
        if self.ranked is None:
            return lambda weight: self.of(np.repeat(target, weight, axis=0), np.repeat(prob, weight, axis=0))
        parts = [(known, Ranked(*pair)) for _, known, *pair in known_labels(target, prob)]  # sorted once

        def score(weight: np.ndarray) -> float:
            values = np.array([self.ranked(part, weight[known]) for known, part in parts])
            return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")

        return score


OF_LABELS = {
    "auc": Metric(mean_over_labels(auc), ranked=Ranked.auc, ranks=True),
    "ap": Metric(mean_over_labels(average_precision), ranked=Ranked.average_precision, ranks=True),
    "pauc": Metric(mean_over_labels(partial_auc), ranks=True),
    "f1": Metric(mean_over_labels(of_decision("f1_score", zero_division=0))),
    "logloss": Metric(mean_over_labels(log_loss), sign=-1),
}
OF_CLASSES = {
    "auc": Metric(mean_over_labels(auc), ranked=Ranked.auc, ranks=True),
    "balanced_accuracy": Metric(of_decision("balanced_accuracy_score"), baseline=lambda t: 1 / len(np.unique(t))),
    "accuracy": Metric(
        of_decision("accuracy_score"), baseline=lambda t: np.unique(t, return_counts=True)[1].max() / len(t)
    ),
    "f1": Metric(of_decision("f1_score", average="macro", zero_division=0)),
    "kappa": Metric(kappa, ordinal=True),
    "logloss": Metric(log_loss, sign=-1),
}
OF_QUANTITIES = {
    "mae": Metric(of_values(lambda t, p: np.abs(t - p).mean()), -1, baseline=lambda t: np.abs(t - np.median(t)).mean()),
    "rmse": Metric(of_values(lambda t, p: np.sqrt(np.square(t - p).mean())), -1, baseline=np.std),
    "r2": Metric(of_values(r2)),
    "spearman": Metric(of_values(spearman), ranks=True),
}
