"""The training objective where an image may have several of the classes, as a pure function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .losses import PROTOTYPE_SCALE, SEPLoss, check_embeds, check_shape, consistency
from .mix import unit, wide
from .recipe import Recipe


def asymmetric_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, focus: float = Recipe.negative_focus, shift: float = 0.0
) -> torch.Tensor:
    """The asymmetric loss of several labels, a scalar: the sum over classes, the mean over images. ::

        -mean_b sum_c [ y log p + (1 - y) q^f log(1 - q) ],   p = sigmoid(logits),   q = max(p - s, 0)

    Ridnik et al., "Asymmetric Loss For Multi-Label Classification" (arXiv 2009.14119), with its focus of positive
    labels at 0. An image has few of many classes, so that absent ones would outweigh what is there; the focus f takes
    weight from those that are told already, the shift s lets go of those below it. f = s = 0 is binary cross entropy.

    Args:
        logits: (B, C).
        targets: (B, C), y, 1 for the labels of an image and 0 for the other classes.
        focus: f, of the absent classes. Default 0; the paper takes 4.
        shift: s, from 0 to below 1. Default 0; the paper takes 0.05.
    """
    logits, targets = wide(logits), targets.to(wide(logits).dtype)
    absent = F.logsigmoid(-logits)
    weight = torch.ones_like(logits)
    if focus or shift:
        shifted = (logits.sigmoid() - shift).clamp_min(0)
        absent = torch.log1p(-shifted) if shift else absent
        weight = shifted**focus
    return -(targets * F.logsigmoid(logits) + (1 - targets) * weight * absent).sum(dim=1).mean()


def label_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    image_embeds: torch.Tensor,
    frozen_image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    frozen_text_embeds: torch.Tensor,
    prototypes: torch.Tensor | None = None,
    prototype_biases: torch.Tensor | None = None,
    *,
    focus: float = Recipe.negative_focus,
    classification_weight: float = Recipe.classification_weight,
    text_weight: float = Recipe.text_weight,
    vision_weight: float = Recipe.vision_weight,
    prototype_weight: float = Recipe.prototype_weight,
) -> SEPLoss:
    """`sep_loss` with the asymmetric loss in the place of each cross entropy::

        L = w_c A(logits, y)
          + w_t (1 - mean_c cos(t_c, t0_c)) + w_v (1 - mean_b cos(v_b, v0_b))
          + w_p [A(10 cos(v, W) + b, y) + A(10 cos(v0, W) + b, y)]

    Args:
        logits: (B, C), of which the sigmoid is a probability.
        targets: (B, C), y, 1 for the labels of an image and 0 for the other classes.
        image_embeds, frozen_image_embeds, text_embeds, frozen_text_embeds, prototypes: as for `sep_loss`.
        prototype_biases: b, (C,), because a cosine alone says nothing of how frequent a class is; needed beside
            `prototypes`.
        focus: of the absent classes, as for `asymmetric_loss`.
        classification_weight, text_weight, vision_weight, prototype_weight: as for `sep_loss`.

    Returns:
        SEPLoss. A part with weight 0 is 0 and costs nothing. Everything is computed in fp32 or wider.

    Raises:
        ValueError: a shape does not fit the others.
    """
    check_embeds(logits, image_embeds, frozen_image_embeds, text_embeds, frozen_text_embeds, prototypes)
    check_shape("targets", targets, logits.shape, logits)
    logits = wide(logits)
    zero = logits.new_zeros(())
    classification = zero
    if classification_weight:
        classification = classification_weight * asymmetric_loss(logits, targets, focus=focus)
    text = text_weight * consistency(wide(text_embeds), wide(frozen_text_embeds)) if text_weight else zero
    vision = vision_weight * consistency(wide(image_embeds), wide(frozen_image_embeds)) if vision_weight else zero
    anchors = zero
    if prototypes is not None and prototype_biases is not None and prototype_weight:
        weights, biases = PROTOTYPE_SCALE * unit(wide(prototypes)), wide(prototype_biases)
        for embeds in (image_embeds, frozen_image_embeds):
            told = F.linear(unit(wide(embeds)), weights, biases)  # (B, C)
            anchors = anchors + prototype_weight * asymmetric_loss(told, targets, focus=focus)
    return SEPLoss(classification + text + vision + anchors, classification, text, vision, anchors)
