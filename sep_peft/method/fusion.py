"""Token fusion: prompts rebuilt from the tokens that represent one input.

Source: Yao, Zhang, Yu, Zhang, Xu, "SEP: Self-Enhanced Prompt Tuning for Visual-Language Model", arXiv 2405.15549;
https://github.com/htyao89/SEP. This file knows neither PEFT nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .attention import FusionAttention
from .quick_gelu import quick_gelu


#: Initial value of the two learned scales.
INITIAL_SCALE = 0.75


class FusionParts(Protocol):
    """What `fuse` is made of: the layers of `TokenFusion`, with one scale for all inputs or (B, 1, 1) of them."""

    @property
    def norm1(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def norm2(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def fc1(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def fc2(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def scale1(self) -> torch.Tensor: ...

    @property
    def scale2(self) -> torch.Tensor: ...

    def attend(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor: ...


def fuse(parts: FusionParts, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The equations of `TokenFusion`: prompts (B, n, D) and tokens (B, n, D) -> prompts (B, n, D)."""
    prompts, tokens = prompts.to(parts.scale1.dtype), tokens.to(parts.scale1.dtype)
    query, keys = parts.norm1(prompts), parts.norm1(tokens)
    attended = parts.attend(query, keys)
    mixed = torch.lerp(attended.to(tokens.dtype), tokens, parts.scale1)
    hidden = parts.fc2(quick_gelu(parts.fc1(parts.norm2(mixed))))
    return torch.lerp(hidden.to(mixed.dtype), mixed, parts.scale2)


class TokenFusion(nn.Module):
    """New prompts from K representative tokens of one input and the prompts of the layer before.

    With ``S = LN1(tokens)`` and ``Q = LN1(prompts)`` (one layer norm for both)::

        Y  = s1 * tokens + (1 - s1) * MHA(query=Q, key=S, value=S)
        Z' = s2 * Y      + (1 - s2) * MLP(LN2(Y))          MLP = D -> hidden -> D, quick-GELU, no biases

    s1 and s2 are learned scalars that start at 0.75.

    Args:
        hidden_size: D, width of the tower.
        mlp_size: width of the MLP between its two layers. Default 32, as `SEPConfig` has it.
        rank: r for projections factored to r, None for full-width ones. Default 4, as `SEPConfig` has it.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_size: int = 32,
        rank: int | None = 4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(hidden_size, **kwargs)
        self.attention = FusionAttention(hidden_size, rank, **kwargs)
        self.norm2 = nn.LayerNorm(hidden_size, **kwargs)
        self.fc1 = nn.Linear(hidden_size, mlp_size, bias=False, **kwargs)
        self.fc2 = nn.Linear(mlp_size, hidden_size, bias=False, **kwargs)
        self.scale1 = nn.Parameter(torch.empty(1, **kwargs))
        self.scale2 = nn.Parameter(torch.empty(1, **kwargs))
        self.reset_parameters()

    @classmethod
    def published(cls, hidden_size: int, **options) -> TokenFusion:
        """The paper's fusion: full-width projections and an MLP of width 256.

        Args:
            hidden_size: D, width of the tower.
            options: arguments of the class that differ.
        """
        return cls(hidden_size, **({"mlp_size": 256, "rank": None} | options))

    def reset_parameters(self) -> None:
        self.norm1.reset_parameters()
        self.attention.reset_parameters()
        self.norm2.reset_parameters()
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        nn.init.constant_(self.scale1, INITIAL_SCALE)
        nn.init.constant_(self.scale2, INITIAL_SCALE)

    def forward(self, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """prompts (B, n, D) of the layer before and tokens (B, n, D) of this input -> prompts (B, n, D).

        Both are cast to the dtype of this module's weights, the result stays in it.
        """
        return fuse(self, prompts, tokens)

    def attend(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What the prompts read of the tokens of their input: query (B, n, D) and keys (B, K, D) -> (B, n, D)."""
        return self.attention(query, keys)

    def attention_weights(self, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """How strongly each prompt attends to each token, (B, heads, n, K), for the same inputs as `forward`."""
        dtype = self.scale1.dtype
        return self.attention.weights(self.norm1(prompts.to(dtype)), self.norm1(tokens.to(dtype)))
