"""Paired bootstrap: how sure an accuracy, or a difference between two methods, is over runs and test images.

Runs and images are drawn anew with replacement, the same for every method, so that a difference is that of the same
images. In an average over cells each cell has the same weight, however many runs it has; cells of one data set, on
other models or at other numbers of shots, share the draws of its images, so that more of them do not make an interval
narrower than the images allow. An interval over few runs knows little of how runs differ, and one over a single run
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


#: Draws of a bootstrap.
DRAWS = 5_000
#: Images up to which draws are kept for the next method, 20 MB at most each.
MOST_KEPT = 1_000
#: Ends of an interval of 95 %.
ENDS = (2.5, 97.5)
BASE_TO_NEW, FEW_SHOT, CROSS_DATASET, SHIFTED = "base-to-new", "few-shot", "cross-dataset", "domain-generalization"
#: Name of the evaluation on images like those that were trained on.
SOURCE = "source"


class Part(NamedTuple):
    """What a method did in one cell.

    Args:
        dataset: whose images these are; parts of one data set share draws.
        right: evaluation -> seed -> for each test image 1 where it was right, else 0, (N,).
    """

    dataset: str
    right: dict[str, dict[int, np.ndarray]]


def score_of(protocol: str, columns: dict[str, Any]) -> Any:
    """What methods are ordered by, of accuracies or of draws of them, in percent.

    The harmonic mean of base and new classes, the mean over the data sets or domains that were not trained on, or the
    mean over all.
    """
    if protocol == BASE_TO_NEW:
        base, new = columns["base"], columns["new"]
        return 2 * base * new / np.maximum(base + new, 1e-9)
    names = list(columns)
    if protocol == CROSS_DATASET and len(names) > 1:
        names = names[1:]
    elif protocol == SHIFTED and set(names) != {SOURCE}:
        names = [name for name in names if name != SOURCE]
    return sum(columns[name] for name in names) / len(names)


def intervals_of(parts: Sequence[Part], protocol: str) -> dict[str, list[float]]:
    """The 95 % interval of each evaluation's mean accuracy over cells, runs and images, and of the "score"."""
    seeds = [common_seeds(part) for part in parts]
    _, draws = _estimates(parts, list(parts[0].right), seeds, protocol) if all(seeds) else ({}, {})
    return {name: interval(values) for name, values in draws.items()}


def difference(ours: Sequence[Part], theirs: Sequence[Part], protocol: str) -> dict[str, dict[str, Any]] | None:
    """Paired difference for each evaluation and the "score": its "mean" in points and its "interval".

    It is over the runs that both have, in each of the same cells; None where both have no run or other images. There is
    no score where one of both lacks an evaluation.
    """
    pairs = list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []
    first = ours[0].right if pairs else ()
    columns = [name for name in first if all(name in part.right for pair in pairs for part in pair)]
    seeds = [sorted(set(common_seeds(a)) & set(common_seeds(b))) for a, b in pairs]
    if not columns or not all(seeds) or any(_size(a, name) != _size(b, name) for a, b in pairs for name in columns):
        return None
    exact, draws = zip(*(_estimates(side, columns, seeds, protocol) for side in (ours, theirs)), strict=True)
    whole = all(set(part.right) == set(columns) for pair in pairs for part in pair)
    return {
        name: {"mean": float(exact[0][name] - exact[1][name]), "interval": interval(draws[0][name] - draws[1][name])}
        for name in exact[0]
        if whole or name != "score"
    }


def common_seeds(part: Part) -> list[int]:
    """The runs that all evaluations of a part have."""
    return sorted(set.intersection(*map(set, part.right.values()))) if part.right else []


def _estimates(
    parts: Sequence[Part], columns: list[str], seeds: list[list[int]], protocol: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means over cells, as measured and as draws (D,), of each column and of the score."""
    measured, drawn, names = [], [], [part.dataset for part in parts]
    for part, own in zip(parts, seeds, strict=True):
        whole = {name: np.stack([part.right[name][seed] for seed in own]) for name in columns}  # (S, N)
        measured.append({name: 100 * right.mean() for name, right in whole.items()})
        drawn.append(resampled(whole, names.index(part.dataset)))
    means = [{name: sum(part[name] for part in side) / len(side) for name in columns} for side in (measured, drawn)]
    if protocol != BASE_TO_NEW or set(columns) == {"base", "new"}:
        means = [{**side, "score": score_of(protocol, side)} for side in means]
    return means[0], means[1]


def resampled(right: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Accuracies in percent of many draws, for each evaluation (D,).

    Args:
        right: evaluation -> for S runs and its N images whether they were right, (S, N); all of the same runs.
        seed: of the draws: for the same numbers of runs and images, the same are drawn.
    """
    runs = len(next(iter(right.values())))
    of_runs = _shares(runs, seed, 0)  # (D, S)
    found = {}
    for place, (name, values) in enumerate(right.items(), start=1):
        of_images = _shares(values.shape[1], seed, place)  # (D, N)
        found[name] = 100 * ((of_runs @ values) * of_images).sum(axis=1)
    return found


def interval(draws: np.ndarray) -> list[float]:
    """Lower and upper end of the 95 % interval of draws (D,)."""
    return np.percentile(draws, ENDS).tolist()


def _size(part: Part, name: str) -> int:
    """N, the images of an evaluation."""
    return len(next(iter(part.right[name].values())))


def _shares(size: int, *seeds: int) -> np.ndarray:
    """Shares (D, size) of each of `size` things among as many that are drawn; kept where every method asks for them."""
    return _kept_shares(size, *seeds) if size <= MOST_KEPT else _drawn_shares(size, *seeds)


def _drawn_shares(size: int, *seeds: int) -> np.ndarray:
    drawn = np.random.default_rng(seeds).multinomial(size, np.full(size, 1 / size), size=DRAWS)
    return (drawn / size).astype(np.float32)


#: Those of eleven data sets, each of runs and of the images of base and new classes.
_kept_shares = lru_cache(maxsize=33)(_drawn_shares)
