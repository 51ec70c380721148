"""How logits become scores where an image may have several of the classes, and from which score on a class is named.

Each class has a sigmoid of its own, ``score = sigmoid(slope logit + bias)``: Platt, "Probabilistic Outputs for Support
Vector Machines" (1999), for one class against the rest. Thresholds are those of the best F1 on the same images (Lipton,
Elkan and Naryanaswamy, "Optimal Thresholding of Classifiers to Maximize F1 Measure", ECML 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..tuner.messages import shown
from ..words import are, counted
from .calibration import SOURCES, is_number


#: Largest slope and bias; logits of CLIP and of prototypes are 150 at most.
MAX_SLOPE, MAX_BIAS = 100.0, 10_000.0
#: Images with a class, and without, from which on it has a threshold of its own.
MIN_IMAGES = 10
#: How strongly biases of classes are drawn to that of all: as much as so many images would.
SHARED_IMAGES = 4.0


class Sigmoids(NamedTuple):
    """What makes logits (B, C) of classes into those of which the sigmoid is a probability.

    Args:
        slopes, biases: (C,) or (1,).
    """

    slopes: torch.Tensor
    biases: torch.Tensor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, C) -> (B, C)."""
        return logits * self.slopes.to(logits) + self.biases.to(logits)


@dataclass(frozen=True)
class LabelScale:
    """How the logits of classes become scores, and which are named.

    Args:
        slope: that all logits are multiplied by, above 0 and at most `MAX_SLOPE`.
        biases: added to the logits, one a class, or one for all.
        thresholds: a class with at least this score is named, from 0 to 1; one a class, or one for all.

    Raises:
        ValueError: a value is not allowed, or the numbers of biases and thresholds differ.
    """

    slope: float
    biases: tuple[float, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self):
        if not (is_number(self.slope) and 0 < self.slope <= MAX_SLOPE):
            raise ValueError(f"slope of the scores must be above 0 and at most {MAX_SLOPE:g}, got {shown(self.slope)}.")
        for name, low, high in (("biases", -MAX_BIAS, MAX_BIAS), ("thresholds", 0, 1)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(is_number(each) and low <= each <= high for each in values):
                raise ValueError(f"{name} of the scores must be numbers from {low:g} to {high:g}, got {shown(values)}.")
        if not self.biases or len(self.biases) != len(self.thresholds):
            raise ValueError(
                "biases and thresholds of the scores must be as many, and one at least, but are "
                f"{len(self.biases)} and {len(self.thresholds)}."
            )

    def sigmoids(self, device: torch.device | None = None) -> Sigmoids:
        """For logits on a device."""
        return Sigmoids(torch.tensor([self.slope], device=device), torch.tensor(self.biases, device=device))

    def only(self, rows: Sequence[int]) -> LabelScale:
        """That of some classes, by their indices."""
        if len(self.biases) == 1:
            return self
        return LabelScale(
            self.slope, tuple(self.biases[row] for row in rows), tuple(self.thresholds[row] for row in rows)
        )

    @classmethod
    def from_json(cls, data: Any, name: str) -> LabelScale:
        """What `dataclasses.asdict` gave, after it was JSON.

        Raises:
            ValueError: it is something else, or a value is not allowed.
        """
        if not isinstance(data, Mapping) or set(data) != {field.name for field in fields(cls)}:
            raise ValueError(f"{name} of the calibration must have slope, biases and thresholds, got {shown(data)}.")
        biases, thresholds = (tuple(x) if isinstance(x := data[key], list) else x for key in ("biases", "thresholds"))
        return cls(data["slope"], biases, thresholds)


@dataclass(frozen=True)
class LabelCalibration:
    """How the logits of a class list become scores where an image may have several of the classes.

    Args:
        trained: of these classes by the adapter, for each class.
        zero_shot: of these classes by the base model alone, for each class.
        new_classes: of classes that take the place of these: one for all, found on these by their texts alone.
        images: how many it was found on, each of which was not trained on.
        source: "held-out images", or "cross-fitting" for training images, each seen by a model that was trained on
            others.
        rare: indices of classes that have the threshold of all, because of fewer than `MIN_IMAGES` images.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    trained: LabelScale
    zero_shot: LabelScale
    new_classes: LabelScale
    images: int = 0
    source: str = SOURCES[0]
    rare: tuple[int, ...] = ()

    def __post_init__(self):
        if type(self.images) is not int or self.images < 0:
            raise ValueError(
                f"images of the calibration must be a whole number of at least 0, but got {shown(self.images)}."
            )
        if self.source not in SOURCES:
            raise ValueError(
                f"source of the calibration must be one of {', '.join(SOURCES)}, but got {shown(self.source)}."
            )
        if not isinstance(self.rare, tuple) or not all(type(each) is int and each >= 0 for each in self.rare):
            raise ValueError(f"rare of the calibration must be indices of classes, but got {shown(self.rare)}.")

    def check_classes(self, count: int) -> None:
        """
        Raises:
            ValueError: it is of another number of classes.
        """
        for name in ("trained", "zero_shot"):
            if (found := len(getattr(self, name).biases)) not in (1, count):
                raise ValueError(
                    f"The calibration has the scores of {counted(found, 'class', 'classes')}, but there "
                    f"{are(count)} {count}."
                )
        if self.rare and max(self.rare) >= count:
            raise ValueError(f"rare of the calibration must be below {count}, but got {max(self.rare)}.")

    def for_new_classes(self) -> LabelCalibration:
        """That of classes that take the place of these."""
        new = self.new_classes
        return LabelCalibration(new, new, new, self.images, self.source)

    def for_some_classes(self, rows: Sequence[int]) -> LabelCalibration:
        """That of some of these classes, by their indices: each is told as it is among all."""
        rare = tuple(place for place, row in enumerate(rows) if row in self.rare)
        scales = self.trained.only(rows), self.zero_shot.only(rows), self.new_classes
        return LabelCalibration(*scales, self.images, self.source, rare)

    def to_json(self) -> dict[str, Any]:
        """For the class file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> LabelCalibration:
        """The inverse of `to_json`.

        Raises:
            ValueError: no dict of all entries, or a value is not allowed.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise ValueError(f"calibration of the class list must have {', '.join(sorted(names))}, got {shown(data)}.")
        trained, zero_shot, new = (
            LabelScale.from_json(data[name], name) for name in ("trained", "zero_shot", "new_classes")
        )
        rare = tuple(data["rare"]) if isinstance(data["rare"], list) else data["rare"]
        return cls(trained, zero_shot, new, data["images"], data["source"], rare)


def fit_scale(logits: torch.Tensor, targets: torch.Tensor, *, shared: bool = False) -> LabelScale:
    """Slope and biases of least binary cross entropy, and the thresholds of the best F1.

    One slope serves all classes, each of which has a bias b_c. With few images a bias says little, so that all are
    drawn to their mean b by ``SHARED_IMAGES / 8 sum_c (b_c - b)^2``, which weighs as much as `SHARED_IMAGES` images of
    a score of one half.

    Args:
        logits: (N, C), of images that training did not see.
        targets: (N, C), 1 for the labels of an image and 0 for the other classes.
        shared: one bias and one threshold for all classes.

    Raises:
        ValueError: there are no images, or a logit is not finite.
    """
    if not len(logits):
        raise ValueError("Scores need at least one image to be calibrated on, but there is none.")
    if not logits.isfinite().all():
        raise ValueError("Scores need finite logits, but some are not. Train with a lower learning rate.")
    logits, targets = logits.double(), targets.double()
    middle, spread = logits.mean(), logits.std(correction=0).clamp_min(1e-6)
    standard = (logits - middle) / spread
    slope, bias = _fit(standard, targets, shared)
    slope = (slope / spread).clamp(1e-6, MAX_SLOPE)
    biases = (bias - slope * middle).clamp(-MAX_BIAS, MAX_BIAS)
    scores = (logits * slope + biases).sigmoid()
    thresholds = [best_threshold(scores.flatten(), targets.flatten())]
    if not shared:
        thresholds = [
            thresholds[0] if is_rare(own) else best_threshold(score, own)
            for score, own in zip(scores.unbind(dim=1), targets.unbind(dim=1), strict=True)
        ]
    return LabelScale(slope.item(), tuple(biases.tolist()), tuple(thresholds))


def _fit(logits: torch.Tensor, targets: torch.Tensor, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope () and biases (C,) or (1,) for standardized logits (N, C).

    As Platt did, the images count with one more that has half of each class, so that a class that is told without a
    mistake does not promise that it always will be.
    """
    count = logits.shape[1]
    with torch.inference_mode(False), torch.enable_grad():
        logits, targets = logits.clone(), targets.clone()
        log_slope = logits.new_zeros(()).requires_grad_()
        bias = logits.new_zeros(()).requires_grad_()
        own = logits.new_zeros(1 if shared else count).requires_grad_()
        optimizer = torch.optim.LBFGS([log_slope, bias, own], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            told = log_slope.exp() * logits + bias + own
            loss = F.binary_cross_entropy_with_logits(told, targets, reduction="sum")
            loss = loss + F.softplus(bias + own).sum() - (bias + own).sum() / 2 + log_slope.square() / 8
            loss = loss + SHARED_IMAGES / 8 * own.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return log_slope.detach().exp(), (bias + own).detach()


def is_rare(targets: torch.Tensor) -> bool:
    """Whether a class of targets (N,) has too few images, or too many, for a threshold of its own."""
    have = int(targets.sum())
    return min(have, len(targets) - have) < MIN_IMAGES


def best_threshold(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """The threshold of the highest F1, in the middle between the scores that it parts; 0.5 without a target.

    Args:
        scores: (N,), from 0 to 1.
        targets: (N,), 1 or 0.
    """
    if not targets.any():
        return 0.5
    ordered, order = scores.sort(descending=True)
    right = targets[order].cumsum(dim=0)
    named = torch.arange(1, len(scores) + 1, device=scores.device)
    f1 = 2 * right / (named + targets.sum())
    ends = torch.cat([ordered[:-1] > ordered[1:], ordered.new_ones(1, dtype=torch.bool)])  # equal ones go together
    place = int(f1.masked_fill(~ends, -math.inf).argmax())
    below = ordered[place + 1].item() if place + 1 < len(ordered) else 0.0
    return (ordered[place].item() + below) / 2
