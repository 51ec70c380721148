"""How an adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass


#: Weight of the kept prototypes' logits in predictions, chosen on validation images by `examples/few_shot`.
PROTOTYPE_LOGIT_WEIGHT = 5.0
#: How many times zero-shot's confidence counts where classes were not trained, chosen there as well.
ZERO_SHOT_MARGIN = 1.5


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those that `examples/few_shot` tuned for the default adapter.

    Args:
        epochs: passes over the images; the learning rate rises during the first and falls along a cosine.
        batch_size: images a step.
        learning_rate: of AdamW, without weight decay.
        prototype_learning_rate: the same for the class prototypes, which start where they nearly belong; None:
            `learning_rate`, as published.
        adam_epsilon: of AdamW.
        smallest_crop: least share of an image's area that augmentation keeps.
        text_weight, vision_weight: of the consistency losses.
        prototype_logit_weight: of the trained prototypes in predictions; 0, as published: they serve the loss alone.
        views: augmentations of each image, where what is below `start_layer` is cached.
        seed: of batches and augmentation.
        max_steps: stop after so many steps; None: after `epochs`.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 5e-3
    prototype_learning_rate: float | None = 1e-3
    adam_epsilon: float = 1e-8
    smallest_crop: float = 0.5
    text_weight: float = 4.0
    vision_weight: float = 3.0
    prototype_logit_weight: float = PROTOTYPE_LOGIT_WEIGHT
    views: int = 8
    seed: int = 1
    max_steps: int | None = None

    @classmethod
    def published(cls, **overrides) -> Recipe:
        """The recipe of the paper's released code, for `SEPConfig.published()`."""
        paper = {"epochs": 50, "learning_rate": 2.5e-3, "adam_epsilon": 1e-3, "smallest_crop": 0.08}
        paper |= {"text_weight": 8.0, "vision_weight": 6.0}
        paper |= {"prototype_learning_rate": None, "prototype_logit_weight": 0.0}
        return cls(**(paper | overrides))

    @classmethod
    def compact(cls, **overrides) -> Recipe:
        """The recipe that was tuned for `SEPConfig.compact()`."""
        return cls(**({"learning_rate": 1e-2, "text_weight": 2.0, "vision_weight": 1.5} | overrides))

    def __str__(self) -> str:
        length = f"{self.epochs} epochs" if self.max_steps is None else f"{self.max_steps} steps"
        own = self.prototype_learning_rate
        prototypes = "" if own is None else f" ({own:g} for the prototypes)"
        return (
            f"{length} of batches of {self.batch_size}, AdamW with learning rate {self.learning_rate:g}{prototypes}, "
            f"eps {self.adam_epsilon:g}, warm-up for one epoch, cosine; consistency weights {self.text_weight:g} and "
            f"{self.vision_weight:g}; prototypes predict with weight {self.prototype_logit_weight:g}; random crops "
            f"from {self.smallest_crop:.0%} of the area and flips"
        )
