"""From embeddings to logits, by the model's own scale and bias."""

from __future__ import annotations

from operator import attrgetter

import torch

from .functional import wide
from .tower import SEPTower


def logits_of(
    tower: SEPTower, image: torch.Tensor, text: torch.Tensor, prototype_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits (B, C), in fp32 or wider.

    Args:
        tower: of the images; its row knows the scale and the bias of the model.
        image: (B, E), of unit length.
        text: (C, E), of unit length.
        prototype_weights: (C, E), whose products with `image` are added.
    """
    row, model = tower.architecture, tower.owner
    cosines = image @ text.T
    added = 0 if prototype_weights is None else image @ prototype_weights.to(image.dtype).T
    if row.logit_scale is None:
        return cosines + added
    scale = wide(attrgetter(row.logit_scale)(model))
    if row.max_scale is not None:
        scale = scale.clamp(0.0, attrgetter(row.max_scale)(model))
    logits = {"exp": cosines * scale.exp(), "divide": cosines / scale, "multiply": cosines * scale}[row.scale]
    return added + (logits if row.logit_bias is None else logits + wide(attrgetter(row.logit_bias)(model)))
