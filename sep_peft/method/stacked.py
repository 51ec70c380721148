"""Fusions of several adapters in one batch: each input's prompts are made by a fusion of its own.

Fusions of low rank have few weights, so those of all inputs are laid side by side, and one batched product does for
the batch what `torch.nn.Linear` does for one adapter. Fusions of full width go over their own inputs, one after
another: their weights are larger than what a batch makes of them.

Shapes: B inputs, n prompts, K tokens that a fusion reads, D width of a tower. A module may be told of fewer inputs than
come: then each stands for as many side by side, such as the frames of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .attention import FusionAttention
from .fusion import TokenFusion, fuse
from .independent import LearnedPrompts
from .low_rank import FactoredMap, LowRankLinear, has_weights, low_rank_attention


_Item = TypeVar("_Item")


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Each of the items as many times, side by side, as it takes for `count` of them."""
    return [item for item in items for _ in range(count // len(items))]


class PromptsOfInputs:
    """Independent prompts, those of another adapter for each input.

    Args:
        prompts: one for each of B inputs.
    """

    def __init__(self, prompts: Sequence[LearnedPrompts]):
        self.prompts = prompts

    def __call__(self, batch_size: int) -> torch.Tensor:
        """The prompts of each of B inputs, (B, n, D)."""
        return torch.cat([prompts(1) for prompts in _spread(self.prompts, batch_size)])


class FusionOfInputs:
    """`TokenFusion`, that of another adapter for each input.

    Args:
        fusions: one for each of B inputs.
    """

    def __init__(self, fusions: Sequence[TokenFusion]):
        self.fusions = fusions

    def __call__(self, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """prompts (B, n, D) of the layer before and tokens (B, K, D) of each input -> prompts (B, n, D)."""
        fusions = _spread(self.fusions, len(prompts))
        forms = {_form(fusion) for fusion in dict.fromkeys(fusions)}
        if len(forms) == 1 and None not in forms:
            return fuse(_StackedFusion(fusions), prompts, tokens)
        return _one_after_another(fusions, prompts, tokens)


def _one_after_another(fusions: Sequence[TokenFusion], prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    parts, order = [], []
    for fusion in dict.fromkeys(fusions):
        own = [index for index, other in enumerate(fusions) if other is fusion]
        parts.append(fusion(prompts[own], tokens[own]))
        order += own
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[places]


def _form(fusion: TokenFusion) -> tuple | None:
    """What fusions that can be stacked have in common; None for one that cannot be: of another class, of full width, or
    with layers in the place of its own, such as quantized ones."""
    attention = fusion.attention
    if type(fusion) is not TokenFusion or not attention.on_rank_channels:
        return None
    maps = (attention.query, attention.key, attention.value, attention.output)
    if not all(type(projection) is LowRankLinear for projection in maps):
        return None
    factors = [factor for projection in maps for factor in (projection.down, projection.up)]
    linears, norms = [*factors, fusion.fc1, fusion.fc2], [fusion.norm1, fusion.norm2]
    if not all(type(m) is nn.Linear for m in linears) or not all(type(m) is nn.LayerNorm for m in norms):
        return None
    if not all(map(has_weights, (*linears, *norms))):
        return None
    return tuple((m.weight.shape, m.weight.dtype, m.weight.device) for m in (*linears, *norms))


class _StackedLinear(NamedTuple):
    """weight (B, out, in) and bias (B, out) of as many linear maps as there are inputs."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> _StackedLinear:
        biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        return cls(torch.stack([linear.weight for linear in linears]), torch.stack(biases) if biases else None)

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        product = torch.bmm(hidden, self.weight.mT)
        return product if self.bias is None else product + self.bias[:, None]  # (B, out) -> (B, 1, out)


class _StackedMap(NamedTuple):
    """As many `LowRankLinear` as there are inputs."""

    down: _StackedLinear
    up: _StackedLinear

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden))


class _StackedNorm(NamedTuple):
    """weight (B, D) and bias (B, D) of as many layer norms as there are inputs."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, norms: Sequence[nn.LayerNorm]) -> _StackedNorm:
        weight, bias = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
        return cls(weight, bias, norms[0].eps)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias[:, None], normed, self.weight[:, None])  # (B, D) -> (B, 1, D)


class _StackedFusion:
    """The parts of `fuse` with weights of their own for each input.

    Args:
        fusions: of one `_form`, one for each of B inputs.
    """

    def __init__(self, fusions: Sequence[TokenFusion]):
        attentions = [fusion.attention for fusion in fusions]
        self.norm1 = _StackedNorm.of([fusion.norm1 for fusion in fusions])
        self.norm2 = _StackedNorm.of([fusion.norm2 for fusion in fusions])
        self.fc1 = _StackedLinear.of([fusion.fc1 for fusion in fusions])
        self.fc2 = _StackedLinear.of([fusion.fc2 for fusion in fusions])
        self.scale1 = torch.stack([fusion.scale1 for fusion in fusions])[:, None]  # (B, 1) -> (B, 1, 1)
        self.scale2 = torch.stack([fusion.scale2 for fusion in fusions])[:, None]  # (B, 1) -> (B, 1, 1)
        self._maps = {f"{name}_map": self._map(attentions, name) for name in ("query", "key", "value", "output")}
        self._num_heads = attentions[0].num_heads

    @staticmethod
    def _map(attentions: Sequence[FusionAttention], name: str) -> FactoredMap:
        maps = [getattr(attention, name) for attention in attentions]
        return _StackedMap(*(_StackedLinear.of([getattr(m, factor) for m in maps]) for factor in ("down", "up")))

    def attend(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """query (B, n, D) and keys (B, K, D) -> (B, n, D)."""
        return low_rank_attention(query, keys, **self._maps, num_heads=self._num_heads)


#: What makes prompts anew before one layer, for all inputs of a batch or for each by itself.
PromptMaker = LearnedPrompts | PromptsOfInputs
Fusion = TokenFusion | FusionOfInputs


def of_inputs(makers: Sequence[TokenFusion | LearnedPrompts]) -> PromptMaker | Fusion:
    """One module for a batch from one for each of B inputs, all of them fusions or all of them prompts."""
    fusions = [maker for maker in makers if isinstance(maker, TokenFusion)]
    prompts = [maker for maker in makers if isinstance(maker, LearnedPrompts)]
    return FusionOfInputs(fusions) if fusions else PromptsOfInputs(prompts)
