"""Losses of other methods that hold an adapter near the frozen model; SEP's own objective is in `losses`.

Sources:

- agreement and distances: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting"
  (PromptSRC), arXiv 2307.06948, whose weights are 1, 25 for texts and 10 for images.
- geometry: Park et al., "Relational Knowledge Distillation", arXiv 1904.05068, with cosines in the place of distances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .mix import unit, wide


def regularizers(
    logits: torch.Tensor,
    zero_shot_logits: torch.Tensor,
    image_embeds: torch.Tensor,
    frozen_image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    frozen_text_embeds: torch.Tensor,
    *,
    agreement_weight: float = 0.0,
    text_distance_weight: float = 0.0,
    vision_distance_weight: float = 0.0,
    geometry_weight: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of all, a scalar in fp32 or wider; a part with weight 0 costs nothing. ::

        w_a agreement(logits, logits_0) + w_t distance(t, t0) + w_v distance(v, v0)
          + w_g [geometry(t, t0) + geometry(v, v0)]

    Args:
        logits, zero_shot_logits: of the adapter's texts and of the frozen model, both (B, C).
        image_embeds, frozen_image_embeds: v and v0, both (B, E).
        text_embeds, frozen_text_embeds: t and t0, both (C, E).
    """
    total = torch.zeros((), dtype=wide(logits).dtype, device=logits.device)
    if agreement_weight:
        total = total + agreement_weight * agreement(logits, zero_shot_logits)
    if text_distance_weight:
        total = total + text_distance_weight * distance(text_embeds, frozen_text_embeds)
    if vision_distance_weight:
        total = total + vision_distance_weight * distance(image_embeds, frozen_image_embeds)
    if geometry_weight:
        texts, images = geometry(text_embeds, frozen_text_embeds), geometry(image_embeds, frozen_image_embeds)
        total = total + geometry_weight * (texts + images)
    return total


def agreement(logits: torch.Tensor, zero_shot_logits: torch.Tensor) -> torch.Tensor:
    """``KL(p0 || p) / C`` of the scores p and p0 of both logits (B, C), a mean over images, as PromptSRC has it."""
    scores, zero_shot = wide(logits).log_softmax(dim=1), wide(zero_shot_logits).log_softmax(dim=1)
    return F.kl_div(scores, zero_shot, log_target=True, reduction="sum") / logits.numel()


def distance(embeddings: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of embeddings (N, E) of unit length, over all channels."""
    return F.l1_loss(unit(wide(embeddings)), unit(wide(frozen)))


def geometry(embeddings: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the cosines between all pairs of N embeddings, with the adapter and without, (N, E).

    An adapter may turn all of them together; what lies near each other stays so. 0 of a single one.
    """
    cosines = [unit(wide(each)) @ unit(wide(each)).T for each in (embeddings, frozen)]  # (N, N)
    pairs = max(len(embeddings) * (len(embeddings) - 1), 1)  # the diagonal adds nothing
    return (cosines[0] - cosines[1]).square().sum() / pairs
