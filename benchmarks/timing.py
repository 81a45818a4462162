"""How ways to do the same are timed: in turns, so that a slow moment of the machine hits all of them."""

import time
from collections.abc import Callable

import numpy as np


def fastest(ways: list[Callable], repeats: int) -> np.ndarray:
    """Seconds of the fastest of several calls of each way (ways,)."""
    seconds = np.empty((repeats, len(ways)))
    for row in seconds:
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way()
            row[i] = time.perf_counter() - start
    return seconds.min(axis=0)
