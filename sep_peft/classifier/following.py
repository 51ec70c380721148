"""`Following`: tensors that follow a module to its device, without being buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Following(nn.Module):
    """A module whose tensors in `following` go where its parameters would.

    They belong to this process: DistributedDataParallel sends buffers to all processes before each forward, and where
    one of them has more of these than another, the processes mix them up or wait for each other for ever.
    """

    following: dict[str, torch.Tensor]

    def __init__(self):
        super().__init__()
        self.following = {}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What `to`, `cuda`, `half` and so on do to every tensor of a module."""
        self.following = {name: fn(tensor) for name, tensor in self.following.items()}
        return super()._apply(fn, recurse)
