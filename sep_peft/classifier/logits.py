"""From embeddings to logits, by the model's own scale and bias."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import NamedTuple

import torch

from ..method.heads import HeadLogits
from ..method.mix import wide
from ..tuner.offload import read_parameter
from ..tuner.tower import SEPTower
from .label_calibration import Sigmoids


class OwnTexts(NamedTuple):
    """Text embeddings of the classes that the images of a training batch belong to.

    Args:
        labels: (B,).
        embeds: of these classes, one for each image, (B, E), of unit length.
    """

    labels: torch.Tensor
    embeds: torch.Tensor

    def put(self, cosines: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Cosines (B, C) of images (B, E) and classes, with that of each image's own class computed with `embeds`."""
        own = (images * self.embeds).sum(dim=-1, keepdim=True).to(cosines.dtype)  # (B, 1)
        return cosines.scatter(1, self.labels[:, None], own)


class ClassWeights(NamedTuple):
    """What the C classes of a task give to their logits.

    Args:
        text_embeds: SEP's text embeddings, (C, E), of unit length.
        frozen_text_embeds: the frozen ones, (C, E), of unit length.
        prototypes: (C, E), whose products with the mean of SEP's and the frozen image embedding are added; None:
            nothing is.
        zero_shot_margin: how many times zero-shot's confidence counts beside SEP's; 0: SEP alone.
        temperature: that the logits are divided by, so that their softmax is right as often as it says.
        head: another head in the place of prototypes, whose logits are added; None: there is none.
        own: for a batch in training, what stands for each image's own class in the place of `text_embeds`; None:
            nothing does.
        sigmoids: where an image may have several classes, what makes logits into those of which the sigmoid is a
            probability; None: nothing does.
    """

    text_embeds: torch.Tensor
    frozen_text_embeds: torch.Tensor
    prototypes: torch.Tensor | None = None
    zero_shot_margin: float = 0.0
    temperature: float = 1.0
    head: HeadLogits | None = None
    own: OwnTexts | None = None
    sigmoids: Sigmoids | None = None


def class_logits(
    tower: SEPTower, embeds: torch.Tensor, frozen_embeds: torch.Tensor, weights: ClassWeights
) -> torch.Tensor:
    """Logits (B, C) of image embeddings, in fp32 or wider.

    With a margin of zero-shot the more confident of both decides each image (`more_confident`). The temperature comes
    last and changes no order; in its place sigmoids change none of the order of images by a class.

    Args:
        tower: of the images; its architecture names the scale and the bias of the model.
        embeds: SEP's image embeddings v, (B, E), of unit length.
        frozen_embeds: the frozen ones v0, (B, E), of unit length.
        weights: of the classes that the images are compared with.
    """
    cosines = embeds @ weights.text_embeds.T
    logits = scaled_cosines(tower, cosines if weights.own is None else weights.own.put(cosines, embeds))
    if weights.prototypes is not None:  # the loss compares W with v and with v0
        logits = logits + head_features(embeds, frozen_embeds) @ weights.prototypes.to(embeds.dtype).T
    if weights.head is not None:
        logits = logits + weights.head(head_features(embeds, frozen_embeds))
    if weights.zero_shot_margin:
        zero_shot = zero_shot_logits(tower, frozen_embeds, weights.frozen_text_embeds)
        logits = more_confident(logits, zero_shot, weights.zero_shot_margin)
    if weights.sigmoids is not None:
        return weights.sigmoids(logits)
    return logits if weights.temperature == 1 else logits / weights.temperature


def head_features(embeds: torch.Tensor, frozen_embeds: torch.Tensor) -> torch.Tensor:
    """What heads read of SEP's and the frozen image embeddings, both (B, E): their mean, (B, E)."""
    return torch.lerp(embeds, frozen_embeds.to(embeds.dtype), 0.5)


def zero_shot_logits(tower: SEPTower, frozen_embeds: torch.Tensor, frozen_text_embeds: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) of the frozen model: frozen image embeddings (B, E) and text embeddings (C, E) of unit length."""
    return scaled_cosines(tower, frozen_embeds @ frozen_text_embeds.T)


def more_confident(logits: torch.Tensor, zero_shot: torch.Tensor, margin: float) -> torch.Tensor:
    """``log max(p, m p0)`` of the probabilities p and p0 of both logits (B, C); its softmax is a probability again.

    For each image the more confident of the two decides, where zero-shot counts m times; m is above 0.
    """
    return torch.maximum(logits.log_softmax(dim=-1), zero_shot.log_softmax(dim=-1) + math.log(margin))


def scaled_cosines(tower: SEPTower, cosines: torch.Tensor) -> torch.Tensor:
    """Cosines (B, C) as the model scales them."""
    architecture, model = tower.architecture, tower.owner
    if architecture.logit_scale is None:
        return cosines
    scale = wide(read_parameter(model, architecture.logit_scale))
    if architecture.max_scale is not None:
        scale = scale.clamp(0.0, attrgetter(architecture.max_scale)(model))
    logits = {"exp": cosines * scale.exp(), "divide": cosines / scale, "multiply": cosines * scale}[architecture.scale]
    return logits if architecture.logit_bias is None else logits + wide(read_parameter(model, architecture.logit_bias))
