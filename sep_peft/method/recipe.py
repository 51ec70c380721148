"""How an adapter is trained and what its classifier does afterwards: settings alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from ..words import counted
from .base_recipe import BaseRecipe, is_int, is_number


#: Weight of the kept prototypes' logits in predictions, chosen on validation images by `examples/few_shot`.
PROTOTYPE_LOGIT_WEIGHT = 5.0
#: How many times zero-shot's confidence counts where classes were not trained, compared there as well: the more
#: confident of both decides.
ZERO_SHOT_MARGIN = 1.0
#: Weights of losses that are no part of SEP; see `sep_peft.method.regularizers`.
REGULARIZER_WEIGHTS = ("agreement_weight", "text_distance_weight", "vision_distance_weight", "geometry_weight")
#: Classes from which on a step draws some of their texts, and how many; see `Recipe.class_sample`.
MANY_CLASSES, CLASS_SAMPLE = 256, 64
#: What the paper's released code uses, whatever the defaults of `Recipe` are.
PUBLISHED: dict[str, Any] = {
    "epochs": 50,
    "learning_rate": 2.5e-3,
    "prototype_learning_rate": None,
    "adam_epsilon": 1e-3,
    "smallest_crop": 0.08,
    "text_weight": 8.0,
    "vision_weight": 6.0,
    "prototype_weight": 0.5,
    "prototype_logit_weight": 0.0,
    "zero_shot_margin": 0.0,
    "calibration_folds": 0,
    "class_sample": 0,
}
#: Where image embeddings are to find images of the same class: prototypes alone teach them, and a whitening follows.
RETRIEVAL: dict[str, Any] = {
    "epochs": 12,
    "learning_rate": 2e-2,
    "classification_weight": 0.0,
    "vision_weight": 0.0,
    "prototype_weight": 1.0,
    "calibration_folds": 0,
    "whiten": True,
}
#: What was tuned for `SEPConfig.compact()`, where it differs from the defaults.
COMPACT: dict[str, Any] = {"learning_rate": 1e-2, "text_weight": 2.0, "vision_weight": 1.5}


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """How to train, and what the classifier does afterwards.

    `SEPClassifier`, `fit`, the command line and `examples/few_shot` all read it. The defaults are those that
    `examples/few_shot` tuned for the default `SEPConfig` on validation images.

    Args:
        epochs, batch_size, learning_rate, adam_epsilon, weight_decay, warmup_epochs, max_steps, smallest_crop,
            average_center, average_width, seed: as `BaseRecipe` has them.
        prototype_learning_rate: that of the class prototypes, which start where they nearly belong; None:
            `learning_rate`, as published. Default 1e-3.
        views: augmentations of each image, where what training does not change is cached; epoch e shows view
            ``e mod views``, so with as many views as epochs training is what it is without a cache. Default 8.
        classification_weight: of the cross entropy among the class texts; 0: class texts teach the images nothing.
            Default 1, as published.
        text_weight, vision_weight: of the consistency losses. Defaults 4 and 0.
        prototype_weight: of the prototype terms of the loss; 0: there are no prototypes. Default 0.5.
        agreement_weight: of the divergence between the scores of the texts and those of zero-shot, in the loss.
        text_distance_weight, vision_distance_weight: of the absolute differences from the frozen embeddings; with 25
            and 10, and an agreement of 1, those of PromptSRC (arXiv 2307.06948).
        geometry_weight: of the differences between the cosines of pairs, with the adapter and without. Default of all
            four 0, as published; see `sep_peft.method.regularizers`.
        prototype_logit_weight: of the trained prototypes in predictions; 0, as published: they serve the loss alone.
            Default 5.
        zero_shot_margin: for classes that were not trained zero-shot decides each image unless SEP is more than so
            many times as confident; 0, as published: SEP decides alone. Default 1: the more confident of both decides.
        calibration_folds: parts of the training images on which scores are calibrated where there are no held-out
            images: for each part the adapter is trained a third as long on the others. 0, as published: scores are the
            softmax of the logits as they are. Default 4.
        negative_focus: where an image may have several classes, how much less those count in the loss that it does
            not have and that are told already, 2 to 4 in its paper; 0 is binary cross entropy. See `asymmetric_loss`.
            Default 0, which had the better mean average precision on validation images (docs/labels.md).
        class_sample: class texts that a step draws and encodes, beside those of its images' own classes; the others
            take part by their last embeddings, so that a step's cost does not grow with the number of classes. 0, as
            published: every step encodes all. Default None: 64 where there are more than 256 classes, otherwise all.
        whiten: whether `fit` ends with a whitening of the image embeddings, for searching images by images; see
            `SEPClassifier.fit_whitening`. Default False.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    AFTERWARDS: ClassVar[frozenset[str]] = frozenset({"zero_shot_margin", "calibration_folds", "whiten"})
    UNKNOWN: ClassVar[Mapping[str, Any]] = {
        **BaseRecipe.UNKNOWN,
        **dict.fromkeys(REGULARIZER_WEIGHTS, 0.0),
        "negative_focus": 0.0,
        "class_sample": 0,
        "classification_weight": 1.0,
    }

    _: KW_ONLY
    prototype_learning_rate: float | None = 1e-3
    views: int = 8
    classification_weight: float = 1.0
    text_weight: float = 4.0
    vision_weight: float = 0.0
    prototype_weight: float = 0.5
    agreement_weight: float = 0.0
    text_distance_weight: float = 0.0
    vision_distance_weight: float = 0.0
    geometry_weight: float = 0.0
    prototype_logit_weight: float = PROTOTYPE_LOGIT_WEIGHT
    zero_shot_margin: float = ZERO_SHOT_MARGIN
    calibration_folds: int = 4
    negative_focus: float = 0.0
    class_sample: int | None = None
    whiten: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.require("views", lambda v: is_int(v) and v >= 1, "an integer of at least 1")
        self.require("calibration_folds", lambda v: is_int(v) and v >= 0 and v != 1, "0 or an integer of at least 2")
        self.require("class_sample", lambda v: v is None or (is_int(v) and v >= 0), "None or an integer of at least 0")
        self.require(
            "prototype_learning_rate",
            lambda v: v is None or (is_number(v) and v >= 0),
            "None or a finite number of at least 0",
        )
        self.require("whiten", lambda v: isinstance(v, bool), "True or False")
        weights = (
            "classification_weight",
            "text_weight",
            "vision_weight",
            "prototype_weight",
            "prototype_logit_weight",
        )
        for name in (*weights, *REGULARIZER_WEIGHTS, "zero_shot_margin", "negative_focus"):
            self.require(name, lambda v: is_number(v) and v >= 0, "a finite number of at least 0")

    @classmethod
    def published(cls, **overrides) -> Recipe:
        """The recipe of the paper's released code, for `SEPConfig.published()`.

        Args:
            overrides: settings that differ.
        """
        return cls(**(PUBLISHED | overrides))

    @classmethod
    def compact(cls, **overrides) -> Recipe:
        """The recipe that was tuned for `SEPConfig.compact()`.

        Args:
            overrides: settings that differ.
        """
        return cls(**(COMPACT | overrides))

    @classmethod
    def retrieval(cls, **overrides) -> Recipe:
        """For finding images by images, with `SEPConfig.retrieval()`: search gains what classification gains.

        Each image is drawn to the prototype of its class and away from the others, which are proxies of the images:
        the cross entropy over their cosines (ProxyNCA++, arXiv 2004.01113; Zhai and Wu, arXiv 1811.12649). No class
        text takes part, and texts stay as the frozen model has them. A whitening of the embeddings follows, which the
        training images teach (`sep_peft.method.whitening`).

        Args:
            overrides: settings that differ.
        """
        return cls(**(RETRIEVAL | overrides))

    @property
    def own_learning_rates(self) -> dict[str, float]:
        """That of the prototypes, where they have one."""
        own = self.prototype_learning_rate
        return {} if own is None else {"prototypes": own}

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights that `sep_loss` takes, by its names for them."""
        names = ("classification_weight", "text_weight", "vision_weight", "prototype_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def regularizer_weights(self) -> dict[str, float]:
        """The weights that `regularizers` takes, by its names for them; only those above 0."""
        return {name: weight for name in REGULARIZER_WEIGHTS if (weight := getattr(self, name))}

    def drawn_classes(self, num_classes: int) -> int:
        """Class texts that a step draws of `num_classes`, as `class_sample` says; `num_classes` where it takes all."""
        size = self.class_sample
        if size is None:
            size = CLASS_SAMPLE if num_classes > MANY_CLASSES else 0
        return min(size or num_classes, num_classes)

    def __str__(self) -> str:
        length = counted(self.epochs, "epoch") if self.max_steps is None else counted(self.max_steps, "step")
        own = self.prototype_learning_rate
        prototypes = "" if own is None else f" ({own:g} for the prototypes)"
        warmup = "one epoch" if self.warmup_epochs == 1 else f"{self.warmup_epochs} epochs"
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        others = "".join(f", {name.replace('_', ' ')} {weight:g}" for name, weight in self.regularizer_weights.items())
        center = self.average_center
        average = "" if center is None else f"; averaged over epochs around {center:.0%} of them"
        return (
            f"{length} of batches of {self.batch_size}, AdamW with learning rate {self.learning_rate:g}{prototypes}, "
            f"eps {self.adam_epsilon:g}{decay}, warm-up for {warmup}, cosine; consistency weights "
            f"{self.text_weight:g} and {self.vision_weight:g}{others}; prototypes predict with weight "
            f"{self.prototype_logit_weight:g}; random crops from {self.smallest_crop:.0%} of the area and flips"
            f"{average}"
        )
