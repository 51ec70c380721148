"""Projections of low rank, and attention between such projections computed on their channels.

An optimization: `attention.FusionAttention` gives the same result with full matrices.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Factor(Protocol):
    """A linear map ``x W^T + b``: W is (out, in), or (B, out, in) where each of B inputs has its own, and so is b."""

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor: ...


class FactoredMap(Protocol):
    """D -> r -> D: a `LowRankLinear`, or those of several adapters for one batch (see `stacked`)."""

    @property
    def down(self) -> Factor: ...

    @property
    def up(self) -> Factor: ...

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor: ...


class LowRankLinear(nn.Module):
    """A linear map whose weight is factored: ``y = up(down(x))`` with ``rank`` channels in between.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width in between, at least 1.
        bias: adds a learned vector (out_features,) after the second factor.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden))


def has_weights(layer: nn.Module) -> bool:
    """Whether the weights can be read: not where a quantized layer has taken the place, nor where something brings them
    from elsewhere when the layer runs."""
    weight = layer.weight
    return isinstance(weight, torch.Tensor) and not weight.is_meta


def low_rank_attention(
    query: torch.Tensor,
    tokens: torch.Tensor,
    *,
    query_map: FactoredMap,
    key_map: FactoredMap,
    value_map: FactoredMap,
    output_map: FactoredMap,
    num_heads: int,
) -> torch.Tensor:
    """Multi-head attention between factored projections, computed on r channels instead of D.

    With ``q = U_q a + b_q``, ``k = U_k b + b_k`` and ``v = U_v c + b_v``, where a, b and c have r channels, and after
    the attention a first factor D_o, head h needs only two small matrices of its own::

        q_h . k_h = b~ . (A_h a~)       A_h = [U_k b_k]_h^T [U_q b_q]_h       x~ = (x, 1)
        D_o v     = sum_h B_h c~        B_h = D_o,h [U_v b_v]_h

    All heads thus attend to the same tokens b~ with the same values c~: heads are further queries. It is the same map.
    Where r is below the size of a head it takes fewer operations, and nothing but its result is as wide as the tower,
    which counts where a step encodes the texts of many classes.

    Args:
        query: (B, n, D).
        tokens: (B, K, D).
        query_map, key_map, value_map, output_map: D -> r -> D, with biases; the shapes below are those of maps that all
            inputs share, and where each has its own, all weights have B in front.
        num_heads: of the attention; a divisor of D.

    Returns:
        (B, n, D).
    """
    head_size = output_map.up.out_features // num_heads

    def up(projection: FactoredMap) -> torch.Tensor:
        """The second factor with its bias as last column, for each head, (heads, D / heads, r + 1)."""
        assert projection.up.bias is not None
        weight = torch.cat([projection.up.weight, projection.up.bias[..., None]], dim=-1)  # (D, r + 1)
        return weight.unflatten(-2, (num_heads, -1))

    low = tokens @ torch.cat([key_map.down.weight, value_map.down.weight], dim=-2).mT  # (B, K, 2 r)
    keys, values = (_with_one(x) for x in low.chunk(2, dim=-1))  # (B, K, r + 1)
    per_head = (up(key_map).mT @ up(query_map)).flatten(-3, -2)  # A_h of all heads, (heads (r + 1), r + 1)
    queries = _with_one(query_map.down(query)) @ per_head.mT  # (B, n, heads (r + 1))
    queries = queries.unflatten(-1, (num_heads, -1)).flatten(1, 2)  # (B, n heads, r + 1)
    q, k, v = (x.unsqueeze(1) for x in (queries, keys, values))  # as one head, (B, 1, ..., r + 1)
    attended = F.scaled_dot_product_attention(q, k, v, scale=head_size**-0.5).squeeze(1)  # (B, n heads, r + 1)
    attended = attended.unflatten(1, (-1, num_heads)).flatten(2)  # (B, n, heads (r + 1))
    down = output_map.down.weight.unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (heads, r, D / heads)
    per_head = (down @ up(value_map)).transpose(-3, -2).flatten(-2)  # B_h of all heads, (r, heads (r + 1))
    return output_map.up(attended @ per_head.mT)


def _with_one(x: torch.Tensor) -> torch.Tensor:
    """(..., r) -> (..., r + 1), with 1 in the last place."""
    return F.pad(x, (0, 1), value=1.0)
