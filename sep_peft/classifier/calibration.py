"""Scores that are right as often as they say: a temperature for logits, found on images that training did not see.

Temperature scaling: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks" (ICML 2017).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch


#: Limits of a temperature. Logits of CLIP and of prototypes differ by 150 at most, so that the lowest makes every score
#: 0 or 1 and the highest makes all alike.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1000.0
#: Share of held-out images that the rule for none of these lets through.
KNOWN_SHARE = 0.95
#: Scores of held-out images that are kept, at most.
KEPT_SCORES = 1000
#: How many images of a class the mean over all counts for, where a class is compared with its own images; chosen on
#: training images alone (docs/scores.md).
TYPICAL_WEIGHT = 8
#: Where the images of a calibration came from.
SOURCES = ("held-out images", "cross-fitting")


@dataclass(frozen=True)
class Calibration:
    """How the logits of a class list become scores: divided by a temperature, which leaves their order as it is.

    Args:
        temperature: of these classes, from `MIN_TEMPERATURE` to `MAX_TEMPERATURE`; above 1 scores are less sure.
        new_class_temperature: of classes that take the place of these.
        images: how many it was found on, each of which was not trained on.
        source: "held-out images", or "cross-fitting" for training images, each seen by a model that was trained on
            others.
        accuracy: share of these images that were told, in percent; None: not known.
        least_energy: where there are no `typical_logits`: an image whose calibrated logits have less energy looks like
            no class. None: not known.
        label_scores: what these images, or at most `KEPT_SCORES` places in their order, give to their own class, from 0
            to 1, ascending, as `kept_scores` finds it; empty: not known.
        typical_logits: of each class the calibrated logit that its own images get, as `typical_logits` finds it; empty:
            not known.
        least_nearness: an image whose `nearness` is less looks like no class; `KNOWN_SHARE` of these images have more.
            None: there are no `typical_logits`.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    temperature: float
    new_class_temperature: float = 1.0
    images: int = 0
    source: str = SOURCES[0]
    accuracy: float | None = None
    least_energy: float | None = None
    label_scores: tuple[float, ...] = ()
    typical_logits: tuple[float, ...] = ()
    least_nearness: float | None = None

    def __post_init__(self):
        for name in ("temperature", "new_class_temperature"):
            value = getattr(self, name)
            if not (_is_finite(value) and MIN_TEMPERATURE <= value <= MAX_TEMPERATURE):
                raise ValueError(
                    f"{name} of the calibration must be a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:.0f}, but "
                    f"got {reprlib.repr(value)}."
                )
        if type(self.images) is not int or self.images < 0:
            raise ValueError(
                f"images of the calibration must be a whole number of at least 0, but got {reprlib.repr(self.images)}."
            )
        if self.accuracy is not None and not (_is_finite(self.accuracy) and 0 <= self.accuracy <= 100):
            raise ValueError(
                "accuracy of the calibration must be in percent, between 0 and 100, but got "
                f"{reprlib.repr(self.accuracy)}."
            )
        for name in ("least_energy", "least_nearness"):
            value = getattr(self, name)
            if value is not None and not _is_finite(value):
                raise ValueError(f"{name} of the calibration must be a finite number, but got {reprlib.repr(value)}.")
        self._check_typical()
        scores = self.label_scores
        if not isinstance(scores, tuple) or not all(_is_finite(score) and 0 <= score <= 1 for score in scores):
            raise ValueError(
                f"label_scores of the calibration must be numbers from 0 to 1, but got {reprlib.repr(scores)}."
            )
        if len(scores) > KEPT_SCORES or list(scores) != sorted(scores):
            raise ValueError(
                f"label_scores of the calibration must be at most {KEPT_SCORES} and ascend, but are {len(scores)}: "
                f"{reprlib.repr(scores)}."
            )
        if self.source not in SOURCES:
            raise ValueError(
                f"source of the calibration must be one of {', '.join(SOURCES)}, but got {reprlib.repr(self.source)}."
            )

    def _check_typical(self) -> None:
        typical = self.typical_logits
        if not isinstance(typical, tuple) or not all(map(_is_finite, typical)):
            raise ValueError(
                f"typical_logits of the calibration must be finite numbers, but got {reprlib.repr(typical)}."
            )
        if bool(typical) != (self.least_nearness is not None):
            raise ValueError(
                "typical_logits and least_nearness of the calibration belong together, but one of them is missing."
            )

    def check_classes(self, count: int) -> None:
        """
        Raises:
            ValueError: it is of another number of classes.
        """
        if self.typical_logits and len(self.typical_logits) != count:
            raise ValueError(
                f"typical_logits of the calibration must be of {count} classes, but are of {len(self.typical_logits)}."
            )

    @property
    def knows_strangers(self) -> bool:
        """Whether it tells images that look like none of the classes."""
        return self.least_nearness is not None or self.least_energy is not None

    def for_new_classes(self) -> Calibration:
        """That of classes that take the place of these."""
        return Calibration(self.new_class_temperature, self.new_class_temperature, self.images, self.source)

    def in_order(self, rows: Sequence[int]) -> Calibration:
        """That of all these classes in another order, by their indices."""
        return replace(self, typical_logits=tuple(self.typical_logits[row] for row in rows if self.typical_logits))

    def for_some_classes(self, rows: Sequence[int]) -> Calibration:
        """That of some of these classes among themselves, by their indices; their logits are the same ones.

        Other images have none of the classes, and another class is the best more often: what says where these images
        lie is left out.
        """
        return Calibration(self.temperature, self.new_class_temperature, self.images, self.source)

    def least_score(self, coverage: float) -> float:
        """The score that a class needs to be in a set that holds an image's class with a chance of `coverage`.

        Of n held-out images and a new one drawn like them, each is equally likely to give its class the lowest score,
        the second lowest and so on; so the k-th lowest of the n misses a share of ``k / (n + 1)``. Where n is too small
        for a promise, every class is in the set.
        """
        place = math.floor((len(self.label_scores) + 1) * (1 - coverage) + 1e-9)
        return self.label_scores[place - 1] if place else 0.0

    def to_json(self) -> dict[str, Any]:
        """For the class file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """The inverse of `to_json`.

        Raises:
            ValueError: no dict, no temperature, an entry that is not known, or a value that is not allowed.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"calibration of the class list must be a dict, but got {reprlib.repr(data)}.")
        if unknown := sorted(set(map(str, data)) - {field.name for field in fields(cls)}):
            raise ValueError(f"calibration of the class list has unknown entries: {reprlib.repr(unknown)}.")
        if "temperature" not in data:
            raise ValueError("calibration of the class list lacks temperature.")
        own = {name: data[name] for name in ("label_scores", "typical_logits") if name in data}
        return cls(**{**data, **{name: tuple(x) if isinstance(x, list) else x for name, x in own.items()}})


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature T of least cross entropy of ``logits / T``.

    The images count with one more that shows every class alike, so that few images that are all told do not promise
    that every image will be; Platt ("Probabilistic Outputs for Support Vector Machines", 1999) smooths his two classes
    so. The loss is convex in 1 / T, so the place where its slope changes sign is found by halving.

    Args:
        logits: (N, C), of images that training did not see.
        labels: (N,), their classes.

    Raises:
        ValueError: there are no images, or a logit is not finite.
    """
    if not len(logits):
        raise ValueError("A temperature needs at least one image, but there is none.")
    if not logits.isfinite().all():
        raise ValueError("A temperature needs finite logits, but some are not. Train with a lower learning rate.")
    logits = logits.double()
    logits = logits - logits.mean(dim=1, keepdim=True)  # no change of softmax; what shows every class alike gives 0
    wanted = logits.gather(1, labels.long()[:, None]).sum()
    share = 1 + 1 / len(logits)  # each image, and its part of the one that shows every class alike

    def is_too_hot(temperature: float) -> bool:
        """Whether the images say more than the scores do: the slope of the loss in 1 / T is below 0."""
        given = ((logits / temperature).softmax(dim=1) * logits).sum()
        return bool(share * given < wanted)

    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_too_hot(math.exp(middle)) else (middle, high)
    return min(max(math.exp((low + high) / 2), MIN_TEMPERATURE), MAX_TEMPERATURE)


def kept_scores(scores: torch.Tensor, most: int = KEPT_SCORES) -> tuple[float, ...]:
    """Scores (N,) ascending; of more than `most` so many places in their order, which promise no more than all do.

    The j-th of m kept ones is the i-th of all with ``i / (N + 1) <= j / (m + 1)``.
    """
    ordered, count = scores.sort().values, len(scores)
    if count > most:
        places = [(j + 1) * (count + 1) // (most + 1) - 1 for j in range(most)]
        ordered = ordered[places]
    return tuple(ordered.tolist())


def typical_logits(logits: torch.Tensor, labels: torch.Tensor, weight: float = TYPICAL_WEIGHT) -> tuple[float, ...]:
    """What images of each class give to it, (C,): their mean, drawn to that of all images where they are few.

    Args:
        logits: (N, C), calibrated, of images that training did not see.
        labels: (N,), their classes.
        weight: how many images of a class the mean of all counts for.
    """
    labels = labels.long()
    own = logits.double().gather(1, labels[:, None])[:, 0]  # (N,)
    sums = own.new_zeros(logits.shape[1]).index_add_(0, labels, own)
    counts = labels.bincount(minlength=logits.shape[1])
    return tuple(((sums + weight * own.mean()) / (counts + weight)).tolist())


def nearness(logits: torch.Tensor, typical: Sequence[float]) -> torch.Tensor:
    """By how much calibrated logits (B, C) exceed those that are typical of their classes, the most over all, (B,)."""
    return (logits - torch.tensor(typical, dtype=logits.dtype, device=logits.device)).amax(dim=-1)


def is_number(value: Any) -> bool:
    """Whether a value that was handed in or read from JSON is a number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < math.inf
