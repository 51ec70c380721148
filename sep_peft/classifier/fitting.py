"""Heads fitted on batches of training images, by an adapter as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..method.fit_heads import class_means, fit_head
from ..method.losses import PROTOTYPE_SCALE
from ..method.mix import unit
from ..method.recipe import PROTOTYPE_LOGIT_WEIGHT
from ..tuner.tower import SEPTower
from .class_encoder import ClassEncoder
from .classes import TaskClasses
from .inputs import check_labels, check_targets, labels_in
from .logits import ClassWeights, class_logits, head_features, zero_shot_logits
from .prediction import image_embeds


def labelled_embeds(
    tower: SEPTower, batch: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`image_embeds` of a batch with labels, which the tower does not take: two of (B, E)."""
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    return image_embeds(tower, inputs)


@torch.no_grad()
def fitted_classes(
    kind: str,
    tower: SEPTower,
    encoder: ClassEncoder,
    batches: Iterable[Mapping[str, torch.Tensor]],
    device: torch.device,
    logit_weight: float | None = None,
    prototype_weights: torch.Tensor | None = None,
) -> TaskClasses:
    """The classes of an encoder with a head that is fitted anew; nothing else of them is changed.

    Args:
        kind: "prototypes", which are then the class means, or one of `sep_peft.method.heads.NAMES`.
        tower: of the images, in evaluation.
        encoder: of the classes.
        batches: dicts with `pixel_values`, what else the tower takes, and `labels` (B,), of the training images.
        device: of the model.
        logit_weight: of the head's logits; None: what `fit_head` chooses. Prototypes keep theirs.
        prototype_weights: (C, E), which make the trained prototypes into logits, for "prototypes-gda"; None: those of
            the class means, with the default weight.

    Raises:
        ValueError: there are no batches, one has no labels, a label is no class, a class has no image, or an embedding
            is not finite.
    """
    embeds, own, frozen, labels = [], [], [], []
    check = check_targets if encoder.classes.multi_label else check_labels
    for batch in batches:
        check(labels_in(batch), len(encoder.classes))
        both = labelled_embeds(tower, batch, device)
        embeds.append(head_features(*both))
        own.append(both[0])
        frozen.append(both[1])
        labels.append(batch["labels"].to(device, torch.long))
    if not embeds:
        raise ValueError(f"batches of the training images are needed for kind={kind!r}, but there are none.")
    features, told = torch.cat(embeds), torch.cat(labels)
    if not features.isfinite().all():
        raise ValueError(
            "Embeddings of the training images are not finite, so there is nothing to learn from them. Train with a "
            "lower learning rate."
        )
    if kind == "prototypes":
        means = class_means(features, told, len(encoder.classes))  # (C, E)
        if missing := (means == 0).all(dim=1).nonzero()[:, 0].tolist():
            raise ValueError(f"Prototypes need an image of every class, but there is none of classes {missing}.")
        return replace(encoder.classes, prototypes=unit(means).cpu())
    weights = encoder.weights(training=False)
    zero_shot = zero_shot_logits(tower, torch.cat(frozen), weights.frozen_text_embeds)
    texts = ClassWeights(weights.text_embeds, weights.frozen_text_embeds)
    text_logits = class_logits(tower, torch.cat(own), torch.cat(frozen), texts)
    if kind == "prototypes-gda" and prototype_weights is None:
        means = unit(class_means(features, told, len(encoder.classes)))  # (C, E)
        prototype_weights = PROTOTYPE_LOGIT_WEIGHT * PROTOTYPE_SCALE * means
    head = fit_head(kind, features, told, weights.text_embeds, zero_shot, logit_weight, text_logits, prototype_weights)
    head = replace(head, tensors={name: value.cpu() for name, value in head.tensors.items()})
    return replace(encoder.classes, prototypes=None, prototype_logit_weight=0.0, head=head)
