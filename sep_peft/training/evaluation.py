"""How often a classifier is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..classifier.classifier import SEPClassifier
from .folders import Samples


@dataclass(frozen=True)
class Evaluation:
    """How many images of each class were told.

    Args:
        right: class -> images of it that were told.
        count: class -> images of it.
    """

    right: dict[str, int]
    count: dict[str, int]

    @property
    def images(self) -> int:
        return sum(self.count.values())

    @property
    def accuracy(self) -> float:
        """Share of all images that were told, in percent."""
        return 100 * sum(self.right.values()) / self.images

    @property
    def per_class(self) -> dict[str, float]:
        """Class -> share of its images that were told, in percent."""
        return {name: 100 * self.right[name] / count for name, count in self.count.items()}


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
    names = sorted({name for _, name in samples})
    right, count = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for start in progress(range(0, len(samples), batch_size)):
        batch = samples[start : start + batch_size]
        predictions = classifier.predict([path for path, _ in batch], top_k=1)
        for top, (_, name) in zip(predictions, batch, strict=True):
            right[name] += top[0]["label"] == name
            count[name] += 1
    return Evaluation(right, count)


def check_samples(classifier: SEPClassifier, samples: Samples, purpose: str) -> None:
    """
    Raises:
        TypeError: the samples are no list.
        ValueError: no samples, one without the name of its class, or a class that the classifier does not have.
    """
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
