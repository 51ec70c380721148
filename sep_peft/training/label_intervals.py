"""How certain measures of several labels are: bootstrap intervals of mean average precision and F1."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .metrics import DRAWS, interval_of


#: What intervals are of: mean average precision, F1 of all classes counted together, and the mean of their F1.
MEASURES = ("mean_average_precision", "micro_f1", "macro_f1")
#: Draws at least, and what a bootstrap may take before it takes fewer than usual: draws times images times classes.
MIN_DRAWS, WORK = 200, 2**30
#: Numbers of one kind that are in memory at a time.
SIZE = 2**22


def label_intervals(
    scores: torch.Tensor, named: torch.Tensor, targets: torch.Tensor, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The middle 95 % of what the measures would be, were as many images drawn anew from these, with replacement.

    Images are drawn with all their labels (Efron, "Bootstrap Methods", 1979; percentiles), `DRAWS` times, or for many
    images fewer times, `MIN_DRAWS` at least. A class that no image of a draw has is in no mean of that draw.

    Args:
        scores: (N, C).
        named, targets: (N, C) bool: which classes were named of an image, and which it has, one of them at least.
        seed: of the draws.

    Returns:
        name of each of `MEASURES` -> both ends in percent.
    """
    count = len(scores)
    generator = torch.Generator().manual_seed(seed)
    draws = min(DRAWS, max(MIN_DRAWS, WORK // scores.numel()))
    found = []
    for start in range(0, draws, size := max(1, SIZE // count)):
        chosen = torch.randint(count, (min(size, draws - start), count), generator=generator)  # (D, N) images
        weights = torch.zeros(chosen.shape, dtype=torch.double)
        weights.scatter_add_(1, chosen, torch.ones((), dtype=torch.double).expand_as(chosen))
        found.append(weighted_measures(scores, named, targets, weights))
    measures = torch.cat(found)  # (DRAWS, 3)
    measures = measures[measures[:, 0].isfinite()]  # of a draw where no image has any class nothing can be said
    return {name: interval_of(100 * column) for name, column in zip(MEASURES, measures.unbind(dim=1), strict=True)}


def weighted_measures(
    scores: torch.Tensor, named: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`MEASURES` from 0 to 1, (D, 3), where images count several times or not at all.

    Args:
        scores, named, targets: as for `label_intervals`.
        weights: (D, N), how often each image counts in each of D draws.
    """
    named, targets = named.to(weights.dtype), targets.to(weights.dtype)
    right, said, have = weights @ (named * targets), weights @ named, weights @ targets  # each (D, C)
    tested = have > 0
    f1 = 2 * right / (said + have).clamp_min(1)
    macro = f1.where(tested, torch.nan).nanmean(dim=1)
    micro = 2 * right.sum(dim=1) / (said.sum(dim=1) + have.sum(dim=1)).clamp_min(1)
    precisions = torch.stack(list(_average_precisions(scores, targets, weights)), dim=1)  # C x (D,) -> (D, C)
    return torch.stack([precisions.where(tested, torch.nan).nanmean(dim=1), micro, macro], dim=1)


def _average_precisions(scores: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of each class the average precision in every draw, (D,), as `average_precision` has it; NaN without a target."""
    for score, target in zip(scores.unbind(dim=1), targets.unbind(dim=1), strict=True):
        ordered, order = score.double().sort(descending=True)
        own = weights[:, order]  # (D, N)
        ends = torch.cat([ordered[:-1] != ordered[1:], ordered.new_ones(1, dtype=torch.bool)])  # of equal scores
        right = (own * target[order]).cumsum(dim=1)[:, ends]
        said = own.cumsum(dim=1)[:, ends]
        gained = right.diff(dim=1, prepend=right.new_zeros(len(right), 1))
        yield (gained * right / said.clamp_min(1)).sum(dim=1) / right[:, -1]
