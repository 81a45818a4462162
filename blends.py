"""How predictions of several runs become one: the rules of ensemble.py, which predict.py follows for new images.

A blend is a row of BLENDS: what is mixed, how the mixture becomes a prediction, and whether the mixing is learned.

References:
    Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004: forward selection with replacement.
    Wolpert, Stacked Generalization, Neural Networks 1992: a model on held-out predictions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scores import rank_columns
from tasks import Task, main_score, prob_of

SELECTION_STEPS = 25
# shallow and slow: held-out predictions are few and noisy. Chosen before it was tried on any data
BOOSTING = {"learning_rate": 0.05, "max_iter": 100, "max_leaf_nodes": 8, "min_samples_leaf": 20,
            "l2_regularization": 1.0, "max_features": 0.5, "early_stopping": False, "random_state": 0}  # fmt: skip


def average_of(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted average (N, K) of values (N, M, K)."""
    return np.einsum("nmk,m->nk", values, weights)


class Weighted:
    """The weighted average of values (n, M, K); weights (M,)."""

    def __init__(self, weights: np.ndarray):
        self.weights = weights

    def __call__(self, values: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
        """Mixture (n, K) of values; what else is known of the rows does not count."""
        return average_of(values, self.weights)


class Boosted:
    """Gradient boosting on values (n, M, K) and on what else is known of the rows (n, E), NaN where it is not. A model
    per label; of classes one."""

    def __init__(self, task: Task, values: np.ndarray, extra: np.ndarray, target: np.ndarray):
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        self.task, self.weights, self.models = task, np.full(values.shape[1], 1 / values.shape[1]), []
        inputs = np.concatenate([values.reshape(len(values), -1), extra], axis=1)
        self.known = ~np.isnan(inputs).all(axis=0)  # scikit-learn cannot bin what is known of no row
        kind = HistGradientBoostingClassifier if task.probabilistic else HistGradientBoostingRegressor
        for column in target.T:
            known = ~np.isnan(column)
            self.models.append(kind(**BOOSTING).fit(inputs[known][:, self.known], column[known]))

    def __call__(self, values: np.ndarray, extra: np.ndarray) -> np.ndarray:
        """Mixture (n, K)."""
        inputs = np.concatenate([values.reshape(len(values), -1), extra], axis=1)[:, self.known]
        if not self.task.probabilistic:
            return np.column_stack([model.predict(inputs) for model in self.models])
        prob = np.zeros((len(inputs), values.shape[2]))
        if self.task.sums_to_1:  # classes that a part lacks have no column
            prob[:, self.models[0].classes_.astype(int)] = self.models[0].predict_proba(inputs)
            return prob
        for column, model in enumerate(self.models):
            ones = np.flatnonzero(model.classes_ == 1)
            prob[:, column] = model.predict_proba(inputs)[:, ones[0]] if len(ones) else 0.0
        return prob


def learn_weights(task: Task, values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (M,) by greedy forward selection with replacement for the main score of values (N, M, K)."""
    counts = np.zeros(values.shape[1])
    best_counts, best = counts, -np.inf
    for step in range(SELECTION_STEPS):
        sums = average_of(values, counts)
        found = [main_score(task, target, (sums + values[:, m]) / (step + 1)) for m in range(len(counts))]
        counts = counts + np.eye(len(counts))[int(np.argmax(found))]
        if max(found) > best:  # a longer list must be better, not as good
            best_counts, best = counts, max(found)
    return best_counts / best_counts.sum() if best > -np.inf else np.full(len(counts), 1 / len(counts))  # undefined


def by_order(task: Task) -> bool:
    """Whether the order of predictions is all that a task is judged by, so that ranks may take their place."""
    return task.order_is_enough and task.metrics[task.metric].ranks


def value_of_rank(task: Task, rank: np.ndarray, history: np.ndarray) -> np.ndarray:
    """The prediction that has this rank in the history, if values matter; else the rank itself."""
    if by_order(task):
        return rank
    values = [np.quantile(old, new) for old, new in zip(history.T, rank.T, strict=True)]
    return prob_of(task, task.logit(np.column_stack(values)))


@dataclass(frozen=True)
class Blend:
    """A way to blend predictions (n, K) of the same fold's networks. `history` (H, K) are a member's predictions of the
    rows that the fold held out, and for `score` the members' average of these."""

    value: Callable = lambda task, prob, history: prob  # what is averaged (n, K)
    score: Callable = lambda task, average, history: average  # the average as a prediction (n, K)
    ranks: bool = False  # the values are ranks, if order is all that a task needs
    # (task, values (N, M, K), extra (N, E), target (N, T)) -> mixer of values and extra; None: equal or given weights
    learn: Callable | None = None
    stacks: bool = False  # metadata and localized features count too


BLENDS = {
    "mean": Blend(),
    "rank": Blend(lambda task, prob, history: rank_columns(history, prob), value_of_rank, ranks=True),
    "logit": Blend(lambda task, prob, history: task.logit(prob), lambda task, average, history: prob_of(task, average)),
    "weights": Blend(
        lambda task, prob, history: rank_columns(history, prob) if by_order(task) else prob,
        ranks=True,
        learn=lambda task, values, extra, target: Weighted(learn_weights(task, values, target)),
    ),
    "stack": Blend(
        lambda task, prob, history: rank_columns(history, prob) if by_order(task) else prob, learn=Boosted, stacks=True
    ),
}


def values_of(blend: Blend, task: Task, prob: np.ndarray, fold: np.ndarray, history: np.ndarray, held) -> np.ndarray:
    """What a blend averages (N, M, K), of prob (N, M, K) by fold (N,); history (H, M, K), held (H,): held-out
    predictions and their folds."""
    values = np.empty(prob.shape)
    for k in np.unique(fold):
        for m in range(prob.shape[1]):
            values[fold == k, m] = blend.value(task, prob[fold == k, m], history[held == k, m])
    return values


def scores_of(blend: Blend, task: Task, average: np.ndarray, fold: np.ndarray, history: np.ndarray, held) -> np.ndarray:
    """Blended predictions (N, K) of averages (N, K) by fold; history (H, K): the members' average of held-out ones."""
    scores = np.empty(average.shape)
    for k in np.unique(fold):
        scores[fold == k] = blend.score(task, average[fold == k], history[held == k])
    return scores
