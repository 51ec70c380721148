"""The wrappers inside a tower: they change nothing unless a pass of this call, in this thread, asks them to."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..method.quick_gelu import quick_gelu
from ..method.select import take_token
from ..tracing import untraced
from .current import current_pass
from .offload import HOOK, HOOKED_FORWARD


#: Attributes that are no other module's: what a wrapper wraps, and what accelerate hangs on single modules.
OWN = frozenset({"base_layer", HOOK, HOOKED_FORWARD})


@untraced
def _run_uncompiled(wrapper: nn.Module, *args, **kwargs):
    """A wrapper outside of the graph that is traced around it, which cannot see what pass runs; the graph goes on after
    it."""
    return wrapper.forward(*args, **kwargs)


class Wrapper(nn.Module):
    """Passes attributes of the module it wraps on."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in OWN:
                raise
            return getattr(self.base_layer, name)


class SEPLayer(Wrapper, BaseTunerLayer):
    """What PEFT treats as a layer of SEP."""

    def follow(self, active_adapter: str | list[str]) -> None:
        """Take over what the tower says is active; the wrappers inside it have no adapters of their own."""
        self._active_adapter = active_adapter


class SEPEncoderLayer(SEPLayer):
    """An encoder layer that takes prompts along while a prompted pass runs. It has no parameters of its own."""

    def __init__(self, base_layer: nn.Module, index: int):
        super().__init__(base_layer)
        self.index = index
        # Families order what comes after the hidden states differently, so it is bound by name.
        parameters = list(inspect.signature(base_layer.forward).parameters.values())[1:]
        self.argument_names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """Everything after the hidden states by name."""
        return dict(zip(self.argument_names, args, strict=False)) | kwargs

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing is kept here; the tower passes the new active adapter on."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        if current_pass.is_hidden():
            return _run_uncompiled(self, hidden_states, *args, **kwargs)
        current = current_pass.get()
        if current is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        return current.run_layer(self, hidden_states, args, kwargs)


class SEPPositionEmbedding(SEPLayer):
    """A position embedding that moves tokens up after the prompts while a prompted pass runs. It has no parameters."""

    def __init__(self, base_layer: nn.Module, insert_at: int):
        super().__init__(base_layer)
        self.insert_at = insert_at
        # RoBERTa numbers positions from after its padding index, at which all padding stands
        self.padding_idx = getattr(base_layer, "padding_idx", None)
        self.first = 0 if self.padding_idx is None else self.padding_idx + 1

    @property
    def num_positions(self) -> int:
        """Positions that tokens can have."""
        return count_positions(self.base_layer)

    def of_prompts(self, count: int, device: torch.device) -> torch.Tensor:
        """Embeddings of the positions that `count` prompts take, (count, D)."""
        start = self.first + self.insert_at
        return self.base_layer(torch.arange(start, start + count, device=device)[None])[0]

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing is kept here; the tower passes the new active adapter on."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        if current_pass.is_hidden():
            return _run_uncompiled(self, position_ids)
        current = current_pass.get()
        if current is None or current.position_shift == 0:
            return self.base_layer(position_ids)
        # Positions past the table belong to padding: the tower has checked that the text itself fits.
        moved = (position_ids + current.position_shift).clamp(max=self.first + self.num_positions - 1)
        if self.padding_idx is not None:
            moved = torch.where(position_ids == self.padding_idx, position_ids, moved)
        return self.base_layer(torch.cat([position_ids[..., : self.insert_at], moved[..., self.insert_at :]], dim=-1))


class SEPLastNorm(SEPLayer):
    """The norm in front of the last layer's MLP. It has no parameters of its own.

    Where a pass reads one token of each input after the last layer, the MLP runs for that token alone: the norm hands
    on (B, 1, D) instead of (B, L, D), and the sum after the MLP spreads its result over all tokens, of which no other
    is read.
    """

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing is kept here; the tower passes the new active adapter on."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if current_pass.is_hidden():
            return _run_uncompiled(self, hidden_states)
        current = current_pass.get()
        if current is not None and current.read_token is not None:
            hidden_states = take_token(hidden_states, current.read_token)
        return self.base_layer(hidden_states)


class SEPActivation(Wrapper):
    """A quick-GELU of the same values that keeps half as much for the backward pass. To PEFT it is no layer of SEP.

    It does not ask for a pass: where a layer is checkpointed, what the backward pass runs again must keep the same
    tensors.
    """

    def get_base_layer(self) -> nn.Module:
        """The activation; PEFT asks for it to unload."""
        return self.base_layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return quick_gelu(hidden_states) if hidden_states.requires_grad else self.base_layer(hidden_states)


class SEPProjection(Wrapper):
    """A projection that is not affine, after which both branches are mixed. It has no parameters and no state.

    The tower mixes, because it knows the weights, and hands the embedding on after its pooled output: (B, D + E)
    instead of (B, D). The embedding passes; anything else is projected. To PEFT this is no layer of SEP, so that the
    projection may be among `modules_to_save`.

    Args:
        base_layer: the projection.
        width: D.
    """

    def __init__(self, base_layer: nn.Module, width: int):
        super().__init__(base_layer)
        self.width = width

    def get_base_layer(self) -> nn.Module:
        """The projection; PEFT asks for it to unload."""
        return self.base_layer

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        if pooled.shape[-1] == self.width:
            return self.base_layer(pooled)
        return pooled[..., self.width :]


class SEPReader(Wrapper):
    """A module that reads all tokens of a tower by cross attention, after which both branches are mixed.

    The tower hands the tokens of both branches on side by side: (B, L, 2 D) instead of (B, L, D). Each branch is read
    alone, and what comes out is mixed token by token. Anything else is read as it is. To PEFT this is no layer of SEP,
    so that the module may be among `modules_to_save`.

    Args:
        base_layer: the module; it takes `encoder_hidden_states` and returns a `last_hidden_state` first.
        width: D.
        mix: makes one of two outputs, prompted and frozen, each (B, Q, E) -> (B, Q, E). The method of a module that
            has an `owner`.
    """

    def __init__(self, base_layer: nn.Module, width: int, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__(base_layer)
        self.width = width
        self._mix = _Method(mix)

    def get_base_layer(self) -> nn.Module:
        """The module; PEFT asks for it to unload."""
        return self.base_layer

    def forward(self, *args, encoder_hidden_states: torch.Tensor | None = None, **kwargs):
        if encoder_hidden_states is None or encoder_hidden_states.shape[-1] == self.width:
            return self.base_layer(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)
        prompted, frozen = (
            self.base_layer(*args, encoder_hidden_states=states, **kwargs)
            for states in encoder_hidden_states.split(self.width, dim=-1)
        )
        mixed = self._mix.method(prompted[0], frozen[0])
        if isinstance(prompted, tuple):
            return (mixed, *prompted[1:])
        prompted.last_hidden_state = mixed
        return prompted


class _Method:
    """The method of a module, which is copied with the module's owner and stays the same one in any other copy."""

    def __init__(self, method: Callable):
        self.method = method

    def __deepcopy__(self, memo: dict) -> _Method:
        owner_is_copied = id(self.method.__self__.owner) in memo
        return _Method(copy.deepcopy(self.method, memo) if owner_is_copied else self.method)


def layer_lists(tower: nn.Module, path: str) -> list[nn.ModuleList]:
    """The lists of encoder layers at `path` (see `TowerSpec.layers`), in the order in which they run."""
    found: list[nn.Module] = [tower]
    for name in path.split("."):
        found = [child for m in found for child in (m.children() if name == "*" else (m.get_submodule(name),))]
    return cast(list[nn.ModuleList], found)


def count_positions(embedding: nn.Module) -> int:
    """Positions that tokens can have in a position embedding."""
    padding_idx = getattr(embedding, "padding_idx", None)
    # learned, or sinusoidal
    table = cast(torch.Tensor, embedding.weight if hasattr(embedding, "weight") else embedding.weights)
    return table.shape[0] - (0 if padding_idx is None else padding_idx + 1)
