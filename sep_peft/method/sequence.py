"""Prompts enter a sequence of tokens, are replaced in it, and leave it; masks are extended alike."""

from __future__ import annotations

from typing import overload

import torch


def insert_prompts(hidden: torch.Tensor, prompts: torch.Tensor, prompt_index: int) -> torch.Tensor:
    """Put prompts (B, n, D) into hidden (B, L, D) before `prompt_index` -> (B, L + n, D) in the dtype of hidden."""
    prompts = prompts.to(hidden.dtype)
    return torch.cat([hidden[:, :prompt_index], prompts, hidden[:, prompt_index:]], dim=1)


def replace_prompts(hidden: torch.Tensor, prompts: torch.Tensor, prompt_index: int) -> torch.Tensor:
    """Put prompts (B, n, D) in the place of those that stand in hidden (B, L + n, D) from `prompt_index` on."""
    end = prompt_index + prompts.shape[1]
    return hidden.slice_scatter(prompts.to(hidden.dtype), dim=1, start=prompt_index, end=end)


@overload
def beside_prompts(token_positions: torch.Tensor, count: int, prompt_index: int | None) -> torch.Tensor: ...


@overload
def beside_prompts(token_positions: int, count: int, prompt_index: int | None) -> int: ...


def beside_prompts(token_positions: torch.Tensor | int, count: int, prompt_index: int | None) -> torch.Tensor | int:
    """Where tokens stand once `count` prompts stand before index `prompt_index`; None is after all of them."""
    return token_positions if prompt_index is None else token_positions + count * (token_positions >= prompt_index)


def split_prompts(hidden: torch.Tensor, count: int, prompt_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `insert_prompts`: hidden (B, L + n, D) -> tokens (B, L, D), prompts (B, n, D).

    Where the prompts come last both are views: copying all tokens before every fusion is what would cost most.
    """
    before, prompts, after = hidden.tensor_split([prompt_index, prompt_index + count], dim=1)
    return (before if after.shape[1] == 0 else torch.cat([before, after], dim=1)), prompts


def extend_mask(mask: torch.Tensor | None, count: int, prompt_index: int, causal: bool) -> torch.Tensor | None:
    """Make room for `count` prompts in the mask that an encoder layer receives.

    Prompts are visible to every token, except to tokens before them where attention is causal. They see what a token
    in their place would see: all unmasked tokens, or, where attention is causal, those before them and each other up
    to themselves.

    Args:
        mask: None (nothing is masked, or the layer applies causality itself), (B, L) with 1 for visible, or
            (B or 1, 1, L or 1, L), boolean (True is visible) or additive (0 is visible, a large negative number is
            not).
        count: n.
        prompt_index: index before which the prompts stand.
        causal: whether the mask contains causality.

    Returns:
        the mask for L + n tokens, in the same dtype; None stays None.
    """
    if mask is None or count == 0:
        return mask
    if mask.ndim == 2:
        ones = mask.new_ones(mask.shape[0], count)
        return torch.cat([mask[:, :prompt_index], ones, mask[:, prompt_index:]], dim=1)  # (B, L + n)
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    batch, heads, rows, length = mask.shape
    columns = mask.new_full((batch, heads, rows, count), visible)
    if causal and rows > 1:
        columns[:, :, :prompt_index] = hidden
    mask = torch.cat([mask[..., :prompt_index], columns, mask[..., prompt_index:]], dim=-1)  # (B, H, rows, L + n)
    if rows == 1:
        return mask
    if causal:
        before = mask[:, :, max(prompt_index - 1, 0) : max(prompt_index, 1), :prompt_index].expand(
            -1, -1, count, -1
        )  # (B, H, n, prompt_index)
        among = mask.new_full((count, count), hidden)
        among = among.triu(1) if mask.dtype != torch.bool else torch.ones_like(among).tril()
        among = among.expand(batch, heads, -1, -1)  # (B, H, n, n)
        after = mask.new_full((batch, heads, count, length - prompt_index), hidden)
        own_rows = torch.cat([before, among, after], dim=-1)  # (B, H, n, L + n)
    else:
        own_rows = mask[:, :, :1].expand(-1, -1, count, -1)  # bidirectional rows differ in nothing
    return torch.cat([mask[:, :, :prompt_index], own_rows, mask[:, :, prompt_index:]], dim=2)  # (B, H, L + n, L + n)
