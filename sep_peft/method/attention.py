"""The attention of a fusion: n prompts look at K tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .low_rank import LowRankLinear, has_weights, low_rank_attention


#: Channels of one attention head; the number of heads of a tower of width D is D / 64.
HEAD_SIZE = 64


def num_heads(hidden_size: int) -> int:
    """Heads of the fusion attention: ``hidden_size / 64``, or the next smaller number that divides `hidden_size`."""
    heads = max(1, hidden_size // HEAD_SIZE)
    while hidden_size % heads:
        heads -= 1
    return heads


class FusionAttention(nn.Module):
    """Multi-head attention of n prompts over K tokens: ``softmax(QK^T / sqrt(head))V`` between projections.

    Args:
        hidden_size: D, width of the tower.
        rank: None for full projections (3 x D -> D and D -> D, with biases); r factors each of the four into
            D -> r -> D.
    """

    query: nn.Linear | LowRankLinear
    key: nn.Linear | LowRankLinear
    value: nn.Linear | LowRankLinear
    output: nn.Linear | LowRankLinear

    def __init__(self, hidden_size: int, rank: int | None = None, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads(hidden_size)
        #: Whether attention runs on r channels, which below the size of a head takes fewer operations.
        self.on_rank_channels = rank is not None and rank < hidden_size // self.num_heads
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("query", "key", "value", "output"):
            if rank is None:
                projection = nn.Linear(hidden_size, hidden_size, **kwargs)
            else:
                projection = LowRankLinear(hidden_size, hidden_size, rank, **kwargs)
            self.add_module(name, projection)

    def reset_parameters(self) -> None:
        for projection in (self.query, self.key, self.value, self.output):
            if isinstance(projection, LowRankLinear):
                projection.reset_parameters()
            else:
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def _split_heads(self, hidden: torch.Tensor) -> torch.Tensor:
        # (B, T, D) -> (B, heads, T, D / heads)
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """query (B, n, D) and tokens (B, K, D) -> (B, n, D)."""
        maps = {f"{name}_map": getattr(self, name) for name in ("query", "key", "value", "output")}
        if self.on_rank_channels and all(has_weights(each.up) for each in maps.values()):
            return low_rank_attention(query, tokens, **maps, num_heads=self.num_heads)
        q, k, v = (self._split_heads(x) for x in (self.query(query), self.key(tokens), self.value(tokens)))
        attended = F.scaled_dot_product_attention(q, k, v)
        # (B, heads, n, D / heads) -> (B, n, D)
        return self.output(attended.transpose(1, 2).flatten(-2))

    def weights(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The attention weights themselves, (B, heads, n, K), for inspection; rows sum to 1."""
        q, k = self._split_heads(self.query(query)), self._split_heads(self.key(tokens))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
