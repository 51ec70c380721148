"""What a classifier makes of images whose classes are known: how often it is right, how surely, and where it errs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..classifier.calibration import Calibration
from ..classifier.classifier import SEPClassifier
from ..classifier.prediction import seen_embeds
from . import metrics, plots
from .folders import Samples


class Mistake(NamedTuple):
    """An image that was taken for another class.

    Args:
        image: as it was handed in.
        label: its class.
        said: the class it was taken for.
        score: of `said`, from 0 to 1.
        label_score: of `label`.
    """

    image: Any
    label: str
    said: str
    score: float
    label_score: float


class Sets(NamedTuple):
    """What sets of classes hold, as `predict` names them with `coverage`.

    Args:
        promise: how often they are to hold the class of an image, in percent.
        held: how often they did.
        classes: in a set, on average.
    """

    promise: float
    held: float
    classes: float


@dataclass(frozen=True)
class Evaluation:
    """The scores of N images among C classes, and what follows from them.

    Args:
        names: C classes.
        samples: N images and names of their classes.
        scores: (N, C), as `predict` gives them.
        embeds: (N, E) frozen image embeddings of unit length; None: not known.
        folds: of `cross_validate`, where each image was told by an adapter that was trained on the others; None: one
            classifier told all.
        calibration: by which logits became these scores; None: there is none, or it is not known.
    """

    names: list[str]
    samples: Samples
    scores: torch.Tensor
    embeds: torch.Tensor | None = None
    folds: int | None = None
    calibration: Calibration | None = None

    @cached_property
    def labels(self) -> torch.Tensor:
        """(N,) indices of the images' classes."""
        places = {name: index for index, name in enumerate(self.names)}
        return torch.tensor([places[name] for _, name in self.samples])

    @cached_property
    def said(self) -> torch.Tensor:
        """(N,) indices of the classes with the best scores."""
        return self.scores.argmax(dim=1)

    @cached_property
    def confusion(self) -> torch.Tensor:
        """(C, C) counts of images: rows are their classes, columns what was said."""
        return metrics.confusion_matrix(self.said, self.labels, len(self.names))

    @property
    def images(self) -> int:
        return len(self.samples)

    @cached_property
    def count(self) -> dict[str, int]:
        """Class -> images of it, of classes that have any."""
        counts = self.confusion.sum(dim=1).tolist()
        return {name: counts[i] for name, i in sorted((name, i) for i, name in enumerate(self.names)) if counts[i]}

    @property
    def not_tested(self) -> list[str]:
        """Classes without an image, in the order of `names`."""
        return [name for name in self.names if name not in self.count]

    @cached_property
    def right(self) -> dict[str, int]:
        """Class -> images of it that were told."""
        right = dict(zip(self.names, self.confusion.diagonal().tolist(), strict=True))
        return {name: right[name] for name in self.count}

    @property
    def accuracy(self) -> float:
        """Share of all images that were told, in percent."""
        return 100 * sum(self.right.values()) / self.images

    @cached_property
    def per_class(self) -> dict[str, float]:
        """Class -> share of its images that were told, in percent."""
        return {name: 100 * self.right[name] / count for name, count in self.count.items()}

    @property
    def class_mean(self) -> float:
        """Mean of `per_class`, in percent: every class counts the same."""
        return sum(self.per_class.values()) / len(self.per_class)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `accuracy`, in percent; see `bootstrap_interval`."""
        return metrics.bootstrap_interval([sum(self.right.values())], [self.images])

    @property
    def class_mean_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `class_mean`, in percent; images are drawn anew within their classes."""
        return metrics.bootstrap_interval(list(self.right.values()), list(self.count.values()))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over 15 bins, in percent."""
        return metrics.calibration_error(self.scores, self.labels)

    @cached_property
    def error_by_chance(self) -> float:
        """The `calibration_error` that scores which are exactly right would show on as many images, in percent."""
        return metrics.error_by_chance(self.scores)

    @property
    def nll(self) -> float:
        """Mean negative log likelihood of the labels, in nats."""
        return metrics.negative_log_likelihood(self.scores, self.labels)

    def sets(self, coverage: float = 0.9) -> Sets | None:
        """What the sets that `predict` names with `coverage` hold of these images; None where nothing is promised.

        Args:
            coverage: above 0 and below 1.
        """
        if self.calibration is None or not self.calibration.label_scores:
            return None
        inside = self.scores >= self.calibration.least_score(coverage)  # (N, C)
        inside.scatter_(1, self.said[:, None], True)
        held = inside.gather(1, self.labels[:, None]).double().mean().item()
        return Sets(100 * coverage, 100 * held, inside.sum(dim=1).double().mean().item())

    @cached_property
    def wrong(self) -> list[Mistake]:
        """Images that were taken for another class, the surest first."""
        wrong = (self.said != self.labels).nonzero()[:, 0].tolist()
        return sorted((self._mistake(index, int(self.said[index])) for index in wrong), key=lambda each: -each.score)

    @cached_property
    def unsure(self) -> list[Mistake]:
        """All images, right ones included, those whose two best scores are closest first."""
        best = self.scores.topk(min(2, len(self.names)), dim=1).values
        order = (best[:, 0] - best[:, -1]).argsort(stable=True).tolist()
        return [self._mistake(index, int(self.said[index])) for index in order]

    @cached_property
    def mislabelled(self) -> list[Mistake]:
        """Images whose label may be wrong, the likeliest first; see `suspects`. They must not have been trained on."""
        return [self._mistake(index, int(self.said[index])) for index in metrics.suspects(self.scores, self.labels)]

    def _mistake(self, index: int, said: int) -> Mistake:
        image, label = self.samples[index]
        own = self.scores[index, self.labels[index]].item()
        return Mistake(image, label, self.names[said], self.scores[index, said].item(), own)

    def plot_confusion(self, path: str | os.PathLike | None = None):
        """Draw `confusion`, each row in shares of its images.

        Args:
            path: file to write; the ending chooses the format. None writes nothing.

        Returns:
            the matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plots.confusion(self.confusion, self.names, path)

    @cached_property
    def confusion_png(self) -> bytes:
        """What `plot_confusion` draws, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plots.png(self.plot_confusion())

    def plot_reliability(self, path: str | os.PathLike | None = None):
        """Draw accuracy over the best score, and how many images have it; arguments as for `plot_confusion`."""
        return plots.reliability(metrics.reliability(self.scores, self.labels), self.calibration_error, path)

    def plot_wrong(self, path: str | os.PathLike | None = None, most: int = 12):
        """Draw the images that were surely wrong, with what was said and what they are.

        Args:
            path: as for `plot_confusion`.
            most: images, at most.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: every image was told.
        """
        return plots.wrong(self.wrong[:most], path)


def evaluate(
    classifier: SEPClassifier,
    samples: Samples,
    batch_size: int = 32,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Evaluation:
    """Predict every sample among the classifier's classes.

    Args:
        classifier: with a processor.
        samples: images and names of their classes.
        batch_size: images at a time.
        progress: wraps the batches, such as tqdm.

    Raises:
        TypeError: the samples are no list.
        ValueError: no samples, one without the name of its class, a class that the classifier does not have, or a
            `batch_size` below 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, but got {batch_size!r}.")
    check_samples(classifier, samples, "evaluate on")
    names, rows, embeds = classifier.class_names, [], []
    with seen_embeds.set(embeds):
        for start in progress(range(0, len(samples), batch_size)):
            batch = samples[start : start + batch_size]
            for prediction in classifier.predict([image for image, _ in batch], batch_size=batch_size):
                scores = {entry["label"]: entry["score"] for entry in prediction}
                rows.append([scores[name] for name in names])
    known = classifier.encoder.calibration
    calibration = known if isinstance(known, Calibration) else None
    return Evaluation(names, list(samples), torch.tensor(rows), torch.cat(embeds), calibration=calibration)


def main_part(evaluations: Mapping[str, Any]) -> str | None:
    """The part of the data whose details count: "test", or the last one; None where nothing was measured."""
    return "test" if "test" in evaluations else next(reversed([*evaluations]), None)


def check_samples(classifier: SEPClassifier, samples: Samples, purpose: str) -> None:
    """
    Raises:
        TypeError: the samples are no list.
        ValueError: no samples, one without the name of its class, or a class that the classifier does not have.
    """
    if classifier.classes.multi_label:
        raise ValueError(
            "An image may have several of the classifier's classes. Train by fit and measure by evaluate_labels, with "
            "(image, [name, ...]) for each image."
        )
    if not isinstance(samples, Sequence) or isinstance(samples, str):
        raise TypeError(
            f"samples must be a list of images and names of their classes, but got {type(samples).__name__}. Make a "
            "list of (image, name)."
        )
    if not samples:
        raise ValueError(f"There are no images to {purpose}.")
    for index, sample in enumerate(samples):
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise ValueError(
                f"A sample is an image and the name of its class, (image, name), but sample {index} is a "
                f"{type(sample).__name__}{f' of {len(sample)}' if isinstance(sample, (tuple, list)) else ''}."
            )
        if not isinstance(sample[1], str):
            raise ValueError(
                f"A sample is an image and the name of its class, but sample {index} has {sample[1]!r} in the place "
                "of a name. Take it from classifier.class_names."
            )
    if unknown := sorted({name for _, name in samples} - set(classifier.class_names)):
        raise ValueError(f"The classifier has no classes {_listed(unknown)}; it has {_listed(classifier.class_names)}.")


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
