"""Weights averaged over epochs, so that a training does not end on its last steps alone.

Source: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting" (PromptSRC), arXiv
2307.06948, Gaussian weighted prompt aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..method.base_recipe import BaseRecipe


def share_of_epoch(epoch: int, epochs: int, recipe: BaseRecipe) -> float:
    """How much the weights of an epoch count in the average of those up to it. ::

        w_e / (w_1 + ... + w_e),   w_i = exp(-(i - c E)^2 / (2 (s E)^2))

    Args:
        epoch: e, from 1.
        epochs: E, of the whole training.
        recipe: gives c, `average_center`, and s, `average_width`.
    """
    assert recipe.average_center is not None, "the caller averages"
    center, width = recipe.average_center * epochs, recipe.average_width * epochs
    logs = [-((i - center) ** 2) / (2 * width**2) for i in range(1, epoch + 1)]
    largest = max(logs)  # all may be too small for a float
    return math.exp(logs[-1] - largest) / sum(math.exp(log - largest) for log in logs)


@torch.no_grad()
def averaged(
    before: Mapping[str, torch.Tensor] | None, weights: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """The average with another epoch's weights.

    Args:
        before: name -> the average so far; None: there is none.
        weights: name -> those of the epoch.
        share: theirs in the new average.
    """
    if before is None:
        return {name: value.clone() for name, value in weights.items()}
    return {name: torch.lerp(before[name].to(value), value, share) for name, value in weights.items()}
