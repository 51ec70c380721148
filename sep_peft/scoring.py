"""From embeddings to logits, by the model's own scale and bias."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch

from .functional import wide
from .tower import SEPTower


class ClassWeights(NamedTuple):
    """What the C classes of a task give to their logits.

    Args:
        text: SEP's text embeddings, (C, E), of unit length.
        frozen_text: the frozen ones, (C, E), of unit length.
        prototypes: (C, E), whose products with the mean of SEP's and the frozen image embedding are added; None:
            nothing is.
        zero_shot_share: share of the frozen embeddings' cosines, between 0 and 1.
    """

    text: torch.Tensor
    frozen_text: torch.Tensor
    prototypes: torch.Tensor | None = None
    zero_shot_share: float = 0.0


def logits_of(tower: SEPTower, image: torch.Tensor, frozen_image: torch.Tensor, classes: ClassWeights) -> torch.Tensor:
    """Logits (B, C), in fp32 or wider.

    With the share s of zero-shot, the cosines are ``(1 - s) cos(v, t_c) + s cos(v0, t0_c)``, frozen embeddings v0, t0.

    Args:
        tower: of the images; its row knows the scale and the bias of the model.
        image: SEP's image embeddings, (B, E), of unit length.
        frozen_image: the frozen ones, (B, E), of unit length.
        classes: what the images are compared with.
    """
    row, model = tower.architecture, tower.owner
    cosines = image @ classes.text.T
    if classes.zero_shot_share:
        cosines = torch.lerp(cosines, frozen_image @ classes.frozen_text.T, classes.zero_shot_share)
    added = 0
    if classes.prototypes is not None:
        added = torch.lerp(image, frozen_image.to(image.dtype), 0.5) @ classes.prototypes.to(image.dtype).T
    if row.logit_scale is None:
        return cosines + added
    scale = wide(attrgetter(row.logit_scale)(model))
    if row.max_scale is not None:
        scale = scale.clamp(0.0, attrgetter(row.max_scale)(model))
    logits = {"exp": cosines * scale.exp(), "divide": cosines / scale, "multiply": cosines * scale}[row.scale]
    return added + (logits if row.logit_bias is None else logits + wide(attrgetter(row.logit_bias)(model)))
