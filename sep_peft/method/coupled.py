"""What reproduces the released code's coupling of the inputs of a batch: `SEPConfig(batch_coupled=True)`.

The released code (https://github.com/htyao89/SEP) feeds its attention with (B, n, D) where it expects (n, B, D), so a
prompt attends across the *inputs of the batch* and never across the tokens of its input; it ranks the tokens of images
by a score that is averaged over the batch; and its choice of text tokens runs on into the padding, whose id is 0. All
of that is here, for checkpoints of that code and for comparing with it. Nothing else needs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .fusion import TokenFusion
from .select import Selection, following_tokens, token_energies


class CoupledSelection(Selection):
    """One choice of image tokens for the whole batch, and text tokens past the end of the text."""

    def of_images(self, tokens: torch.Tensor, count: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The same `count` positions for every image, by the energies averaged over the batch, (B, K)."""
        energy = token_energies(tokens, count, visible).mean(dim=0, keepdim=True)  # (1, L)
        return energy.topk(count, dim=1).indices.expand(tokens.shape[0], -1)  # (1, K) -> (B, K)

    def of_texts(self, first: torch.Tensor, last: torch.Tensor, length: int, count: int) -> torch.Tensor:
        """The `count` tokens after the prompts, padding included, (B, K)."""
        return following_tokens(first, torch.full_like(last, length - 1), count)


class CoupledTokenFusion(TokenFusion):
    """`TokenFusion` whose prompts attend across the inputs of the batch; an embedding depends on the batch."""

    def attend(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """query (B, n, D) and keys (B, n, D) -> (B, n, D); for each of the n prompts the sequence is the batch."""
        # (B, n, D) -> (n, B, D) -> (B, n, D)
        return self.attention(query.transpose(0, 1), keys.transpose(0, 1)).transpose(0, 1)


def pad_with_zeros(input_ids: torch.Tensor, last: torch.Tensor, length: int) -> torch.Tensor:
    """Token ids (C, L) with 0 after every text, and at least `length` columns, as the released code has them.

    Args:
        input_ids: (C, L).
        last: (C,) last position of each text, inclusive.
        length: least number of columns.
    """
    input_ids = F.pad(input_ids, (0, max(0, length - input_ids.shape[1])))  # (C, max(L, length))
    padding = torch.arange(input_ids.shape[1], device=input_ids.device) > last[:, None]  # (C, max(L, length))
    return input_ids.masked_fill(padding, 0)
