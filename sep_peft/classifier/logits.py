"""From embeddings to logits, by the model's own scale and bias."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import NamedTuple

import torch

from ..method.mix import wide
from ..tuner.tower import SEPTower


class ClassWeights(NamedTuple):
    """What the C classes of a task give to their logits.

    Args:
        text: SEP's text embeddings, (C, E), of unit length.
        frozen_text: the frozen ones, (C, E), of unit length.
        prototypes: (C, E), whose products with the mean of SEP's and the frozen image embedding are added; None:
            nothing is.
        zero_shot_margin: how many times zero-shot's confidence counts beside SEP's; 0: SEP alone.
    """

    text: torch.Tensor
    frozen_text: torch.Tensor
    prototypes: torch.Tensor | None = None
    zero_shot_margin: float = 0.0


def logits_of(tower: SEPTower, image: torch.Tensor, frozen_image: torch.Tensor, classes: ClassWeights) -> torch.Tensor:
    """Logits (B, C), in fp32 or wider.

    With a margin of zero-shot the more confident of both decides each image (`more_confident`).

    Args:
        tower: of the images; its row knows the scale and the bias of the model.
        image: SEP's image embeddings v, (B, E), of unit length.
        frozen_image: the frozen ones v0, (B, E), of unit length.
        classes: what the images are compared with.
    """
    logits = _scaled(tower, image @ classes.text.T)
    if classes.prototypes is not None:
        both = torch.lerp(image, frozen_image.to(image.dtype), 0.5)  # the loss compares W with v and with v0
        logits = logits + both @ classes.prototypes.to(image.dtype).T
    if classes.zero_shot_margin:
        zero_shot = _scaled(tower, frozen_image @ classes.frozen_text.T)
        logits = more_confident(logits, zero_shot, classes.zero_shot_margin)
    return logits


def more_confident(logits: torch.Tensor, zero_shot: torch.Tensor, margin: float) -> torch.Tensor:
    """``log max(p, m p0)`` of the probabilities p and p0 of both logits (B, C); its softmax is a probability again.

    For each image the more confident of the two decides, where zero-shot counts m times; m is above 0.
    """
    return torch.maximum(logits.log_softmax(dim=-1), zero_shot.log_softmax(dim=-1) + math.log(margin))


def _scaled(tower: SEPTower, cosines: torch.Tensor) -> torch.Tensor:
    """Cosines (B, C) as the model scales them."""
    row, model = tower.architecture, tower.owner
    if row.logit_scale is None:
        return cosines
    scale = wide(attrgetter(row.logit_scale)(model))
    if row.max_scale is not None:
        scale = scale.clamp(0.0, attrgetter(row.max_scale)(model))
    logits = {"exp": cosines * scale.exp(), "divide": cosines / scale, "multiply": cosines * scale}[row.scale]
    return logits if row.logit_bias is None else logits + wide(attrgetter(row.logit_bias)(model))
