"""An ablation of SEP: tokens drawn at random stand in for the representative ones."""

from __future__ import annotations

import torch
from torch import nn

from sep_peft.method.select import Selection
from sep_peft.tuner.model import find_towers


class RandomSelection(Selection):
    """Draws tokens at random: of images any distinct ones, of texts any between the first candidate and the end.

    Args:
        seed: of the generator of its own, so a run can be repeated.
    """

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def of_images(self, tokens: torch.Tensor, count: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        order = torch.rand(tokens.shape[:2], generator=self.generator).argsort(dim=1)  # (B, L)
        return order[:, :count].to(tokens.device)

    def of_texts(self, first: torch.Tensor, last: torch.Tensor, length: int, count: int) -> torch.Tensor:
        share = torch.rand((len(first), count), generator=self.generator).to(first.device)
        return first[:, None] + (share * (last - first + 1)[:, None]).long()  # (B, count)


def select_at_random(model: nn.Module) -> None:
    """Let all fusions of a SEP model read random tokens; both towers draw from one generator."""
    selection = RandomSelection()
    for tower in find_towers(model).values():
        tower.selection = selection
