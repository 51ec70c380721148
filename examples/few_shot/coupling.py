"""MaPLe's coupling (arXiv 2210.03117): prompts of the image tower that are projected from those of the text tower.

While it trains, each prompt of the image tower is a linear projection of the text prompt of the same depth, one
projection a depth. Afterwards the projected prompts are kept as they are, so the adapter is one of independent prompts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from sep_peft.tuner.model import find_towers
from sep_peft.tuner.tower import SEPTower


class Projection(nn.Module):
    """In the place of image prompts (n, D_v): W t + b of the text prompts t (n, D_t).

    Args:
        texts: module whose parameter `name` has the text prompts; it stays a part of the text tower.
    """

    def __init__(self, texts: nn.Module, name: str, text_size: int, vision_size: int):
        super().__init__()
        self._texts = (texts, name)  # in a tuple, so that it does not become a child
        self.linear = nn.Linear(text_size, vision_size)

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        texts, name = self._texts
        return self.linear(getattr(texts, name))


def couple(model: nn.Module, adapter: str = "default") -> None:
    """Let the image prompts of an adapter be projections of its text prompts, until `uncouple`.

    Raises:
        ValueError: the prompts are not independent ones, or there are not as many of both towers, before as many
            layers.
    """
    text, vision = (_places(find_towers(model)[modality], adapter) for modality in ("text", "vision"))
    shapes = [[len(getattr(*place)) for place in places] for places in (text, vision)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Coupled prompts need as many of the text tower as of the image tower, but there are {shapes[0]} and "
            f"{shapes[1]} of them, layer by layer."
        )
    for (texts, name), (images, own) in zip(text, vision, strict=True):
        sizes = getattr(texts, name).shape[1], getattr(images, own).shape[1]
        getattr(images, own).requires_grad_(False)
        parametrize.register_parametrization(images, own, Projection(texts, name, *sizes))


def uncouple(model: nn.Module, adapter: str = "default") -> None:
    """Leave the image prompts as they are projected."""
    tower = find_towers(model)["vision"]
    for module, name in _places(tower, adapter):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        getattr(module, name).requires_grad_(True)


def _places(tower: SEPTower, adapter: str) -> list[tuple[nn.Module, str]]:
    """Modules and the names of their prompts, from the first layer on."""
    fusions = tower.sep_fusion[adapter] if adapter in tower.sep_fusion else {}
    if any(not hasattr(fusion, "prompts") for fusion in fusions.values()):
        raise ValueError('Coupled prompts need a config with fusion="independent", but these prompts are fused.')
    return [(tower.sep_prompts, adapter), *((fusion, "prompts") for fusion in fusions.values())]
