"""Prompts enter a sequence of tokens, are replaced in it, and leave it; masks are extended alike."""

from __future__ import annotations

import torch


def insert_prompts(hidden: torch.Tensor, prompts: torch.Tensor, position: int) -> torch.Tensor:
    """Put prompts (B, n, D) into hidden (B, L, D) before index `position` -> (B, L + n, D) in the dtype of hidden."""
    prompts = prompts.to(hidden.dtype)
    return torch.cat([hidden[:, :position], prompts, hidden[:, position:]], dim=1)


def replace_prompts(hidden: torch.Tensor, prompts: torch.Tensor, position: int) -> torch.Tensor:
    """Put prompts (B, n, D) in the place of those that stand in hidden (B, L + n, D) from index `position` on."""
    return hidden.slice_scatter(prompts.to(hidden.dtype), dim=1, start=position, end=position + prompts.shape[1])


def beside_prompts(positions: torch.Tensor | int, count: int, position: int | None) -> torch.Tensor | int:
    """Where tokens stand once `count` prompts stand before index `position`; None is after all of them."""
    return positions if position is None else positions + count * (positions >= position)


def split_prompts(hidden: torch.Tensor, count: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `insert_prompts`: hidden (B, L + n, D) -> tokens (B, L, D), prompts (B, n, D).

    Where the prompts come last both are views: copying all tokens before every fusion is what would cost most.
    """
    before, prompts, after = hidden.tensor_split([position, position + count], dim=1)
    return (before if after.shape[1] == 0 else torch.cat([before, after], dim=1)), prompts


def extend_mask(mask: torch.Tensor | None, count: int, position: int, causal: bool) -> torch.Tensor | None:
    """Make room for `count` prompts in the mask that an encoder layer receives.

    Prompts are visible to every token, except to tokens before them where attention is causal. They see what a token
    in their place would see: all unmasked tokens, or, where attention is causal, those before them and each other up
    to themselves.

    Args:
        mask: None (nothing is masked, or the layer applies causality itself), (B, L) with 1 for visible, or
            (B or 1, 1, L or 1, L), boolean (True is visible) or additive (0 is visible, a large negative number is
            not).
        count: n.
        position: index before which the prompts stand.
        causal: whether the mask contains causality.

    Returns:
        the mask for L + n tokens, in the same dtype; None stays None.
    """
    if mask is None or count == 0:
        return mask
    if mask.ndim == 2:
        ones = mask.new_ones(mask.shape[0], count)
        return torch.cat([mask[:, :position], ones, mask[:, position:]], dim=1)  # (B, L + n)
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    batch, heads, rows, length = mask.shape
    columns = mask.new_full((batch, heads, rows, count), visible)
    if causal and rows > 1:
        columns[:, :, :position] = hidden
    mask = torch.cat([mask[..., :position], columns, mask[..., position:]], dim=-1)  # (B, H, rows, L + n)
    if rows == 1:
        return mask
    if causal:
        before = mask[:, :, max(position - 1, 0) : max(position, 1), :position].expand(
            -1, -1, count, -1
        )  # (B, H, n, position)
        among = mask.new_full((count, count), hidden)
        among = among.triu(1) if mask.dtype != torch.bool else torch.ones_like(among).tril()
        among = among.expand(batch, heads, -1, -1)  # (B, H, n, n)
        after = mask.new_full((batch, heads, count, length - position), hidden)
        own_rows = torch.cat([before, among, after], dim=-1)  # (B, H, n, L + n)
    else:
        own_rows = mask[:, :, :1].expand(-1, -1, count, -1)  # bidirectional rows differ in nothing
    return torch.cat([mask[:, :, :position], own_rows, mask[:, :, position:]], dim=2)  # (B, H, L + n, L + n)
