"""`SEPTower`: stands in the place of a tower and holds the prompts and fusions of all adapters.

It runs the tower twice, once as it is (the frozen pass) and once with prompts (the prompted pass), and mixes what comes
out. There is no state between calls.

Source of the method: arXiv 2405.15549 and https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from . import functional
from .architectures import TowerSpec
from .config import SEPConfig
from .fusion import TokenFusion
from .layer import SEPEncoderLayer, SEPLayer, SEPPositionEmbedding
from .passes import FrozenPass, FusionTrace, PromptedPass, current_pass


#: Standard deviation of fresh prompts.
PROMPT_STD = 0.02
#: Key of the one fusion module that all layers use with `share_fusion=True`.
SHARED = "shared"


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
        projection = self._projection()
        return pooled if projection is None else projection(pooled)

    def projection_parameters(self) -> list[nn.Parameter]:
        """Parameters of the model's own projection."""
        projection = self._projection()
        return [] if projection is None else list(projection.parameters())

    def _projection(self) -> nn.Module | None:
        if self.spec.projection is None:
            return None
        module = self.owner
        for name in self.spec.projection.split("."):
            module = getattr(module, name)
        return module

    @property
    def owner(self) -> nn.Module:
        """The model that owns the tower."""
        return self._owner[0]

    @property
    def frozen_weight(self) -> float:
        """Share of the frozen embedding in the mix of the active adapter; 0.5 where there is none, since both agree."""
        settings = self.active_settings
        return 0.5 if settings is None else settings.frozen_weight

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
            with torch.no_grad(), current_pass.set(frozen_pass):
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
        with current_pass.set(prompted_pass):
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

    def trim_texts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokenized texts (C, L) without the columns behind the longest one; no result depends on them."""
        length = int(self._span(inputs)[1].max()) + 1
        return {key: value[:, :length] for key, value in inputs.items()}

    def pad_behind_text(self, inputs: dict[str, torch.Tensor], length: int) -> torch.Tensor:
        """input_ids (C, L) with 0 behind every text, and at least `length` columns."""
        input_ids, last = inputs["input_ids"], self._span(inputs)[1]
        missing = max(0, length - input_ids.shape[1])
        input_ids = nn.functional.pad(input_ids, (0, missing))
        behind = torch.arange(input_ids.shape[1], device=input_ids.device) > last[:, None]  # (C, L)
        return input_ids.masked_fill(behind, 0)

    def check_texts(self, inputs: dict[str, torch.Tensor]) -> None:
        """Make sure that tokenized texts (C, L) fit beside the prompts of the active adapter.

        Raises:
            ValueError: says how many tokens are left.
        """
        settings = self.active_settings
        if settings is not None and settings.start_layer == 0 and self.spec.positions is not None:
            self._check_fit(inputs, self._span(inputs)[1], settings.num_prompts)

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
