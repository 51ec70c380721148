"""Paired bootstrap: how sure an accuracy, or a difference between two methods, is over runs and test images.

Runs and images are drawn anew with replacement, the same for every method, so that a difference is that of the same
images. An interval over few runs knows little of how runs differ, and one over a single run nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


#: Draws of a bootstrap.
DRAWS = 5_000
#: Ends of an interval of 95 %.
ENDS = (2.5, 97.5)


def resampled(right: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Accuracies in percent of many draws, for each evaluation (D,).

    Args:
        right: evaluation -> for S runs and its N images whether they were right, (S, N); all of the same runs.
        seed: of the draws: with the same numbers of runs and images, the same are drawn.
    """
    runs = {len(values) for values in right.values()}
    if len(runs) != 1:
        raise ValueError(f"All evaluations must be of the same runs, but there are {sorted(runs)} of them.")
    of_runs = _counts(runs.pop(), np.random.default_rng(seed))  # (D, S)
    found = {}
    for place, (name, values) in enumerate(sorted(right.items())):
        images = _counts(values.shape[1], np.random.default_rng([seed, place]))  # (D, N)
        found[name] = 100 * ((of_runs @ values) * images).sum(axis=1)
    return found


def interval(draws: np.ndarray) -> list[float]:
    """Lower and upper end of the 95 % interval of draws (D,)."""
    return np.percentile(draws, ENDS).tolist()


def _counts(size: int, generator: np.random.Generator) -> np.ndarray:
    """Shares (D, size) of each of `size` things in draws of as many of them."""
    return generator.multinomial(size, np.full(size, 1 / size), size=DRAWS) / size
