"""What is shipped: a classifier as training leaves it, made in one place, and measured as such while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from ..classifier.classifier import SEPClassifier
from .calibrate import logits_of
from .data import LabelledImages
from .evaluation import evaluate
from .folders import Samples
from .label_evaluation import average_precisions


def ship(classifier: SEPClassifier) -> SEPClassifier:
    """Go over from training to what is saved and predicts: evaluation, prototypes as the recipe has them. Returns it.

    Raises:
        ValueError: the prototypes are not finite.
    """
    return classifier.finish_training()


@contextmanager
def as_shipped(classifier: SEPClassifier) -> Iterator[SEPClassifier]:
    """The classifier as it would be shipped, in the middle of its training, which goes on afterwards as if nothing had
    happened."""
    encoder, trained, training = classifier.encoder, classifier.trained, classifier.training
    try:
        yield ship(classifier)
    finally:
        classifier.encoder, classifier.trained = encoder, trained
        classifier.train(training)


class Validation:
    """Measures a classifier while it trains, as it would be shipped.

    Args:
        classifier: with a processor.
        samples: images and names of their classes.
        batch_size: images at a time.
    """

    def __init__(self, classifier: SEPClassifier, samples: Samples, batch_size: int):
        self._classifier, self._samples, self._batch_size = classifier, samples, batch_size

    def zero_shot(self) -> float | None:
        """Accuracy of the base model in percent; None where the model is no `PeftModel`, which can leave it out."""
        if not isinstance(self._classifier.model, PeftModel):
            return None
        with as_shipped(self._classifier), self._classifier.model.disable_adapter():
            return evaluate(self._classifier, self._samples, self._batch_size).accuracy

    def measure(self) -> dict[str, float]:
        """What is noted of an epoch: "val_accuracy" in percent."""
        with as_shipped(self._classifier):
            return {"val_accuracy": evaluate(self._classifier, self._samples, self._batch_size).accuracy}


class LabelValidation:
    """The same of a classifier of which an image may have several classes: it needs no thresholds, which come last.

    Args:
        classifier: with a processor.
        images: to measure on, as they are.
        batch_size: images at a time.
        workers: processes that read images.
    """

    def __init__(self, classifier: SEPClassifier, images: LabelledImages, batch_size: int, workers: int = 0):
        self._classifier, self._images, self._sizes = classifier, images, (batch_size, workers)

    def zero_shot(self) -> float | None:
        """Mean average precision of the base model in percent; None where the model is no `PeftModel`."""
        if not isinstance(self._classifier.model, PeftModel):
            return None
        with as_shipped(self._classifier), self._classifier.model.disable_adapter():
            return self._mean_average_precision()

    def measure(self) -> dict[str, float]:
        """What is noted of an epoch: "val_map" in percent."""
        with as_shipped(self._classifier):
            return {"val_map": self._mean_average_precision()}

    def _mean_average_precision(self) -> float:
        logits, _, targets = logits_of(self._classifier, self._images, *self._sizes)
        return average_precisions(logits, targets).nanmean().item()
