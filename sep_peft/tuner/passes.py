"""The two passes through a tower: as it is, and with prompts.

Source of the method: arXiv 2405.15549 and https://github.com/htyao89/SEP. `sep_peft.method.reference` says the same in
plain words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..families.spec import TowerSpec
from ..method.fusion import TokenFusion
from ..method.independent import LearnedPrompts
from ..method.select import Selection, gather_tokens
from ..method.sequence import beside_prompts, extend_mask, insert_prompts, replace_prompts, split_prompts
from ..method.sources import noise_tokens, segment_means
from ..method.stacked import Fusion, PromptMaker, PromptsOfInputs
from .config import CHOSEN_TOKENS


class EncoderLayer(Protocol):
    """What a pass needs of the layer it runs: its index, the layer itself, and its arguments by name."""

    index: int
    base_layer: nn.Module

    def bind(self, args: tuple, kwargs: dict) -> dict: ...


class PlainPass:
    """The tower as it is, with nothing to remember: what a disabled adapter runs."""

    position_shift = 0
    read_token = None

    def run_layer(self, layer: EncoderLayer, hidden: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        return layer.base_layer(hidden, *args, **kwargs)


class Trunk(NamedTuple):
    """What a prompted pass shares with the frozen pass: everything below its first layer.

    Attributes:
        hidden: (B, L, D), hidden states before the first prompted layer.
        num_outputs: of layers that return tuples; None where they return hidden states alone.
    """

    hidden: torch.Tensor
    num_outputs: int | None

    def stand_in(self, hidden: torch.Tensor):
        """What a layer returns that the prompted pass leaves out: nothing of it is read, but its form has to fit."""
        return hidden if self.num_outputs is None else (hidden, *[None] * (self.num_outputs - 1))


class FrozenPass:
    """The tower as it is; remembers the hidden states before some layers, which prompted passes share.

    Args:
        start_layers: indices of the first prompted layers of these passes.
        read_token: index of the one token that is read after the last layer, for all inputs or (B,); None where all
            are.
    """

    position_shift = 0

    def __init__(self, start_layers: Collection[int] = (), read_token: torch.Tensor | int | None = None):
        self.start_layers = start_layers
        self.read_token = read_token
        self.hidden: dict[int, torch.Tensor] = {}  # layer index -> (B, L, D)
        self.num_outputs: int | None = None  # of layers that return tuples

    def trunk(self, start_layer: int) -> Trunk:
        """What a prompted pass shares that begins before one of `start_layers`."""
        return Trunk(self.hidden[start_layer], self.num_outputs)

    def run_layer(self, layer: EncoderLayer, hidden: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        if layer.index in self.start_layers:
            self.hidden[layer.index] = hidden
        output = layer.base_layer(hidden, *args, **kwargs)
        self.num_outputs = len(output) if isinstance(output, tuple) else None
        return output


class TrunkFeatures(NamedTuple):
    """What stays the same while an adapter with `start_layer` is trained, for one batch.

    Attributes:
        hidden: (B, L, D), what enters layer `start_layer`.
        frozen: (B, E), the frozen embedding, projected, not normalized.
        num_outputs: of layers that return tuples; None where they return hidden states alone.
    """

    hidden: torch.Tensor
    frozen: torch.Tensor
    num_outputs: int | None

    @property
    def trunk(self) -> Trunk:
        return Trunk(self.hidden, self.num_outputs)


@dataclass
class PromptedPass:
    """The tower with prompts: inserts them, fuses them anew, and takes them out after the last layer.

    Where the layers come in stages, prompts are taken out after each stage and carried into the next one.

    Attributes:
        spec: of the tower.
        prompts: (n, D), as they enter the first prompted layer, or (B, n, D) where each input has its own, or several
            side by side share theirs.
        fusions: layer index -> what makes the prompts anew before it, for all inputs or for each by itself.
        start_layer: index of the first prompted layer.
        last_layers: index of the last layer of the tower, or of each of its stages.
        span: first and last position of each text, both (B,); None for images.
        visible: (B, L), False for tokens of an image that are padding; None where all are real.
        trunk: of the frozen pass, where it has computed everything below `start_layer` already.
        position_shift: how far positions after `spec.insert_at` move up.
        fusion_tokens: what fusions read; see `SEPConfig`.
        selection: chooses the tokens that fusions read, where they read chosen ones.
        trace: collects what every fusion saw where somebody wants to look at it.
        rotary: makes the rotary embedding of as many positions as there are hidden states; None without one.
        read_token: index beside the prompts of the one token that is read after the last layer, for all inputs or
            (B,); None where all are.
        prompted_shape: (B, L + n) of hidden states with prompts, known once the pass has run.
    """

    spec: TowerSpec
    prompts: torch.Tensor
    fusions: Mapping[int, Fusion | PromptMaker]
    start_layer: int
    last_layers: tuple[int, ...]
    span: tuple[torch.Tensor, torch.Tensor] | None = None
    visible: torch.Tensor | None = None
    trunk: Trunk | None = None
    position_shift: int = 0
    fusion_tokens: str = "selected"
    selection: Selection = field(default_factory=Selection)
    trace: dict[int, FusionTrace] | None = None
    rotary: nn.Module | None = None
    read_token: torch.Tensor | int | None = None
    prompted_shape: tuple[int, int] | None = field(default=None, init=False)
    _carried: torch.Tensor | None = field(default=None, init=False)

    @property
    def count(self) -> int:
        """n."""
        return self.prompts.shape[-2]

    def run_layer(self, layer: EncoderLayer, hidden: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        if layer.index < self.start_layer:
            if self.trunk is not None:  # the result is never read: the trunk replaces it at start_layer
                return self.trunk.stand_in(hidden)
            with torch.no_grad():
                return layer.base_layer(hidden, *args, **kwargs)
        hidden, prompt_index = self._with_prompts(layer.index, hidden)
        kwargs = layer.bind(args, kwargs)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = extend_mask(kwargs["attention_mask"], self.count, prompt_index, self.spec.causal)
        if self.rotary is not None:
            kwargs["rotary_pos_emb"] = self.rotary(hidden)
            kwargs["position_ids"] = self._rotary_positions(kwargs["position_ids"])
        output = layer.base_layer(hidden, **kwargs)
        if layer.index not in self.last_layers:
            return output
        states = output[0] if isinstance(output, tuple) else output
        tokens, self._carried = split_prompts(states, self.count, prompt_index)
        tokens = tokens.contiguous()  # as families expect what their layers return
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def _rotary_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids (1 or B, L) with those of the prompts, which take the first after `insert_at`, (1 or B, L + n).

        The tokens after them move up where the prompts join the text, and stay where layers below have read them.
        """
        at = self._prompt_index(position_ids.shape[1])
        own = torch.arange(at, at + self.count, device=position_ids.device).expand(len(position_ids), -1)
        return torch.cat([position_ids[:, :at], own, position_ids[:, at:] + self.position_shift], dim=1)

    def has_prompts_before(self, index: int) -> bool:
        """Whether the hidden states that a layer receives contain prompts already."""
        return index > self.start_layer and index - 1 not in self.last_layers

    def _with_prompts(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Hidden states with this layer's prompts, (B, L + n, D), and the index at which the prompts stand."""
        count = self.count
        if index == self.start_layer:
            tokens = hidden if self.trunk is None else self.trunk.hidden
            prompt_index = self._prompt_index(tokens.shape[1])
            hidden = insert_prompts(tokens, self._prompts_of_inputs(tokens.shape[0]), prompt_index)
            self.prompted_shape = (hidden.shape[0], hidden.shape[1])
            return hidden, prompt_index
        if not self.has_prompts_before(index):
            assert self._carried is not None, "the stage before hands its prompts on"
            prompt_index = self._prompt_index(hidden.shape[1])
            hidden = insert_prompts(hidden, self._carried, prompt_index)
        else:
            prompt_index = self._prompt_index(hidden.shape[1] - count)
        if index in self.fusions:
            hidden = replace_prompts(hidden, self._new_prompts(index, hidden, prompt_index), prompt_index)
        return hidden, prompt_index

    def _prompts_of_inputs(self, batch_size: int) -> torch.Tensor:
        """The prompts as they enter, (B, n, D)."""
        if self.prompts.ndim == 2:
            return self.prompts.expand(batch_size, -1, -1)  # (n, D) -> (B, n, D)
        return self.prompts.repeat_interleave(batch_size // len(self.prompts), dim=0)

    def _prompt_index(self, length: int) -> int:
        return length if self.spec.insert_at is None else self.spec.insert_at

    def _new_prompts(self, index: int, hidden: torch.Tensor, prompt_index: int) -> torch.Tensor:
        """Hidden states with prompts (B, L + n, D) before this layer -> new prompts (B, n, D)."""
        fusion, count = self.fusions[index], self.count
        if isinstance(fusion, (LearnedPrompts, PromptsOfInputs)):
            return fusion(hidden.shape[0])
        if self.fusion_tokens in CHOSEN_TOKENS:
            return self._fuse_chosen(index, fusion, hidden, prompt_index)
        tokens, prompts = split_prompts(hidden, count, prompt_index)
        if self.fusion_tokens == "noise":
            noise = noise_tokens(count, hidden.shape[2], index, hidden.device)
            return fusion(prompts, noise.expand(hidden.shape[0], -1, -1))  # (n, D) -> (B, n, D)
        return fusion(prompts, segment_means(tokens, self._own_tokens(tokens, prompt_index), count))

    def _own_tokens(self, tokens: torch.Tensor, prompt_index: int) -> torch.Tensor:
        """Which tokens (B, L, D) belong to the image, or to the words and the end of the text, (B, L)."""
        if self.span is None:
            return tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if self.visible is None else self.visible
        first, last = self._words(prompt_index)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return (places >= first[:, None]) & (places <= last[:, None])

    def _words(self, prompt_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last position of each text after BOS, both (B,), counted without prompts."""
        assert self.span is not None, "the tower reads texts"
        first, last = self.span
        return torch.minimum(first + prompt_index, last), last

    def _fuse_chosen(self, index: int, fusion: Fusion, hidden: torch.Tensor, prompt_index: int) -> torch.Tensor:
        """New prompts (B, n, D) from tokens that `selection` chooses of hidden states (B, L + n, D)."""
        count = self.count
        positions = self._select(hidden.detach(), prompt_index)  # (B, K)
        own = torch.arange(prompt_index, prompt_index + count, device=hidden.device)  # (n,)
        own = own.expand(hidden.shape[0], -1)  # (n,) -> (B, n)
        taken = torch.cat([beside_prompts(positions, count, prompt_index), own], dim=1)  # (B, K + n)
        # one gather for both, because the backward pass of each fills a tensor of the size of `hidden`
        chosen, prompts = gather_tokens(hidden, taken).split([positions.shape[1], count], dim=1)
        if self.trace is not None and isinstance(fusion, TokenFusion):
            tokens = hidden.shape[1] - count
            self.trace[index] = FusionTrace(positions, fusion.attention_weights(prompts, chosen), tokens)
        return fusion(prompts, chosen)

    def _select(self, hidden: torch.Tensor, prompt_index: int) -> torch.Tensor:
        """Positions (B, K), counted without prompts, of the tokens that represent each input (B, L + n, D)."""
        count = self.count
        if self.span is None:
            tokens, _ = split_prompts(hidden, count, prompt_index)
            return self.selection.of_images(tokens, count, self.visible)
        return self.selection.of_texts(*self._words(prompt_index), hidden.shape[1] - count, count)


class FusionTrace(NamedTuple):
    """What one fusion saw.

    Attributes:
        token_positions: (B, K), of the chosen tokens, counted without prompts.
        weights: (B, heads, n, K), attention of the prompts.
        tokens: L, tokens of the layer without prompts.
    """

    token_positions: torch.Tensor
    weights: torch.Tensor
    tokens: int
