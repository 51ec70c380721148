"""`BaseRecipe`: what every training by gradients has: how long, how much at a time, how fast, on which images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from numbers import Real
from typing import Any, ClassVar, TypeGuard


@dataclass(frozen=True)
class BaseRecipe:
    """How long to train, on how much at a time, how fast, and what is shown of the images.

    Args:
        epochs: passes over the training images, at least 1. Default 30.
        batch_size: images a step, over all processes. Default 32.
        learning_rate: highest of AdamW; it rises during `warmup_epochs` and falls along a cosine. Default 5e-3.
        adam_epsilon: of AdamW. Default 1e-8.
        weight_decay: of AdamW. Default 0.
        warmup_epochs: epochs in which the learning rate rises from 0; 0: it starts at its highest. Default 1.
        max_steps: stop after so many steps, where `epochs` would take more; None: after `epochs`.
        smallest_crop: least share of an image's area that augmentation keeps, above 0 and at most 1. Default 0.5.
        average_center, average_width: what is trained ends as its average over epochs, with Gaussian weights around the
            share `average_center` of all epochs, above 0 and at most 1, `average_width` shares wide, as PromptSRC
            (arXiv 2307.06948) averages prompts; its values are 0.75 and 0.05 for base-to-new. None: it ends as the last
            step leaves it, as published. Defaults None and 0.05.
        seed: of batches, augmentation and what is drawn, from 0 to 2^31 - 1. Default 1.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    #: Settings that no step of a training reads.
    AFTERWARDS: ClassVar[frozenset[str]] = frozenset()
    #: Setting -> the value with which a training is one that does not know it. A training that was begun without the
    #: setting goes on with this value alone, so each that is added needs one.
    UNKNOWN: ClassVar[Mapping[str, Any]] = {"average_center": None, "average_width": 0.05}

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 5e-3
    _: KW_ONLY
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    max_steps: int | None = None
    smallest_crop: float = 0.5
    average_center: float | None = None
    average_width: float = 0.05
    seed: int = 1

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            self.require(name, lambda v: is_int(v) and v >= 1, "an integer of at least 1")
        self.require("warmup_epochs", lambda v: is_int(v) and v >= 0, "an integer of at least 0")
        self.require("max_steps", lambda v: v is None or (is_int(v) and v >= 1), "None or an integer of at least 1")
        self.require("seed", lambda v: is_int(v) and 0 <= v < 2**31, "an integer from 0 to 2147483647")
        self.require(
            "average_center",
            lambda v: v is None or (is_number(v) and 0 < v <= 1),
            "None or a number above 0 and at most 1",
        )
        for name in ("learning_rate", "adam_epsilon", "average_width"):
            self.require(name, lambda v: is_number(v) and v > 0, "a finite number above 0")
        self.require("smallest_crop", lambda v: is_number(v) and 0 < v <= 1, "a number above 0 and at most 1")
        self.require("weight_decay", lambda v: is_number(v) and v >= 0, "a finite number of at least 0")

    def require(self, name: str, allowed: Callable[[object], bool], description: str) -> None:
        """
        Raises:
            ValueError: the setting `name` has a value that is not `allowed`, with what it must be.
        """
        value = getattr(self, name)
        if not allowed(value):
            raise ValueError(f"{name} must be {description}, but got {value!r}.")

    @property
    def of_steps(self) -> dict[str, Any]:
        """Name -> value of every setting that the steps of a training follow."""
        return {name: value for name, value in asdict(self).items() if name not in self.AFTERWARDS}

    @property
    def mirrors(self) -> bool:
        """Whether half of the images are mirrored."""
        return True

    @property
    def own_learning_rates(self) -> dict[str, float]:
        """Name of a parameter -> its highest learning rate, where that is not `learning_rate`."""
        return {}


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
