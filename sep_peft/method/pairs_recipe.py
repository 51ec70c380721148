"""`PairsRecipe`: how an adapter is trained on images with captions: settings alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from ..words import counted
from .base_recipe import BaseRecipe, is_int, is_number


#: Losses that compare the images of a batch with its captions; see `sep_peft.method.contrastive`.
LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class PairsRecipe(BaseRecipe):
    """How to train on images with captions, for `fit_pairs`.

    Epochs, learning rate and the weights of consistency are those that were tuned for classes; see `Recipe`.

    Args:
        epochs: passes over the training images, each with one of its captions. Default 30.
        batch_size: images a step, over all processes, each compared with all captions of the step. Default 64.
        learning_rate: highest of AdamW. Default 5e-3.
        adam_epsilon, weight_decay, warmup_epochs, max_steps, average_center, average_width, seed: as `BaseRecipe` has
            them.
        smallest_crop: least share of an image's area that augmentation keeps: what a caption names should stay in
            sight. Default 0.8.
        mirror: whether half of the images are mirrored, which captions that say left or right do not allow. Default
            False.
        text_weight, vision_weight: of the consistency with the frozen model. Defaults 4 and 3.
        mined_negatives: texts that each image gets as hard negatives, of the captions of others: those that the frozen
            model finds most like it, after its own; see `sep_peft.training.mined_negatives`. Default 0.
        loss: "softmax", CLIP's, or "sigmoid", SigLIP's; None: the one that the model was trained with.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    UNKNOWN: ClassVar[Mapping[str, Any]] = {**BaseRecipe.UNKNOWN, "mined_negatives": 0}

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 5e-3
    _: KW_ONLY
    smallest_crop: float = 0.8
    mirror: bool = False
    text_weight: float = 4.0
    vision_weight: float = 3.0
    mined_negatives: int = 0
    loss: Literal["softmax", "sigmoid"] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require("mirror", lambda v: isinstance(v, bool), "True or False")
        for name in ("text_weight", "vision_weight"):
            self.require(name, lambda v: is_number(v) and v >= 0, "a finite number of at least 0")
        self.require("mined_negatives", lambda v: is_int(v) and v >= 0, "an integer of at least 0")
        self.require("loss", lambda v: v is None or v in LOSSES, f"None or one of {', '.join(LOSSES)}")

    @property
    def mirrors(self) -> bool:
        """As `mirror` says."""
        return self.mirror

    def __str__(self) -> str:
        length = counted(self.epochs, "epoch") if self.max_steps is None else counted(self.max_steps, "step")
        loss = "" if self.loss is None else f"{self.loss} loss, "
        flips = " and flips" if self.mirror else ""
        mined = f"; {counted(self.mined_negatives, 'mined negative')} an image" if self.mined_negatives else ""
        return (
            f"{length} of batches of {self.batch_size} images, each with one of its captions; {loss}AdamW with "
            f"learning rate {self.learning_rate:g}, cosine; consistency weights {self.text_weight:g} and "
            f"{self.vision_weight:g}; random crops from {self.smallest_crop:.0%} of the area{flips}"
            f"{mined}"
        )
