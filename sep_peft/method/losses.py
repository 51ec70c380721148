"""The training objective of SEP as a pure function.

Source: arXiv 2405.15549, as its released code (https://github.com/htyao89/SEP) computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .mix import unit
from .recipe import Recipe


#: Scale of the cosines in the prototype terms.
PROTOTYPE_SCALE = 10.0


class SEPLoss(NamedTuple):
    """The loss and its parts, all scalars; each part is weighted already, so `total` is their sum.

    A recipe's `regularizers` are in `total` alone.
    """

    total: torch.Tensor
    classification: torch.Tensor
    text_consistency: torch.Tensor
    vision_consistency: torch.Tensor
    prototypes: torch.Tensor


def consistency(embeddings: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """``1 - mean cos(embeddings, frozen)``, both (N, E); 0 where they point the same way."""
    return 1 - (unit(embeddings) * unit(frozen)).sum(dim=-1).mean()


def prototype_loss(embeddings: torch.Tensor, prototypes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``CE(10 cos(embeddings, prototypes), labels)``: embeddings (B, E), prototypes (C, E), labels (B,)."""
    return F.cross_entropy(PROTOTYPE_SCALE * unit(embeddings) @ unit(prototypes).T, labels)


def sep_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    image_embeds: torch.Tensor,
    frozen_image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    frozen_text_embeds: torch.Tensor,
    prototypes: torch.Tensor | None = None,
    *,
    classification_weight: float = Recipe.classification_weight,
    text_weight: float = Recipe.text_weight,
    vision_weight: float = Recipe.vision_weight,
    prototype_weight: float = Recipe.prototype_weight,
) -> SEPLoss:
    """The published objective, with the weights of `Recipe` unless told otherwise::

        L = w_c CE(logits, y)
          + w_t (1 - mean_c cos(t_c, t0_c)) + w_v (1 - mean_b cos(v_b, v0_b))
          + w_p [CE(10 cos(v, W), y) + CE(10 cos(v0, W), y)]

    Args:
        logits: (B, C), scaled by the model's logit scale.
        labels: (B,) class indices y.
        image_embeds: v, (B, E), SEP's image embeddings.
        frozen_image_embeds: v0, (B, E), of the frozen tower.
        text_embeds: t, (C, E), SEP's text embeddings.
        frozen_text_embeds: t0, (C, E), of the frozen tower, usually from a template.
        prototypes: W, (C, E), one trained vector a class; None leaves the prototype terms out.
        classification_weight: w_c. Default 1, as published.
        text_weight: w_t. Default 4; ``**Recipe.published().loss_weights`` gives the paper's 8, 6 and 0.5.
        vision_weight: w_v. Default 0.
        prototype_weight: w_p. Default 0.5.

    Returns:
        SEPLoss. A part with weight 0 is 0 and costs nothing. Everything is computed in fp32 or wider.

    Raises:
        ValueError: a shape does not fit the others.
    """
    check_embeds(logits, image_embeds, frozen_image_embeds, text_embeds, frozen_text_embeds, prototypes)
    check_shape("labels", labels, logits.shape[:1], logits)
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=wide, device=logits.device)
    classification = zero
    if classification_weight:
        classification = classification_weight * F.cross_entropy(logits.to(wide), labels)
    text = text_weight * consistency(text_embeds.to(wide), frozen_text_embeds.to(wide)) if text_weight else zero
    vision = vision_weight * consistency(image_embeds.to(wide), frozen_image_embeds.to(wide)) if vision_weight else zero
    anchors = zero
    if prototypes is not None and prototype_weight:
        anchors = prototype_weight * (
            prototype_loss(image_embeds.to(wide), prototypes.to(wide), labels)
            + prototype_loss(frozen_image_embeds.to(wide), prototypes.to(wide), labels)
        )
    return SEPLoss(classification + text + vision + anchors, classification, text, vision, anchors)


def check_embeds(logits, image, frozen_image, text, frozen_text, prototypes) -> None:
    """
    Raises:
        ValueError: logits are no (B, C), or embeddings or prototypes do not fit them.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (B, C), got {tuple(logits.shape)}.")
    batch, classes = logits.shape
    expected = {
        "image_embeds": (image, (batch, image.shape[-1])),
        "frozen_image_embeds": (frozen_image, tuple(image.shape)),
        "text_embeds": (text, (classes, text.shape[-1])),
        "frozen_text_embeds": (frozen_text, tuple(text.shape)),
    }
    if prototypes is not None:
        expected["prototypes"] = (prototypes, (classes, image.shape[-1]))
    for name, (tensor, shape) in expected.items():
        check_shape(name, tensor, shape, logits)


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int], logits: torch.Tensor) -> None:
    """
    Raises:
        ValueError: a tensor has another shape than it needs beside logits.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} beside logits {tuple(logits.shape)}, got {tuple(tensor.shape)}."
        )
