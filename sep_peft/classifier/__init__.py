"""From images to labels: class lists, predictions, tasks, and the files that hold them."""

from .classifier import SEPClassifier, SEPClassifierOutput


__all__ = ["SEPClassifier", "SEPClassifierOutput"]
