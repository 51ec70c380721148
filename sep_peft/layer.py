"""The PEFT layers of SEP.

`SEPTower` stands in the place of a tower and holds the prompts and fusions of all adapters. It runs the tower twice:
once as it is (the frozen pass), once with prompts (the prompted pass), and mixes what comes out. Inside the tower, each
encoder layer and the position embedding are wrapped by modules without parameters that do nothing unless a pass of this
very call, in this very thread, asks them to. There is no state between calls.

Source of the method: arXiv 2405.15549 and https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import functional
from .architectures import TowerSpec
from .config import SEPConfig
from .fusion import TokenFusion


#: Standard deviation of fresh prompts.
PROMPT_STD = 0.02
#: Key of the one fusion module that all layers use with `share_fusion=True`.
SHARED = "shared"


class _CurrentPass:
    """The pass that runs in this thread, if any.

    torch.compile cannot trace `ContextVar.get`; while it traces, under its own lock, a plain attribute serves.
    """

    def __init__(self):
        self._context = ContextVar("sep_peft_current_pass", default=None)
        self._traced = None

    def get(self):
        return self._traced if torch.compiler.is_compiling() else self._context.get()

    @contextmanager
    def set(self, value):
        if torch.compiler.is_compiling():
            before, self._traced = self._traced, value
            try:
                yield
            finally:
                self._traced = before
        else:
            token = self._context.set(value)
            try:
                yield
            finally:
                self._context.reset(token)


_current_pass = _CurrentPass()


class FrozenPass:
    """The tower as it is; remembers the hidden states before `start_layer`, which the prompted pass shares."""

    position_shift = 0

    def __init__(self, start_layer: int):
        self.start_layer = start_layer
        self.trunk: torch.Tensor | None = None

    def run_layer(self, wrapper: SEPEncoderLayer, hidden: torch.Tensor, args: tuple, kwargs: dict):
        if wrapper.index == self.start_layer:
            self.trunk = hidden
        return wrapper.base_layer(hidden, *args, **kwargs)


@dataclass
class PromptedPass:
    """The tower with prompts: inserts them, fuses them anew, and takes them out behind the last layer.

    Attributes:
        spec: row of the tower.
        prompts: (n, D), as they enter the first prompted layer.
        fusions: layer index -> its fusion module.
        start_layer: index of the first prompted layer.
        num_layers: of the tower.
        span: first and last position of each text, both (B,); None for images.
        trunk: (B, L, D), hidden states before `start_layer` where the frozen pass has computed them already.
        position_shift: how far positions behind `spec.insert_at` move up.
        batch_coupled: select as the released code does.
        trace: collects what every fusion saw where somebody wants to look at it.
    """

    spec: TowerSpec
    prompts: torch.Tensor
    fusions: dict[int, TokenFusion]
    start_layer: int
    num_layers: int
    span: tuple[torch.Tensor, torch.Tensor] | None = None
    trunk: torch.Tensor | None = None
    position_shift: int = 0
    batch_coupled: bool = False
    trace: dict[int, FusionTrace] | None = None

    def run_layer(self, wrapper: SEPEncoderLayer, hidden: torch.Tensor, args: tuple, kwargs: dict):
        if wrapper.index < self.start_layer:
            if self.trunk is not None:
                return hidden  # never read: the trunk replaces it at start_layer
            with torch.no_grad():
                return wrapper.base_layer(hidden, *args, **kwargs)
        hidden, position = self._with_prompts(wrapper.index, hidden)
        kwargs = wrapper.bind(args, kwargs)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = functional.extend_mask(
                kwargs["attention_mask"], self.prompts.shape[0], position, self.spec.causal
            )
        output = wrapper.base_layer(hidden, **kwargs)
        if wrapper.index < self.num_layers - 1:
            return output
        return functional.split_prompts(output, self.prompts.shape[0], position)[0]

    def _with_prompts(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Hidden states with this layer's prompts, (B, L + n, D), and the index at which the prompts stand."""
        count = self.prompts.shape[0]
        if index == self.start_layer:
            tokens = hidden if self.trunk is None else self.trunk
            position = self._position(tokens.shape[1])
            prompts = self.prompts.expand(tokens.shape[0], -1, -1)  # (n, D) -> (B, n, D)
            return functional.insert_prompts(tokens, prompts, position), position
        position = self._position(hidden.shape[1] - count)
        if index in self.fusions:
            tokens, prompts = functional.split_prompts(hidden, count, position)
            hidden = functional.insert_prompts(tokens, self._fuse(index, prompts, tokens), position)
        return hidden, position

    def _position(self, length: int) -> int:
        return length if self.spec.insert_at is None else self.spec.insert_at

    def _fuse(self, index: int, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """prompts (B, n, D) and tokens (B, L, D) of this layer -> new prompts (B, n, D)."""
        fusion = self.fusions[index]
        positions = self._select(tokens)
        chosen = functional.gather_tokens(tokens, positions)
        if self.trace is not None:
            self.trace[index] = FusionTrace(positions, fusion.attention_weights(prompts, chosen))
        return fusion(prompts, chosen)

    def _select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions (B, K) of the tokens that represent each input."""
        count = self.prompts.shape[0]
        if self.span is None:
            return functional.largest_tokens(tokens, count, self.batch_coupled)
        first, last = self.span
        if self.batch_coupled:  # the released code runs on into the padding
            last = torch.full_like(last, tokens.shape[1] - 1)
        return functional.following_tokens(torch.minimum(first + self.spec.insert_at, last), last, count)


class FusionTrace(NamedTuple):
    """What one fusion saw: positions (B, K) of the chosen tokens, attention weights (B, heads, n, K)."""

    positions: torch.Tensor
    weights: torch.Tensor


class SEPLayer(nn.Module, BaseTunerLayer):
    """What all wrappers of SEP have in common: they pass attributes of the module they wrap on."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class SEPEncoderLayer(SEPLayer):
    """An encoder layer that takes prompts along while a prompted pass runs. It has no parameters of its own."""

    def __init__(self, base_layer: nn.Module, index: int):
        super().__init__(base_layer)
        self.index = index
        # Families order what comes behind the hidden states differently, so it is bound by name.
        parameters = list(inspect.signature(base_layer.forward).parameters.values())[1:]
        self.argument_names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """Everything behind the hidden states by name."""
        return dict(zip(self.argument_names, args, strict=False)) | kwargs

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing is kept here; the tower passes the new active adapter on."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        current = _current_pass.get()
        if current is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        return current.run_layer(self, hidden_states, args, kwargs)


class SEPPositionEmbedding(SEPLayer):
    """A position embedding that moves tokens up behind the prompts while a prompted pass runs. It has no parameters."""

    def __init__(self, base_layer: nn.Module, insert_at: int):
        super().__init__(base_layer)
        self.insert_at = insert_at

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing is kept here; the tower passes the new active adapter on."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        current = _current_pass.get()
        if current is None or current.position_shift == 0:
            return self.base_layer(position_ids)
        # Positions past the table belong to padding: the tower has checked that the text itself fits.
        moved = (position_ids + current.position_shift).clamp(max=self.base_layer.weight.shape[0] - 1)
        return self.base_layer(torch.cat([position_ids[..., : self.insert_at], moved[..., self.insert_at :]], dim=-1))


@dataclass(frozen=True)
class TowerSettings:
    """What one adapter wants of one tower; `num_prompts=0` leaves the tower alone."""

    num_prompts: int
    start_layer: int
    fusion_layers: tuple[int, ...]
    share_fusion: bool
    frozen_weight: float
    batch_coupled: bool

    @classmethod
    def from_config(cls, config: SEPConfig, tower: str, num_layers: int) -> TowerSettings:
        layers = config.layers_of(tower)
        if config.fusion == "none":
            layers = ()
        elif layers is None:
            layers = range(config.start_layer + 1, num_layers)
        return cls(
            num_prompts=config.prompts_of(tower),
            start_layer=config.start_layer,
            fusion_layers=tuple(layers),
            share_fusion=config.share_fusion,
            frozen_weight=config.frozen_weight,
            batch_coupled=config.batch_coupled,
        )


class Branches(NamedTuple):
    """Projected, not yet normalized embeddings of both branches of a tower, each (B, E)."""

    prompted: torch.Tensor
    frozen: torch.Tensor


class SEPTower(SEPLayer):
    """A tower with prompts and fusions per adapter.

    Called like the tower it wraps, and returns what the tower returns: `last_hidden_state` and `hidden_states` are
    those of the prompted pass without the prompts, `pooler_output` is the mix of both passes that comes out of the
    model's projection as SEP's embedding (see `functional.frozen_share`), so the model around it needs no change.

    Args:
        base_layer: the tower.
        tower: "text" or "vision".
        spec: row of the tower.
        model: the model that owns the tower and its projection.
    """

    adapter_layer_names = ("sep_prompts", "sep_fusion")
    other_param_names = ("sep_settings",)

    def __init__(self, base_layer: nn.Module, tower: str, spec: TowerSpec, model: nn.Module):
        super().__init__(base_layer)
        self.tower = tower
        self.spec = spec
        self._owner = (model,)  # in a tuple, so that the model does not become a child of its own tower
        self._argument_names = tuple(inspect.signature(base_layer.forward).parameters)
        self._inner: tuple[SEPLayer, ...] = ()  # wrappers inside the tower, for bookkeeping
        self.sep_prompts = nn.ParameterDict()
        self.sep_fusion = nn.ModuleDict()
        self.sep_settings: dict[str, TowerSettings] = {}

    # adapters

    @property
    def hidden_size(self) -> int:
        return self.base_layer.config.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.base_layer.get_submodule(self.spec.layers))

    def update_layer(self, adapter_name: str, config: SEPConfig) -> None:
        """Add an adapter, with fp32 parameters on the tower's device."""
        settings = TowerSettings.from_config(config, self.tower, self.num_layers)
        self.sep_settings[adapter_name] = settings
        if settings.num_prompts:
            self._wrap_inner()
            prompts = torch.empty(settings.num_prompts, self.hidden_size, dtype=torch.float32)
            self.sep_prompts[adapter_name] = nn.Parameter(nn.init.normal_(prompts, std=PROMPT_STD))
            keys = [SHARED] if settings.share_fusion else [str(index) for index in settings.fusion_layers]
            if settings.fusion_layers:
                self.sep_fusion[adapter_name] = nn.ModuleDict(
                    {
                        key: TokenFusion(
                            self.hidden_size,
                            config.fusion_hidden_size,
                            config.fusion_rank,
                            config.batch_coupled,
                            dtype=torch.float32,
                        )
                        for key in keys
                    }
                )
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the device only: the adapter's dtype is the tuner's business."""
        device = device or next(self.base_layer.parameters()).device
        for parameter in self.adapter_parameters(adapter_name):
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """All parameters of one adapter in this tower."""
        parameters = [self.sep_prompts[adapter_name]] if adapter_name in self.sep_prompts else []
        if adapter_name in self.sep_fusion:
            parameters += self.sep_fusion[adapter_name].parameters()
        return parameters

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            ValueError: more than one name; prompts of two adapters cannot share one pass.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"One SEP adapter can be active at a time, but got {names}. Pass a single name.")
        super().set_adapter(names, inference_mode=inference_mode)
        self._tell_inner()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._tell_inner()

    def _tell_inner(self) -> None:
        for layer in self._inner:
            layer._active_adapter = self._active_adapter

    def _wrap_inner(self) -> None:
        """Put the wrappers around the encoder layers and the position embedding, once."""
        if self._inner:
            return
        layers = self.base_layer.get_submodule(self.spec.layers)
        for index in range(len(layers)):
            layers[index] = SEPEncoderLayer(layers[index], index)
        self._inner = tuple(layers)
        if self.spec.positions is not None:
            wrapped = SEPPositionEmbedding(self.base_layer.get_submodule(self.spec.positions), self.spec.insert_at)
            self._set_positions(wrapped)
            self._inner += (wrapped,)

    def _set_positions(self, module: nn.Module) -> None:
        parent, _, name = self.spec.positions.rpartition(".")
        setattr(self.base_layer.get_submodule(parent), name, module)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        """The tower as it was, without any wrapper."""
        if self._inner:
            layers = self.base_layer.get_submodule(self.spec.layers)
            for index in range(len(layers)):
                layers[index] = layers[index].base_layer
            if self.spec.positions is not None:
                self._set_positions(self.base_layer.get_submodule(self.spec.positions).base_layer)
            self._inner = ()
        return self.base_layer

    # forward

    def forward(self, *args, **kwargs):
        adapter = self._prompting_adapter()
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        inputs = self._bind(args, kwargs)
        return_dict = inputs.pop("return_dict", None)
        if return_dict is None:
            return_dict = getattr(self.base_layer.config, "return_dict", True)
        prompted, frozen = self._run(adapter, inputs)
        if frozen is not None:
            prompted.pooler_output = self._mix_pooled(
                prompted.pooler_output, frozen.pooler_output, self.sep_settings[adapter].frozen_weight
            )
        return prompted if return_dict else prompted.to_tuple()

    def embed(self, *args, trace: dict[int, FusionTrace] | None = None, **kwargs) -> Branches:
        """Both branches of the active adapter, projected, not normalized, not mixed.

        Takes what the tower takes. Without an active adapter, or one that leaves this tower alone, both are the frozen
        one. The frozen branch is always computed, also with ``frozen_weight=0``.
        """
        inputs = self._bind(args, kwargs)
        adapter = self._prompting_adapter()
        if adapter is None:
            frozen = self.embed_frozen(**inputs)
            return Branches(frozen, frozen)
        prompted, frozen = self._run(adapter, inputs, trace, need_frozen=True)
        return Branches(self.project(prompted.pooler_output), self.project(frozen.pooler_output))

    def embed_frozen(self, *args, **kwargs) -> torch.Tensor:
        """The frozen branch alone, (B, E), projected and not normalized; without gradients."""
        with torch.no_grad():
            return self.project(self.base_layer(**self._bind(args, kwargs)).pooler_output)

    def embed_prompted(self, *args, **kwargs) -> torch.Tensor:
        """The prompted branch alone, (B, E), projected and not normalized."""
        inputs = self._bind(args, kwargs)
        adapter = self._prompting_adapter()
        if adapter is None:
            return self.embed_frozen(**inputs)
        return self.project(self._run_prompted(adapter, inputs, None, None).pooler_output)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """The model's own projection into the joint space, (B, D) -> (B, E)."""
        if self.spec.projection is None:
            return pooled
        module = self._owner[0]
        for name in self.spec.projection.split("."):
            module = getattr(module, name)
        return module(pooled)

    @property
    def active_settings(self) -> TowerSettings | None:
        """Settings of the active adapter where it puts prompts into this tower."""
        adapter = self._prompting_adapter()
        return None if adapter is None else self.sep_settings[adapter]

    def _prompting_adapter(self) -> str | None:
        if self.disable_adapters:
            return None
        for name in self.active_adapters:
            if name in self.sep_prompts:
                return name
        return None

    def _bind(self, args: tuple, kwargs: dict) -> dict:
        return dict(zip(self._argument_names, args, strict=False)) | kwargs

    def _run(self, adapter: str, inputs: dict, trace: dict | None = None, need_frozen: bool = False):
        """Outputs of the prompted pass and of the frozen pass, or None in its place where the mix does not need it."""
        settings = self.sep_settings[adapter]
        frozen, trunk = None, None
        if settings.frozen_weight > 0 or need_frozen:
            frozen_pass = FrozenPass(settings.start_layer) if settings.start_layer else None
            with torch.no_grad(), _current_pass.set(frozen_pass):
                frozen = self.base_layer(**inputs, return_dict=True)
            trunk = frozen_pass.trunk if frozen_pass is not None else None
        prompted = self._run_prompted(adapter, inputs, trunk, trace)
        if trunk is not None:
            for name in ("hidden_states", "attentions"):
                if prompted.get(name) is not None:
                    prompted[name] = tuple(frozen[name][: settings.start_layer]) + tuple(prompted[name])
        return prompted, frozen

    def _run_prompted(self, adapter: str, inputs: dict, trunk: torch.Tensor | None, trace: dict | None):
        settings = self.sep_settings[adapter]
        count, start = settings.num_prompts, settings.start_layer
        span = self._span(inputs)
        shift = count if start == 0 and self.spec.positions is not None else 0
        if shift:
            self._check_fit(inputs, span[1], count)
        prompted_pass = PromptedPass(
            spec=self.spec,
            prompts=self._entering_prompts(adapter),
            fusions=self._fusions(adapter),
            start_layer=start,
            num_layers=self.num_layers,
            span=span,
            trunk=trunk,
            position_shift=shift,
            batch_coupled=settings.batch_coupled,
            trace=trace,
        )
        with _current_pass.set(prompted_pass):
            output = self.base_layer(**inputs, return_dict=True)
        if output.get("hidden_states") is not None:
            length = output.last_hidden_state.shape[1]
            output["hidden_states"] = tuple(self._strip(state, count, length) for state in output["hidden_states"])
        return output

    def _strip(self, state: torch.Tensor | None, count: int, length: int) -> torch.Tensor | None:
        """A recorded hidden state without the prompts, where it has them: (B, L + n, D) -> (B, L, D)."""
        if state is None or state.shape[1] == length:
            return state
        position = length if self.spec.insert_at is None else self.spec.insert_at
        return functional.split_prompts(state, count, position)[0]

    def _entering_prompts(self, adapter: str) -> torch.Tensor:
        """The learned prompts (n, D) as they enter the first prompted layer."""
        prompts = self.sep_prompts[adapter]
        settings = self.sep_settings[adapter]
        if settings.start_layer > 0:
            return prompts
        if self.spec.positions is not None:
            table = self.base_layer.get_submodule(self.spec.positions).weight
            prompts = prompts + table[self.spec.insert_at : self.spec.insert_at + settings.num_prompts]
        if self.spec.entry_norm is not None:
            norm = self.base_layer.get_submodule(self.spec.entry_norm)
            prompts = norm(prompts.to(norm.weight.dtype))
        return prompts

    def _fusions(self, adapter: str) -> dict[int, TokenFusion]:
        if adapter not in self.sep_fusion:
            return {}
        fusions, settings = self.sep_fusion[adapter], self.sep_settings[adapter]
        return {i: fusions[SHARED if settings.share_fusion else str(i)] for i in settings.fusion_layers}

    def _span(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
        """First and last position of every text; None for images."""
        if self.spec.inputs != "input_ids":
            return None
        input_ids = inputs["input_ids"].flatten(0, -2)  # (..., L) -> (B, L)
        eos = None
        if self.spec.pools_at_eos:
            eos = functional.eos_positions(input_ids, self.base_layer.config.eos_token_id)
        return functional.text_span(input_ids.shape, inputs.get("attention_mask"), eos, input_ids.device)

    def _check_fit(self, inputs: dict, last: torch.Tensor, count: int) -> None:
        positions = self.base_layer.get_submodule(self.spec.positions).weight.shape[0]
        if inputs["input_ids"].shape[-1] + count <= positions:
            return
        fits = last.max() + 1 + count <= positions
        if torch.compiler.is_compiling():
            # A branch on data would break the graph; the assertion is checked where the graph runs.
            torch._assert_async(fits, f"a text has more than the {positions - count} tokens left beside the prompts")
            return
        if not fits:
            raise ValueError(
                f"A text of {int(last.max()) + 1} tokens does not fit: the text tower has {positions} positions and "
                f"{count} are taken by prompts, so {positions - count} tokens are left (BOS and EOS included). Shorten "
                "the text or use fewer prompts (num_text_prompts)."
            )

    def _mix_pooled(self, prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float) -> torch.Tensor:
        """Pooled outputs (B, D) of both passes -> the (B, D) that the projection maps onto SEP's embedding."""
        share = functional.frozen_share(self.project(prompted), self.project(frozen), frozen_weight)
        return (share * frozen + (1 - share) * prompted).to(prompted.dtype)
