"""Which tokens represent one input, and how they are taken out of its hidden states."""

from __future__ import annotations

import torch

from .mix import wide_dtype


def largest_tokens(
    hidden: torch.Tensor, count: int, batch_coupled: bool = False, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions of the `count` tokens with the largest mean square over channels, strongest first.

    Args:
        hidden: (B, L, D).
        count: K, at most L.
        batch_coupled: average the score over the batch and take the same positions for every input.
        visible: (B, L), False for padding, which is never chosen: an input of fewer tokens repeats its strongest one;
            None where every token is real.

    Returns:
        (B, K) int64.

    Raises:
        ValueError: `count` is larger than L.
    """
    if count > hidden.shape[1]:
        raise ValueError(
            f"{count} prompts need {count} tokens to select from, but the input has only {hidden.shape[1]}. "
            "Use fewer prompts (num_vision_prompts) or a larger image."
        )
    # (B, L), the mean square but for a factor, read in one go and summed in fp32: fp16 squares would overflow
    energy = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide_dtype(hidden)).pow(2)
    if visible is not None:
        energy = energy.masked_fill(~visible, -1.0)  # below every energy
    if batch_coupled:
        energy = energy.mean(dim=0, keepdim=True)  # (1, L)
    strongest = energy.topk(count, dim=1)
    positions = strongest.indices
    if visible is not None:
        positions = torch.where(strongest.values < 0, positions[:, :1], positions)
    return positions.expand(hidden.shape[0], -1)


def following_tokens(start: torch.Tensor, end: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of `count` tokens from `start` on, never past `end`: a shorter text repeats its last token.

    Args:
        start: (B,) first position of each text after BOS.
        end: (B,) last position of each text, inclusive.
        count: K.

    Returns:
        (B, K) int64.
    """
    steps = torch.arange(count, device=start.device)
    return torch.minimum(start[:, None] + steps, end[:, None])  # (B, K)


def gather_tokens(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hidden (B, L, D) at positions (B, K) -> (B, K, D)."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def take_token(hidden: torch.Tensor, position: torch.Tensor | int) -> torch.Tensor:
    """hidden (B, L, D) -> (B, 1, D), the token at `position`: one index for all inputs, or (B,)."""
    if isinstance(position, int):
        return hidden[:, position : position + 1]
    return gather_tokens(hidden, position[:, None])
