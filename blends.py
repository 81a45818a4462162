"""How predictions of several runs become one: the rules of ensemble.py, which predict.py follows for new images.

A blend is a row of BLENDS: what is averaged, how the average becomes a score, and how weights are learned, if they are.

References:
    Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004: forward selection with replacement.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tasks import rank_among, weighted_auc

SELECTION_STEPS = 25


def learn_weights(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (K,) by greedy forward selection with replacement for the AUC of values (N, K)."""
    counts = np.zeros(values.shape[1])
    best_counts, best = counts, -np.inf
    for _ in range(SELECTION_STEPS):
        scores = [weighted_auc(target, values @ counts + column) for column in values.T]
        counts = counts + np.eye(len(counts))[int(np.argmax(scores))]
        if max(scores) > best:  # a longer list must be better, not as good
            best_counts, best = counts, max(scores)
    return best_counts / best_counts.sum()


def logit_of(prob: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Logit of probabilities, held within 1e-7 of 0 and 1."""
    safe = np.clip(prob, 1e-7, 1 - 1e-7)
    return np.log(safe / (1 - safe))


def rank_of(prob: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Rank of predictions of one fold's network among its predictions of the rows that the fold held out."""
    return rank_among(history, prob)


@dataclass(frozen=True)
class Blend:
    """A way to blend; `history` (H,) are the held-out predictions of the network that made `prob` (N,)."""

    value: Callable = lambda prob, history: prob  # (prob, history) -> what is averaged (N,)
    score: Callable = lambda average: average  # average (N,) -> score in 0..1
    learn: Callable | None = None  # (values (N, K), target (N,)) -> weights (K,); None: equal or given ones


BLENDS = {
    "mean": Blend(),
    "rank": Blend(value=rank_of),
    "logit": Blend(value=logit_of, score=lambda average: 1 / (1 + np.exp(-average))),
    "weights": Blend(value=rank_of, learn=learn_weights),
}


def values_of(blend: Blend, prob: np.ndarray, fold: np.ndarray, history: np.ndarray, held: np.ndarray) -> np.ndarray:
    """What a blend averages (N, K), of prob (N, K) by fold (N,); history (H, K), held (H,): held-out rows and folds."""
    values = np.empty(prob.shape)
    for k in np.unique(fold):
        for column in range(prob.shape[1]):
            values[fold == k, column] = blend.value(prob[fold == k, column], history[held == k, column])
    return values
