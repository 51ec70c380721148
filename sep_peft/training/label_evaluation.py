"""What a classifier makes of images that may have several of its classes: what it names rightly, and how it ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..classifier.classifier import SEPClassifier
from ..tuner.messages import listed, shown
from . import metrics
from .label_files import LabelSamples
from .label_intervals import label_intervals


@dataclass(frozen=True)
class LabelMistake:
    """A class of which an image was named wrongly, or that was missed.

    Args:
        image: as it was handed in.
        label: the class.
        score: of it, from 0 to 1.
        missed: whether the image has the class and it was not named; else it was named and the image does not have it.
        by: how far the score lies from the threshold, from 0 to 1.
    """

    image: Any
    label: str
    score: float
    missed: bool
    by: float


@dataclass(frozen=True)
class ClassMeasures:
    """Of one class, all from 0 to 100 beside the count.

    Args:
        images: that have it.
        average_precision, f1, precision, recall: NaN where no image has it; precision also where it was never named.
    """

    images: int
    average_precision: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class LabelEvaluation:
    """The scores of N images for C classes, of which each may have several, and what follows from them.

    Args:
        names: C classes.
        samples: N images and the names of their classes.
        scores: (N, C), from 0 to 1.
        thresholds: (C,), from which score on a class is named.
    """

    names: list[str]
    samples: LabelSamples
    scores: torch.Tensor
    thresholds: torch.Tensor

    @cached_property
    def targets(self) -> torch.Tensor:
        """(N, C), true for the classes of an image."""
        return targets_of(self.samples, self.names)

    @cached_property
    def named(self) -> torch.Tensor:
        """(N, C), true for the classes that are named of an image."""
        return self.scores.double() >= self.thresholds.double()

    @cached_property
    def counts(self) -> metrics.LabelCounts:
        """How often classes were named and had."""
        return metrics.LabelCounts.of(self.named, self.targets)

    @property
    def images(self) -> int:
        return len(self.samples)

    @cached_property
    def average_precisions(self) -> torch.Tensor:
        """Of each class in percent, (C,); NaN where no image has it."""
        return average_precisions(self.scores, self.targets)

    @property
    def mean_average_precision(self) -> float:
        """mAP: the mean of `average_precisions` over the classes that an image has, in percent."""
        return self.average_precisions.nanmean().item()

    @property
    def micro_f1(self) -> float:
        """F1 of all classes counted together, in percent."""
        return 100 * self.counts.micro_f1()

    @property
    def macro_f1(self) -> float:
        """Mean of the F1 of the classes that an image has, in percent."""
        return 100 * self.counts.f1()[self.counts.have > 0].mean().item()

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Name of each measure of all classes together -> its 95 % bootstrap interval in percent; see
        `label_intervals`."""
        return label_intervals(self.scores, self.named, self.targets)

    @cached_property
    def per_class(self) -> dict[str, ClassMeasures]:
        """Class -> what was measured of it."""
        right, named, have = (count.double() for count in self.counts)
        columns = (
            self.counts.have.tolist(),
            self.average_precisions.tolist(),
            (100 * 2 * right / (named + have)).where(have > 0, torch.nan).tolist(),
            (100 * right / named).where(have > 0, torch.nan).tolist(),
            (100 * right / have).tolist(),
        )
        return {name: ClassMeasures(*own) for name, *own in zip(self.names, *columns, strict=True)}

    @property
    def not_tested(self) -> list[str]:
        """Classes that no image has, in the order of `names`."""
        return [name for name, have in zip(self.names, self.counts.have.tolist(), strict=True) if not have]

    @cached_property
    def wrong(self) -> list[LabelMistake]:
        """Classes that were named wrongly or missed, the farthest from their threshold first."""
        found = []
        for row, column in (self.named != self.targets).nonzero().tolist():
            score = self.scores[row, column].item()
            by = abs(score - self.thresholds[column].item())
            missed = bool(self.targets[row, column])
            found.append(LabelMistake(self.samples[row][0], self.names[column], score, missed, by))
        return sorted(found, key=lambda each: -each.by)


def evaluate_labels(
    classifier: SEPClassifier,
    samples: LabelSamples,
    batch_size: int = 32,
    progress: Callable[[Iterable], Iterable] = iter,
) -> LabelEvaluation:
    """Predict every sample by a classifier of which an image may have several classes.

    Args:
        classifier: with a processor and calibrated; without its adapter it has the calibration of zero-shot.
        samples: images and the names of their classes.
        batch_size: images at a time.
        progress: wraps the batches, such as tqdm.

    Raises:
        TypeError: the samples are no list.
        ValueError: an image has one of the classes, there are no samples, one is without a list of names, a class that
            the classifier does not have, the classifier is not calibrated, or a `batch_size` below 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, but got {batch_size!r}.")
    check_label_samples(classifier, samples, "evaluate on")
    names, rows = classifier.class_names, []
    for start in progress(range(0, len(samples), batch_size)):
        batch = samples[start : start + batch_size]
        for prediction in classifier.predict([image for image, _ in batch], batch_size=batch_size, min_score=0.0):
            scores = {entry["label"]: entry["score"] for entry in prediction}
            rows.append([scores[name] for name in names])
    scale = classifier.encoder.label_scale
    assert scale is not None, "predict asks for it"
    thresholds = torch.tensor(scale.thresholds, dtype=torch.float64).expand(len(names))
    return LabelEvaluation(names, list(samples), torch.tensor(rows, dtype=torch.float64), thresholds)


def average_precisions(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each class in percent, (C,), of scores or logits and targets (N, C); NaN where no image has it."""
    columns = zip(scores.unbind(dim=1), targets.unbind(dim=1), strict=True)
    return torch.tensor([100 * metrics.average_precision(*each) for each in columns])


def targets_of(samples: LabelSamples, names: Sequence[str]) -> torch.Tensor:
    """(N, C), true for the classes of an image."""
    places = {name: index for index, name in enumerate(names)}
    targets = torch.zeros(len(samples), len(names), dtype=torch.bool)
    for row, (_, own) in enumerate(samples):
        targets[row, [places[name] for name in own]] = True
    return targets


def check_label_samples(classifier: SEPClassifier, samples: LabelSamples, purpose: str) -> None:
    """
    Raises:
        TypeError: the samples are no list.
        ValueError: an image has one of the classifier's classes, there are no samples, one is without a list of names,
            or one has a class that the classifier does not have.
    """
    if not classifier.classes.multi_label:
        raise ValueError(
            "An image has one of the classifier's classes. Make it with multi_label=True where it may have several."
        )
    if not isinstance(samples, Sequence) or isinstance(samples, str):
        raise TypeError(
            "samples must be a list of images and lists of names of their classes, but got "
            f"{type(samples).__name__}. Make a list of (image, [name, ...])."
        )
    if not samples:
        raise ValueError(f"There are no images to {purpose}.")
    unknown: dict[str, None] = {}
    for index, sample in enumerate(samples):
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise ValueError(
                "A sample is an image and a list of names of its classes, (image, [name, ...]), but sample "
                f"{index} is {shown(sample)}."
            )
        own = sample[1]
        if not isinstance(own, (tuple, list)) or not all(isinstance(name, str) for name in own):
            raise ValueError(
                "A sample is an image and a list of names of its classes, but sample "
                f"{index} has {shown(own)} in the place of the list. Take names from classifier.class_names."
            )
        unknown |= dict.fromkeys(name for name in own if name not in classifier.class_names)
    if unknown:
        raise ValueError(
            f"The classifier has no classes {listed(sorted(unknown))}; it has {listed(classifier.class_names)}."
        )
