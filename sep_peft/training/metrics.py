"""Measures of scores and labels: how often they are right, how sure they are, and how certain that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


#: Bins of the calibration error, as the field counts it.
BINS = 15
#: Draws of a bootstrap.
DRAWS = 2000


class Bin(NamedTuple):
    """Images whose best score lies in one part of 0 to 1.

    Args:
        count: of images.
        score: mean of their best scores; 0 without an image.
        accuracy: share of them that were told, from 0 to 1; 0 without an image.
    """

    count: int
    score: float
    accuracy: float


def reliability(scores: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> list[Bin]:
    """Images by their best score, in bins of equal width whose upper ends belong to them.

    Args:
        scores: (N, C).
        labels: (N,).
        bins: how many.
    """
    best, said = scores.double().max(dim=1)
    right = (said == labels).double()
    places = (best * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for index in range(bins):
        inside = places == index
        count = int(inside.sum())
        found.append(Bin(count, best[inside].mean().item(), right[inside].mean().item()) if count else Bin(0, 0.0, 0.0))
    return found


def calibration_error(scores: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """Expected calibration error in percent: by how much scores and accuracy differ, the mean over images.

    Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (AAAI 2015); Guo et
    al., ICML 2017.

    Args:
        scores: (N, C).
        labels: (N,).
        bins: of the best score.
    """
    found = reliability(scores, labels, bins)
    return 100 * sum(each.count * abs(each.score - each.accuracy) for each in found) / len(labels)


def error_by_chance(scores: torch.Tensor, bins: int = BINS, draws: int = 100, seed: int = 0) -> float:
    """The calibration error in percent that would be measured were the scores exactly right: the mean over labels that
    are drawn by them.

    It is above 0, since the images of a bin are few: some 6 for 300 images, 2 for 3000. A measured error that is not
    above it says that nothing was found.

    Args:
        scores: (N, C).
        bins: of the best score.
        draws: of labels.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = scores.double()
    drawn = torch.multinomial(scores, draws, replacement=True, generator=generator)  # (N, draws)
    return sum(calibration_error(scores, labels, bins) for labels in drawn.unbind(dim=1)) / draws


def negative_log_likelihood(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of ``-log score`` of the labels, in nats; a score of 0 counts as the smallest that fp32 has.

    Args:
        scores: (N, C).
        labels: (N,).
    """
    own = scores.double().gather(1, labels[:, None])
    return -own.clamp_min(torch.finfo(torch.float32).tiny).log().mean().item()


def confusion_matrix(said: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """(C, C) counts of images: rows are their classes, columns what was said.

    Args:
        said, labels: (N,).
        count: of classes C.
    """
    return torch.bincount(labels * count + said, minlength=count * count).reshape(count, count)  # (C, C)


def bootstrap_interval(right: Sequence[int], count: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of what the mean over groups of images would be, were the images drawn anew.

    How many of n images are told, where n are drawn with replacement from those n of which k were told, is distributed
    as ``Binomial(n, k / n)``, so whole bootstraps are drawn at once (Efron, "Bootstrap Methods", 1979; percentiles).

    Args:
        right: for each group, how many of its images were told.
        count: for each group, its images, at least one. One group of all images gives accuracy, one for each class the
            mean over classes.
        seed: of the draws.

    Returns:
        both ends in percent. Where all images were told, or none, they are equal: images drawn anew from these say
        nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(count, dtype=torch.double).expand(DRAWS, -1)
    drawn = torch.binomial(counts, torch.tensor(right, dtype=torch.double) / counts, generator=generator) / counts
    return interval_of(100 * drawn.mean(dim=1))


def interval_of(draws: torch.Tensor) -> tuple[float, float]:
    """Both ends of the middle 95 % of what was measured in each draw of a bootstrap, (D,)."""
    low, high = draws.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def suspects(scores: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Images whose label may be wrong, the likeliest first: indices of N.

    Confident learning (Northcutt, Jiang and Chuang, JAIR 2021): an image is suspected where another class has a better
    score than its own, and at least the score that images of that class have on average. The farther apart both scores
    are, the likelier it is.

    Args:
        scores: (N, C), by a model that was not trained on these images.
        labels: (N,).
    """
    scores = scores.double()
    own = scores.gather(1, labels[:, None])  # (N, 1)
    sums = torch.zeros(scores.shape[1], dtype=torch.double).index_add_(0, labels, own[:, 0])
    counts = torch.bincount(labels, minlength=scores.shape[1])
    usual = torch.where(counts > 0, sums / counts.clamp_min(1), torch.inf)  # (C,)
    other = scores.masked_fill(scores < usual, 0.0).scatter(1, labels[:, None], 0.0).amax(dim=1)
    lead = other - own[:, 0]
    return [index for index in lead.argsort(descending=True, stable=True).tolist() if lead[index] > 0]


# several labels an image


def average_precision(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Area below precision over recall, from 0 to 1: ``sum_k (R_k - R_(k-1)) P_k`` over the different scores.

    Images of equal score come in together, so that their order does not matter; nothing is interpolated. NaN without a
    target.

    Args:
        scores: (N,), higher where a label is likelier.
        targets: (N,), 1 for images that have it and 0 for others.
    """
    if not targets.any():
        return float("nan")
    ordered, order = scores.double().sort(descending=True)
    right = targets[order].double().cumsum(dim=0)
    ends = torch.cat([ordered[:-1] != ordered[1:], ordered.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    right, named = right[ends], ends + 1
    gained = right.diff(prepend=right.new_zeros(1))
    return (gained * right / named).sum().item() / int(targets.sum())


class LabelCounts(NamedTuple):
    """How often classes were named and had, each (C,).

    Args:
        right: images that have the class and of which it was named.
        named: images of which it was named.
        have: images that have it.
    """

    right: torch.Tensor
    named: torch.Tensor
    have: torch.Tensor

    @classmethod
    def of(cls, named: torch.Tensor, targets: torch.Tensor) -> LabelCounts:
        """
        Args:
            named, targets: (N, C), of truth values.
        """
        return cls((named & targets).sum(dim=0), named.sum(dim=0), targets.sum(dim=0))

    def f1(self) -> torch.Tensor:
        """Of each class, ``2 right / (named + have)`` from 0 to 1; 0 where neither is any. (C,)"""
        return 2 * self.right.double() / (self.named + self.have).clamp_min(1)

    def micro_f1(self) -> float:
        """Of all classes counted together, from 0 to 1."""
        return (2 * self.right.sum() / (self.named.sum() + self.have.sum()).clamp_min(1)).item()
