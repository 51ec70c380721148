"""Class folders; see `sep_peft.training.folders`."""

from .classifier.images import find_images
from .training.folders import ImageFolder, Samples, read_classes, read_folder, read_test, without_unreadable


__all__ = ["ImageFolder", "Samples", "find_images", "read_classes", "read_folder", "read_test", "without_unreadable"]
