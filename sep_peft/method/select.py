"""Which tokens represent one input, and how they are taken out of its hidden states.

Shapes: B inputs, L tokens, K chosen tokens (K = n, the number of prompts), D width of a tower.
Source: arXiv 2405.15549 and its released code, https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import torch

from ..words import counted
from .mix import wide_dtype


class Selection:
    """Chooses the tokens that a fusion reads, by the rule of the paper and for each input by itself.

    A subclass is another rule; see `TowerPass.selection` of the tuner, which takes one.
    """

    def of_images(self, tokens: torch.Tensor, count: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The `count` tokens of each image with the largest mean square over channels; see `largest_tokens`.

        Args:
            tokens: (B, L, D), hidden states before a layer, without prompts.
            count: K.
            visible: (B, L), False for padding; None where every token is real.

        Returns:
            (B, K) int64.
        """
        return largest_tokens(tokens, count, visible)

    def of_texts(self, first: torch.Tensor, last: torch.Tensor, length: int, count: int) -> torch.Tensor:
        """The `count` tokens after the prompts, never past the end of the text; see `following_tokens`.

        Args:
            first: (B,) position of the first token after the prompts' place.
            last: (B,) position of the last token of each text.
            length: L, with padding.
            count: K.

        Returns:
            (B, K) int64.
        """
        return following_tokens(first, last, count)


def largest_tokens(hidden: torch.Tensor, count: int, visible: torch.Tensor | None = None) -> torch.Tensor:
    """Positions of the `count` tokens with the largest mean square over channels, strongest first.

    Args:
        hidden: (B, L, D).
        count: K, at most L.
        visible: (B, L), False for padding, which is never chosen: an input of fewer tokens repeats its strongest one;
            None where every token is real.

    Returns:
        (B, K) int64.

    Raises:
        ValueError: `count` is larger than L.
    """
    return spread_first(token_energies(hidden, count, visible), count)


def spread_first(ranks: torch.Tensor, count: int) -> torch.Tensor:
    """Positions (B, K) of the `count` largest ranks (B, L), largest first.

    A rank below 0 is never chosen: the position of the largest one is repeated in its place.
    """
    largest = ranks.topk(count, dim=1)
    return torch.where(largest.values < 0, largest.indices[:, :1], largest.indices)


def token_energies(hidden: torch.Tensor, count: int, visible: torch.Tensor | None = None) -> torch.Tensor:
    """What `largest_tokens` ranks by: D times the mean square of each token, -1 for padding, (B, L) in fp32 or wider.

    Raises:
        ValueError: there are fewer than `count` tokens.
    """
    check_count(count, hidden.shape[1])
    # (B, L), read in one go and summed in fp32: fp16 squares would overflow
    energy = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide_dtype(hidden)).pow(2)
    return energy if visible is None else energy.masked_fill(~visible, -1.0)  # below every energy


def check_count(count: int, length: int) -> None:
    """
    Raises:
        ValueError: there are fewer than `count` tokens to select from.
    """
    if count > length:
        raise ValueError(
            f"{counted(count, 'prompt')} {'needs' if count == 1 else 'need'} {counted(count, 'token')} to select from, "
            f"but the input has only {length}. Use fewer prompts (num_vision_prompts) or a larger image."
        )


def following_tokens(first: torch.Tensor, last: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of `count` tokens from `first` on, never past `last`: a shorter text repeats its last token.

    Args:
        first: (B,) first position of each text after BOS.
        last: (B,) last position of each text, inclusive.
        count: K.

    Returns:
        (B, K) int64.
    """
    steps = torch.arange(count, device=first.device)
    return torch.minimum(first[:, None] + steps, last[:, None])  # (B, K)


def gather_tokens(hidden: torch.Tensor, token_positions: torch.Tensor) -> torch.Tensor:
    """hidden (B, L, D) at token_positions (B, K) -> (B, K, D)."""
    return hidden.gather(1, token_positions[..., None].expand(-1, -1, hidden.shape[-1]))


def take_token(hidden: torch.Tensor, token_position: torch.Tensor | int) -> torch.Tensor:
    """hidden (B, L, D) -> (B, 1, D), the token at `token_position`: one index for all inputs, or (B,)."""
    if isinstance(token_position, int):
        return hidden[:, token_position : token_position + 1]
    return gather_tokens(hidden, token_position[:, None])
