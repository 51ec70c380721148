"""What the model card says of a classifier of which an image may have several classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LabelMeasures:
    """What was measured on some images, all in percent.

    Args:
        mean_average_precision: mAP, over the classes.
        micro_f1: F1 of all classes counted together.
        macro_f1: mean of the F1 of the classes.
        intervals: name of one of these -> both ends of its 95 % bootstrap interval; empty: not known.

    Raises:
        ValueError: a value outside of 0 to 100.
    """

    mean_average_precision: float
    micro_f1: float
    macro_f1: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("mean_average_precision", "micro_f1", "macro_f1"):
            if not 0 <= (value := getattr(self, name)) <= 100:
                raise ValueError(f"{name} must be in percent, between 0 and 100, but got {value!r}.")


@dataclass(frozen=True)
class LabelScore:
    """Mean average precision and F1 on one set of images.

    Args:
        dataset: name of the set, for people.
        adapted: of the adapter.
        zero_shot: of the base model without it, with sigmoids and thresholds of its own that were chosen on the same
            images; None: not measured.
        images: how many there were; None: not known.
        split: such as "test".
    """

    dataset: str
    adapted: LabelMeasures
    zero_shot: LabelMeasures | None = None
    images: int | None = None
    split: str = "test"


@dataclass(frozen=True)
class LabelClassScore:
    """What is known of one class.

    Args:
        name: of the class.
        training_images, images: how many have it, to train and to test on.
        average_precision, f1: on the test images, in percent; None: not tested.
        zero_shot: average precision of the base model without the adapter; None: not measured.
    """

    name: str
    training_images: int
    images: int = 0
    average_precision: float | None = None
    f1: float | None = None
    zero_shot: float | None = None
