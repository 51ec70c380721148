"""`SEPTower`: stands in the place of a tower and holds the prompts and fusions of all adapters.

It runs the tower twice, once as it is (the frozen pass) and once with prompts (the prompted pass), and mixes what comes
out. There is no state between calls.

Source of the method: arXiv 2405.15549 and https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from ..families.spec import Architecture, TowerSpec
from ..method.fusion import TokenFusion
from ..method.sequence import beside_prompts
from . import head as mixing
from . import mixed_batch, texts, wrapping
from . import outputs as records
from .config import SEPConfig
from .current import current_pass
from .layer_fusions import LayerFusions
from .mixed_batch import by_rows, chosen_adapters
from .passes import FrozenPass, FusionTrace, PromptedPass, TrunkFeatures
from .settings import TowerSettings
from .wrappers import SEPLayer, layer_lists


#: Standard deviation of fresh prompts.
PROMPT_STD = 0.02
#: Name of the `SEPTower` inside a model that is a tower itself.
ROOT_CHILD = "prompted"
#: Key of the one fusion module that all layers use with `share_fusion=True`.
SHARED = "shared"


class Branches(NamedTuple):
    """Projected, not yet normalized embeddings of both branches of a tower, each (B, E), or (B, Q, E) with a reader."""

    prompted: torch.Tensor
    frozen: torch.Tensor


class SEPTower(SEPLayer):
    """A tower with prompts and fusions per adapter.

    Called like the tower it wraps, and returns what the tower returns: `last_hidden_state`, `hidden_states` and
    `attentions` are those of the prompted pass without the prompts (see `records`), `pooler_output` is the mix of both
    passes that comes out of the model's projection as SEP's embedding (see `frozen_share`), so the model
    around it needs no change. Where a reader follows (`TowerSpec.reader`), `last_hidden_state` holds the tokens of both
    passes side by side.

    Args:
        base_layer: the tower.
        tower: "text" or "vision".
        architecture: row of the model.
        model: the model that owns the tower and its projection. Where it is the tower itself, this module becomes its
            child `ROOT_CHILD` and takes over its forward.
    """

    adapter_layer_names = ("sep_prompts", "sep_fusion")
    other_param_names = ("sep_settings",)

    def __init__(self, base_layer: nn.Module, tower: str, architecture: Architecture, model: nn.Module):
        super().__init__(base_layer)
        self.tower = tower
        self.architecture = architecture
        self.is_root = base_layer is model
        if self.is_root:  # a child cannot own its parent; the attribute stays, out of the registry of modules
            del self._modules["base_layer"]
            self.__dict__["base_layer"] = base_layer
        self._owner = (model,)  # in a tuple, so that the model does not become a child of its own tower
        self._argument_names = tuple(inspect.signature(base_layer.forward).parameters)
        self._inner: tuple[SEPLayer, ...] = ()  # wrappers inside the tower, for bookkeeping
        self._layer_outputs: tuple = ()  # see `layer_outputs`
        self.sep_prompts = nn.ParameterDict()
        self.sep_fusion = nn.ModuleDict()
        self.sep_settings: dict[str, TowerSettings] = {}
        if self.is_root:
            base_layer.forward = self.forward

    @property
    def spec(self) -> TowerSpec:
        """Row of the tower."""
        return self.architecture.towers[self.tower]

    # adapters

    @property
    def hidden_size(self) -> int:
        return getattr(self.base_layer.config, self.spec.hidden_size)

    @property
    def num_layers(self) -> int:
        return sum(map(len, self._layer_lists()))

    def _layer_lists(self) -> list[nn.ModuleList]:
        return layer_lists(self.base_layer, self.spec.layers)

    def _last_layers(self) -> tuple[int, ...]:
        """Index of the last layer of each list."""
        return tuple(end - 1 for end in accumulate(map(len, self._layer_lists())))

    def update_layer(self, adapter_name: str, config: SEPConfig) -> None:
        """Add an adapter, with fp32 parameters on the tower's device."""
        settings = TowerSettings.from_config(config, self.tower, self.num_layers)
        self.sep_settings[adapter_name] = settings
        if settings.num_prompts:
            self._inner = self._inner or wrapping.wrap(self)
            prompts = torch.empty(settings.num_prompts, self.hidden_size, dtype=torch.float32)
            self.sep_prompts[adapter_name] = nn.Parameter(nn.init.normal_(prompts, std=PROMPT_STD))
            keys = [SHARED] if settings.share_fusion else [str(index) for index in settings.fusion_layers]
            if settings.fusion_layers:
                self.sep_fusion[adapter_name] = LayerFusions(
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

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        """The tower as it was, without any wrapper; what wraps the projection or a reader is the model's to remove."""
        if self._inner:
            wrapping.unwrap(self)
            self._inner = ()
        if self.is_root:
            del self.base_layer.forward
        return self.base_layer

    # forward

    def forward(self, *args, **kwargs):
        if isinstance(chosen_adapters.get(), tuple):
            return mixed_batch.forward(self, self._bind(args, kwargs))
        adapter = self.prompting_adapter()
        if adapter is None:
            return self._call_base(*args, **kwargs)
        inputs = self._bind(args, kwargs)
        return_dict = self.pop_return_dict(inputs)
        prompted, frozen = self._run(adapter, inputs)
        if frozen is not None:
            mixing.mix_outputs(self, prompted, frozen, inputs)
        return prompted if return_dict else prompted.to_tuple()

    def pop_return_dict(self, inputs: dict) -> bool:
        """Take `return_dict` out of the tower's inputs; None is what the tower's configuration says."""
        return_dict = inputs.pop("return_dict", None)
        return getattr(self.base_layer.config, "return_dict", True) if return_dict is None else return_dict

    def _call_base(self, *args, **kwargs):
        """The tower as it is."""
        if self.is_root:
            return type(self.base_layer).forward(self.base_layer, *args, **kwargs)
        return self.base_layer(*args, **kwargs)

    @by_rows
    def embed(self, *args, trace: dict[int, FusionTrace] | None = None, **kwargs) -> Branches:
        """Both branches of the active adapter, projected, not normalized, not mixed.

        Takes what the tower takes. Without an active adapter, or one that leaves this tower alone, both are the frozen
        one. The frozen branch is always computed, also with ``frozen_weight=0``.
        """
        inputs = self._bind(args, kwargs)
        adapter = self.prompting_adapter()
        if adapter is None:
            frozen = self.embed_frozen(**inputs)
            return Branches(frozen, frozen)
        prompted, frozen = self._run(adapter, inputs, trace, embedding_only=True)
        return Branches(*(self.project(mixing.pooled(self, output, inputs)) for output in (prompted, frozen)))

    def embed_frozen(self, *args, **kwargs) -> torch.Tensor:
        """The frozen branch alone, (B, E), projected and not normalized; without gradients."""
        inputs = self._bind(args, kwargs)
        with torch.no_grad(), current_pass.set(FrozenPass(0, self._pooled_token(inputs))):
            output = self._call_base(**inputs, return_dict=True)
            return self.project(mixing.pooled(self, output, inputs))

    @by_rows
    def embed_prompted(self, *args, trunk: TrunkFeatures | None = None, **kwargs) -> torch.Tensor:
        """The prompted branch alone, (B, E), projected and not normalized.

        Args:
            trunk: of these inputs; layers below `start_layer` are then not run.
        """
        inputs = self._bind(args, kwargs)
        adapter = self.prompting_adapter()
        if adapter is None:
            return self.embed_frozen(**inputs)
        known = None if trunk is None else trunk.as_pass(self.sep_settings[adapter].start_layer)
        output = self._run_prompted(adapter, inputs, known, None, self._pooled_token(inputs))
        return self.project(mixing.pooled(self, output, inputs))

    @torch.no_grad()
    def trunk(self, *args, **kwargs) -> TrunkFeatures:
        """What training of the active adapter does not change: everything below `start_layer`, and the frozen branch.

        Takes what the tower takes. Dropout is off: what is kept for many steps must not be what one draw has left.

        Raises:
            ValueError: see `check_trunk`.
        """
        self.check_trunk()
        settings = self.active_settings
        inputs = self._bind(args, kwargs)
        known = FrozenPass(settings.start_layer, self._pooled_token(inputs))
        with current_pass.set(known), without_dropout(self.base_layer):
            output = self._call_base(**inputs, return_dict=True)
        self._layer_outputs = (known.num_outputs,)
        return TrunkFeatures(known.trunk, self.project(mixing.pooled(self, output, inputs)), known.num_outputs)

    def check_trunk(self) -> None:
        """
        Raises:
            ValueError: no adapter prompts this tower, it starts at layer 0, or the tower's layers come in stages.
        """
        settings = self.active_settings
        if settings is None or settings.start_layer == 0:
            raise ValueError(
                f"The {self.tower} tower has no trunk to keep: its prompts enter at start_layer=0, or it has none. "
                "Take SEPConfig(start_layer=...) above 0."
            )
        if self.spec.in_stages:
            raise ValueError(
                f"The {self.tower} tower of {type(self.owner).__name__} has layers in stages, whose trunk is more than "
                "hidden states. Train it without a cache."
            )

    def layer_outputs(self, inputs: dict) -> int | None:
        """`TrunkFeatures.num_outputs`, which belongs to the layers' code: found out by one run of `inputs`."""
        return (self._layer_outputs or (self.trunk(**inputs).num_outputs,))[0]

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """The model's own projection into the joint space, (B, D) -> (B, E)."""
        return pooled if self.model_projection is None else self.model_projection(pooled)

    def mix_read(self, prompted: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """What a reader has made of both branches, each (B, Q, D) -> its mix (B, Q, D), for the projection to map."""
        return mixing.mix_read(self, prompted, frozen)

    def projection_parameters(self) -> list[nn.Parameter]:
        """Parameters of the model's own projection."""
        return [] if self.model_projection is None else list(self.model_projection.parameters())

    @property
    def model_projection(self) -> nn.Module | None:
        """The model's own projection, or what wraps it; None where the tower projects."""
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
        adapter = self.prompting_adapter()
        return None if adapter is None else self.sep_settings[adapter]

    def position_shift(self, settings: TowerSettings) -> int:
        """How far tokens after the prompts move up."""
        has_room = self.spec.positions is not None or self.spec.rotary is not None
        return settings.num_prompts if settings.start_layer == 0 and has_room else 0

    def prompting_adapter(self) -> str | None:
        if self.disable_adapters:
            return None
        chosen = chosen_adapters.get()
        for name in self.active_adapters if chosen is None else (chosen,):
            if name in self.sep_prompts:
                return name
        return None

    def _bind(self, args: tuple, kwargs: dict) -> dict:
        inputs = dict(zip(self._argument_names, args, strict=False)) | kwargs
        return {self.spec.renamed_inputs.get(name, name): value for name, value in inputs.items()}

    def _run(self, adapter: str, inputs: dict, trace: dict | None = None, embedding_only: bool = False):
        """Outputs of the prompted pass and of the frozen pass, or None in its place where the mix does not need it.

        With `embedding_only` both outputs are there, and what they hold beside that which is pooled means nothing.
        """
        settings = self.sep_settings[adapter]
        pooled = self._pooled_token(inputs) if embedding_only else None
        frozen, shared = None, None
        if settings.frozen_weight > 0 or embedding_only:
            frozen_pass = FrozenPass(settings.start_layer, pooled)
            with torch.no_grad(), current_pass.set(frozen_pass):
                frozen = self._call_base(**inputs, return_dict=True)
            shared = frozen_pass if settings.start_layer else None
        prompted = self._run_prompted(adapter, inputs, shared, trace, pooled)
        if shared is not None:
            records.prepend_shared(prompted, frozen, self.spec, settings.start_layer, self._last_layers())
        return prompted, frozen

    def _pooled_token(self, inputs: dict) -> torch.Tensor | int | None:
        """Index of the one token that the tower pools, for all inputs or (B,); None where it is to compute all."""
        last = self._layer_lists()[-1][-1]
        if self.spec.mlp_norm is None or (last.training and getattr(last, "gradient_checkpointing", False)):
            return None  # a checkpointed layer runs again in the backward pass, where no pass is current
        if self.spec.inputs == "input_ids":
            return texts.eos(self, inputs).clamp(min=0)
        return 0

    def _run_prompted(
        self,
        adapter: str,
        inputs: dict,
        frozen: FrozenPass | None,
        trace: dict | None,
        pooled: torch.Tensor | int | None = None,
    ):
        settings = self.sep_settings[adapter]
        count, start = settings.num_prompts, settings.start_layer
        is_text, mask = self.spec.inputs == "input_ids", inputs.get(self.spec.mask_input)
        if is_text:
            texts.check_fit(self, inputs)
        prompted_pass = PromptedPass(
            spec=self.spec,
            prompts=self._entering_prompts(adapter),
            fusions=self._fusions(adapter),
            start_layer=start,
            last_layers=self._last_layers(),
            span=texts.span(self, inputs) if is_text else None,
            visible=None if is_text or mask is None else mask.bool(),
            frozen=frozen,
            position_shift=self.position_shift(settings),
            batch_coupled=settings.batch_coupled,
            trace=trace,
            rotary=None if self.spec.rotary is None else getattr(self.base_layer, self.spec.rotary),
            pooled=None if pooled is None else beside_prompts(pooled, count, self.spec.insert_at),
        )
        with current_pass.set(prompted_pass):
            output = self._call_base(**inputs, return_dict=True)
        records.strip(output, self.spec, count, prompted_pass.prompted_shape)
        return output

    def _entering_prompts(self, adapter: str) -> torch.Tensor:
        """The learned prompts (n, D) as they enter the first prompted layer."""
        prompts = self.sep_prompts[adapter]
        settings = self.sep_settings[adapter]
        if settings.start_layer > 0:
            return prompts
        if self.spec.positions is not None:
            positions = self.base_layer.get_submodule(self.spec.positions)
            prompts = prompts + positions.of_prompts(settings.num_prompts, prompts.device)
        if self.spec.entry_embedding is not None:
            prompts = prompts + self.base_layer.get_submodule(self.spec.entry_embedding).weight[0]
        if self.spec.entry_norm is not None:
            norm = self.base_layer.get_submodule(self.spec.entry_norm)
            prompts = norm(prompts.to(norm.weight.dtype))
        return prompts

    def _fusions(self, adapter: str) -> dict[int, TokenFusion]:
        if adapter not in self.sep_fusion:
            return {}
        fusions, settings = self.sep_fusion[adapter], self.sep_settings[adapter]
        return {i: fusions[SHARED if settings.share_fusion else str(i)] for i in settings.fusion_layers}


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and after it each module's own mode again."""
    training = [] if torch.compiler.is_compiling() else [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
