"""What fusions read in the place of representative tokens: random ones, means, or noise.

They take from the method what it owes its tokens to, and so measure it: the same modules read tokens that were not
chosen (`ScatteredSelection`), averages of all of them (`segment_means`), or nothing of the input (`noise_tokens`).
Prompts made from noise are reported to beat those made from images: "A Closer Look at Conditional Prompt Tuning for
Vision-Language Models", arXiv 2506.23856 (CaPT). Nothing here draws: the same input gives the same output, alone or in
a batch, in every process and export.

Shapes: B inputs, L tokens, K tokens that a fusion reads, D width of a tower.
"""

from __future__ import annotations

import torch

from .mix import wide_dtype
from .select import Selection, check_count, spread_first


class ScatteredSelection(Selection):
    """Tokens at pseudo-random positions: of images K distinct ones, the same for all; of texts any within the text."""

    def of_images(self, tokens: torch.Tensor, count: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        """`count` positions (B, K) of images (B, L, D), as `Selection.of_images`."""
        check_count(count, tokens.shape[1])
        ranks = scattered(torch.arange(tokens.shape[1], device=tokens.device))  # (L,)
        ranks = ranks.expand(tokens.shape[:2])  # (L,) -> (B, L)
        return spread_first(ranks if visible is None else ranks.masked_fill(~visible, -1.0), count)

    def of_texts(self, first: torch.Tensor, last: torch.Tensor, length: int, count: int) -> torch.Tensor:
        """`count` positions (B, K) between first (B,) and last (B,), as `Selection.of_texts`."""
        share = scattered(torch.arange(count, device=first.device))  # (K,)
        return first[:, None] + (share * (last - first + 1)[:, None]).long()  # (B, K)


def segment_means(hidden: torch.Tensor, visible: torch.Tensor, count: int) -> torch.Tensor:
    """Means of `count` equal stretches of the visible tokens of each input, in their order.

    Of N visible tokens stretch k holds those from ``floor(k N / K)`` to ``ceil((k + 1) N / K)``, so an input of fewer
    tokens than stretches repeats tokens.

    Args:
        hidden: (B, L, D).
        visible: (B, L), True for at least one token of each input.
        count: K.

    Returns:
        (B, K, D) in the dtype of `hidden`.
    """
    total = visible.sum(dim=1)[:, None, None]  # (B,) -> (B, 1, 1)
    rank = (visible.cumsum(dim=1) - 1)[:, None]  # (B, L) -> (B, 1, L)
    k = torch.arange(count, device=hidden.device)[None, :, None]  # (1, K, 1)
    begin, end = k * total // count, -(-(k + 1) * total // count)  # (B, K, 1)
    members = ((rank >= begin) & (rank < end) & visible[:, None]).to(wide_dtype(hidden))  # (B, K, L)
    weights = members / members.sum(dim=2, keepdim=True)
    return (weights @ hidden.to(weights.dtype)).to(hidden.dtype)


def noise_tokens(count: int, width: int, layer: int, device: torch.device | None = None) -> torch.Tensor:
    """Noise for the fusion before one layer, (K, D) in fp32: uniform, with mean 0 and variance 1, always the same.

    Args:
        count: K.
        width: D.
        layer: index of the layer; each has noise of its own.
    """
    places = torch.arange(count * width, device=device) + layer * count * width
    return ((scattered(places) - 0.5) * 12**0.5).view(count, width)  # (K * D,) -> (K, D)


def scattered(indices: torch.Tensor) -> torch.Tensor:
    """A fixed pseudo-random number from 0 to below 1 for each index of at least 0, of any shape, in fp32.

    An integer hash of 32 bits, computed exactly, so that it is the same on every device.
    """
    mask = (1 << 32) - 1
    hashed = (indices.to(torch.int64) + 1) & mask
    for _ in range(2):
        hashed = ((hashed ^ (hashed >> 16)) * 0x45D9F3B) & mask
    hashed = hashed ^ (hashed >> 16)
    return (hashed >> 8).to(torch.float32) / (1 << 24)  # the 24 bits that fp32 holds, so that 1 is never reached
