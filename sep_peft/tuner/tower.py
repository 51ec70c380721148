"""`SEPTower`: stands in the place of a tower and holds the prompts and fusions of all adapters.

It runs the tower twice, once as it is (the frozen pass) and once with prompts (the prompted pass), and mixes what comes
out. There is no state between calls.

Source of the method: arXiv 2405.15549 and https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import is_compiled_module
from torch import nn

from ..families.spec import Architecture, TowerSpec
from ..method.coupled import CoupledSelection
from ..method.fusion import TokenFusion
from ..method.independent import PROMPT_STD, LearnedPrompts
from ..method.select import Selection
from ..method.sequence import beside_prompts
from ..method.sources import ScatteredSelection
from ..tracing import is_traced
from . import outputs
from .config import SEPConfig
from .current import chosen_adapters, current_pass
from .head import Head
from .layer_fusions import SHARED, AdapterFusions, LayerFusions, fusion_keys, new_fusion
from .mixed_batch import join, run_groups, run_samples, weights_of_samples
from .modes import evaluating
from .offload import compute_device, loaded, put_forward, read_parameter, reset_forward
from .passes import FrozenPass, FusionTrace, PlainPass, PromptedPass, TrunkFeatures
from .settings import TowerSettings
from .texts import TextRules
from .wrappers import SEPLayer, SEPPositionEmbedding, layer_lists
from .wrapping import unwrap_tower, wrap_after, wrap_tower


#: Name of the `SEPTower` inside a model that is a tower itself.
ROOT_CHILD = "prompted"


class Branches(NamedTuple):
    """Projected, not yet normalized embeddings of both branches of a tower, each (B, E), or (B, Q, E) with a reader."""

    prompted: torch.Tensor
    frozen: torch.Tensor


class SEPTower(SEPLayer):
    """A tower with prompts and fusions per adapter.

    Called like the tower it wraps, and returns what the tower returns: `last_hidden_state`, `hidden_states` and
    `attentions` are those of the prompted pass without the prompts (see `outputs`), `pooler_output` is the mix of both
    passes that comes out of the model's projection as SEP's embedding (see `frozen_share`), so the model
    around it needs no change. Where a reader follows (`TowerSpec.reader`), `last_hidden_state` holds the tokens of both
    passes side by side.

    Args:
        base_layer: the tower.
        modality: "text" or "vision".
        architecture: of the model.
        model: the model that owns the tower and its projection. Where it is the tower itself, this module becomes its
            child `ROOT_CHILD` and takes over its forward.

    Attributes:
        selection: chooses the tokens that fusions read; None: by the rule of the paper. Another one serves all adapters
            whose fusions read "selected" tokens and that are not `batch_coupled`; it is not saved.
    """

    adapter_layer_names = ("sep_prompts", "sep_fusion")
    other_param_names = ("sep_settings",)

    def __init__(self, base_layer: nn.Module, modality: str, architecture: Architecture, model: nn.Module):
        super().__init__(base_layer)
        self.modality = modality
        self.architecture = architecture
        self.is_root = base_layer is model
        if self.is_root:  # a child cannot own its parent; the attribute stays, out of the registry of modules
            del self._modules["base_layer"]
            vars(self)["base_layer"] = base_layer
        self._owner = (model,)  # in a tuple, so that the model does not become a child of its own tower
        self._argument_names = tuple(inspect.signature(base_layer.forward).parameters)
        self._inner: tuple[SEPLayer, ...] = ()  # wrappers inside the tower, for bookkeeping
        self._layer_outputs: tuple = ()  # see `layer_outputs`
        self._disabled_by: set[int] = set()  # threads that have disabled the adapters
        self.selection: Selection | None = None
        self.sep_prompts = nn.ParameterDict()
        self.sep_fusion = AdapterFusions()
        self.sep_settings: dict[str, TowerSettings] = {}
        if self.is_root:
            put_forward(base_layer, self.forward)

    @property
    def spec(self) -> TowerSpec:
        """What is known of the tower."""
        return self.architecture.towers[self.modality]

    @property
    def owner(self) -> nn.Module:
        """The model that owns the tower."""
        return self._owner[0]

    # made when they are asked for: whatever stands in the place of the tower or of the projection meanwhile is found

    @property
    def head(self) -> Head:
        """Pooling, projection and mix of the tower."""
        return Head(self.spec, self.base_layer, self.owner)

    @property
    def texts(self) -> TextRules:
        """What the tower does with tokenized texts."""
        return TextRules(self.spec, self.base_layer)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch. What holds the adapters stays as it is where a copy of the model has its modules compiled, as by
        `accelerate.utils.compile_regions`: it is looked into and never called."""
        if name in self.adapter_layer_names and module is not None and is_compiled_module(module):
            module = cast(nn.Module, module._orig_mod)
        super().add_module(name, module)

    # adapters

    @property
    def hidden_size(self) -> int:
        """D, width of the tower."""
        return self.head.width

    @property
    def num_layers(self) -> int:
        """Encoder layers of the tower, those of all its stages."""
        return sum(map(len, self._layer_lists()))

    def _layer_lists(self) -> list[nn.ModuleList]:
        return layer_lists(self.base_layer, self.spec.layers)

    def _last_layers(self) -> tuple[int, ...]:
        """Index of the last layer of each list."""
        return tuple(end - 1 for end in accumulate(map(len, self._layer_lists())))

    def update_layer(self, adapter_name: str, config: SEPConfig) -> None:
        """Add an adapter, with fp32 parameters on the tower's device."""
        settings = TowerSettings.from_config(config, self.modality, self.num_layers)
        self.sep_settings[adapter_name] = settings
        if settings.num_prompts:
            if not self._inner:
                self._inner = wrap_tower(self.base_layer, self.spec)
                wrap_after(self.owner, self.spec, self.hidden_size, self.mix_read)
            # on the CPU first, so that a seed gives the same adapter on every device; where there is no memory, on meta
            device = "meta" if compute_device(self.base_layer).type == "meta" else "cpu"
            prompts = torch.empty(settings.num_prompts, self.hidden_size, dtype=torch.float32, device=device)
            self.sep_prompts[adapter_name] = nn.Parameter(nn.init.normal_(prompts, std=PROMPT_STD))
            if keys := fusion_keys(settings):
                fusions = {key: new_fusion(config, self.modality, self.hidden_size, device) for key in keys}
                self.sep_fusion[adapter_name] = LayerFusions(fusions)
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the device only: the dtype is the tuner's business. Nothing goes to meta, where values are lost."""
        device = device or compute_device(self.base_layer)
        for parameter in self.adapter_parameters(adapter_name):
            if not parameter.is_meta and device.type != "meta":
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
            layer.follow(self._active_adapter)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters of the tower on or off, for every thread that asks for the active one.

        An adapter that a call asks for by name is off only in the thread that turned them off.
        """
        super().enable_adapters(enabled)
        change = self._disabled_by.discard if enabled else self._disabled_by.add
        change(threading.get_ident())

    @property
    def disabled_here(self) -> bool:
        """Whether this thread has turned the adapters off."""
        if not self.disable_adapters or torch.compiler.is_dynamo_compiling():  # which cannot trace what follows
            return self.disable_adapters
        return threading.get_ident() in self._disabled_by

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        """The tower as it was, without any wrapper; what wraps the projection or a reader is the model's to remove."""
        if self._inner:
            unwrap_tower(self.base_layer, self.spec)
            self._inner = ()
        if self.is_root:
            reset_forward(self.base_layer)
        return self.base_layer

    def _replicate_for_data_parallel(self):
        """Torch's hook for the copies that DataParallel makes.

        Raises:
            RuntimeError: always. A copy of a tower would find its projection in the model on the first device.
        """
        raise RuntimeError(
            "SEP does not run in torch.nn.DataParallel on several devices. Start one process for each device with "
            "torchrun or accelerate launch; DistributedDataParallel, Trainer and fit then share out the images."
        )

    # forward

    def forward(self, *args, **kwargs):
        """What the tower gives out, with the mix in the place of what the model pools."""
        names = chosen_adapters.get()
        if isinstance(names, tuple):
            return self._forward_mixed(names, self._bind(args, kwargs))
        adapter = self.prompting_adapter()
        if adapter is None:
            with current_pass.set(PlainPass()):
                return self._call_base(*args, **kwargs)
        inputs = self._bind(args, kwargs)
        return_dict = self._pop_return_dict(inputs)
        prompted, frozen = self._run(adapter, inputs)
        if frozen is not None:
            self.head.mix(prompted, frozen, inputs, self.frozen_weight)
        return prompted if return_dict else prompted.to_tuple()

    def _forward_mixed(self, names: tuple[str, ...], inputs: dict):
        """`forward` for a batch whose samples use different adapters."""
        return_dict = self._pop_return_dict(inputs)
        parts, order = run_groups(names, inputs, partial(self.forward, return_dict=True))
        self.head.align(parts)
        output = join(parts, order)
        return output if return_dict else output.to_tuple()

    def _by_samples(self, call: Callable, inputs: dict) -> Any:
        """Call something that takes what the tower takes; in a mixed batch once for each adapter."""
        names = chosen_adapters.get()
        return run_samples(names, inputs, call) if isinstance(names, tuple) else call(**inputs)

    def _pop_return_dict(self, inputs: dict) -> bool:
        """Take `return_dict` out of the tower's inputs; None is what the tower's configuration says."""
        return_dict = inputs.pop("return_dict", None)
        return getattr(self.base_layer.config, "return_dict", True) if return_dict is None else return_dict

    def _call_base(self, *args, **kwargs):
        """The tower as it is."""
        if self.is_root:
            with loaded(self.base_layer):
                return type(self.base_layer).forward(self.base_layer, *args, **kwargs)
        return self.base_layer(*args, **kwargs)

    def embed(
        self, *args, trace: dict[int, FusionTrace] | None = None, through_frozen: bool = False, **kwargs
    ) -> Branches:
        """Both branches of the active adapter, projected, not normalized, not mixed.

        Takes what the tower takes. Without an active adapter, or one that leaves this tower alone, both are the frozen
        one. The frozen branch is always computed, also with ``frozen_weight=0``.

        Args:
            trace: collects what every fusion saw, by layer.
            through_frozen: let gradients with respect to the inputs go through the frozen branch, and through the
                layers below `start_layer`, as well. Training does not need them: nothing there is trained.
        """
        return self._by_samples(partial(self._embed_both, trace, through_frozen), self._bind(args, kwargs))

    def _embed_both(self, trace: dict[int, FusionTrace] | None, through_frozen: bool, /, **inputs) -> Branches:
        adapter, head = self.prompting_adapter(), self.head
        if adapter is None:
            frozen_embeds = self._embed_frozen(inputs, through_frozen)
            return Branches(frozen_embeds, frozen_embeds)
        prompted, frozen = self._run(adapter, inputs, trace, embedding_only=True, through_frozen=through_frozen)
        return Branches(head.embed(prompted, inputs), head.embed(frozen, inputs))

    def embed_frozen(self, *args, **kwargs) -> torch.Tensor:
        """The frozen branch alone, (B, E), projected and not normalized; without gradients."""
        return self._embed_frozen(self._bind(args, kwargs))

    def _embed_frozen(self, inputs: dict, through_frozen: bool = False) -> torch.Tensor:
        with _gradients(through_frozen), current_pass.set(FrozenPass(0, self._read_token(inputs))):
            output = self._call_base(**inputs, return_dict=True)
            return self.head.embed(output, inputs)

    def embed_prompted(self, *args, trunk: TrunkFeatures | None = None, **kwargs) -> torch.Tensor:
        """The prompted branch alone, (B, E), projected and not normalized.

        Args:
            trunk: of these inputs; layers below `start_layer` are then not run.
        """
        return self._by_samples(partial(self._embed_prompted, trunk), self._bind(args, kwargs))

    def _embed_prompted(self, trunk: TrunkFeatures | None, /, **inputs) -> torch.Tensor:
        adapter = self.prompting_adapter()
        if adapter is None:
            return self.embed_frozen(**inputs)
        known = None if trunk is None else trunk.as_pass(self.sep_settings[adapter].start_layer)
        output = self._run_prompted(adapter, inputs, known, None, self._read_token(inputs))
        return self.head.embed(output, inputs)

    @torch.no_grad()
    def trunk(self, *args, **kwargs) -> TrunkFeatures:
        """What training of the active adapter does not change: everything below `start_layer`, and the frozen branch.

        Takes what the tower takes. Dropout is off: what is kept for many steps must not be what one draw has left.

        Raises:
            ValueError: see `check_trunk`.
        """
        settings = self.check_trunk()
        inputs = self._bind(args, kwargs)
        known = FrozenPass(settings.start_layer, self._read_token(inputs))
        with current_pass.set(known), evaluating(self.base_layer):
            output = self._call_base(**inputs, return_dict=True)
        if not is_traced():
            self._layer_outputs = (known.num_outputs,)
        return TrunkFeatures(known.trunk, self.head.embed(output, inputs), known.num_outputs)

    def check_trunk(self) -> TowerSettings:
        """Make sure that there is something below the first prompts; returns the settings of the active adapter.

        Raises:
            ValueError: no adapter prompts this tower, it starts at layer 0, or the tower's layers come in stages.
        """
        settings = self.active_settings
        if settings is None or settings.start_layer == 0:
            raise ValueError(
                f"The {self.modality} tower has no trunk to keep: its prompts enter at start_layer=0, or it has none. "
                "Take SEPConfig(start_layer=...) above 0."
            )
        if self.spec.in_stages:
            raise ValueError(
                f"The {self.modality} tower of {type(self.owner).__name__} has layers in stages, whose trunk is more "
                "than hidden states. Train it without a cache."
            )
        return settings

    def layer_outputs(self, inputs: dict) -> int | None:
        """`TrunkFeatures.num_outputs`, which belongs to the layers' code: found out by one run of `inputs`."""
        return (self._layer_outputs or (self.trunk(**inputs).num_outputs,))[0]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Parameters of the model's own projection."""
        return self.head.parameters()

    def mix_read(self, prompted: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """What a reader has made of both branches, each (B, Q, D) -> its mix (B, Q, D), for the projection to map."""
        names = chosen_adapters.get()
        weight: float | torch.Tensor = (
            self.frozen_weight
            if not isinstance(names, tuple)
            else weights_of_samples(names, lambda: self.frozen_weight, prompted)
        )
        return self.head.mix_read(prompted, frozen, weight)

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

    def prompting_adapter(self) -> str | None:
        """Name of the adapter that this call uses, where it puts prompts into this tower."""
        chosen = chosen_adapters.get()
        if self.disable_adapters and (chosen is None or self.disabled_here):
            return None
        for name in self.active_adapters if chosen is None else (chosen,):
            if name in self.sep_prompts:
                return name
        return None

    def _bind(self, args: tuple, kwargs: dict) -> dict:
        inputs = dict(zip(self._argument_names, args, strict=False)) | kwargs
        return {self.spec.renamed_inputs.get(name, name): value for name, value in inputs.items()}

    def _run(
        self,
        adapter: str,
        inputs: dict,
        trace: dict | None = None,
        embedding_only: bool = False,
        through_frozen: bool = False,
    ):
        """Outputs of the prompted pass and of the frozen pass, or None in its place where the mix does not need it.

        With `embedding_only` both outputs are there, and what they hold beside that which is pooled means nothing.
        `through_frozen` is that of `embed`.
        """
        settings = self.sep_settings[adapter]
        read_token = self._read_token(inputs) if embedding_only else None
        frozen, shared = None, None
        if settings.frozen_weight > 0 or embedding_only:
            frozen_pass = FrozenPass(settings.start_layer, read_token)
            with _gradients(through_frozen), current_pass.set(frozen_pass):
                frozen = self._call_base(**inputs, return_dict=True)
            shared = frozen_pass if settings.start_layer else None
        prompted = self._run_prompted(adapter, inputs, shared, trace, read_token)
        if shared is not None:
            outputs.prepend_shared(prompted, frozen, self.spec, settings.start_layer, self._last_layers())
        return prompted, frozen

    def _read_token(self, inputs: dict) -> torch.Tensor | int | None:
        """Index of the one token that the model reads, for all inputs or (B,); None where the tower computes all."""
        last = self._layer_lists()[-1][-1]
        if self.spec.mlp_norm is None or (last.training and getattr(last, "gradient_checkpointing", False)):
            return None  # a checkpointed layer runs again in the backward pass, where no pass is current
        if self.spec.inputs == "input_ids":
            eos = self.texts.eos(inputs)
            return 0 if eos is None else eos.clamp(min=0)
        return 0

    def _run_prompted(
        self,
        adapter: str,
        inputs: dict,
        frozen: FrozenPass | None,
        trace: dict | None,
        read_token: torch.Tensor | int | None = None,
    ):
        settings = self.sep_settings[adapter]
        count, start = settings.num_prompts, settings.start_layer
        is_text, mask = self.spec.inputs == "input_ids", inputs.get(self.spec.mask_input)
        if is_text:
            self.texts.check_room(inputs, settings)
        prompted_pass = PromptedPass(
            spec=self.spec,
            prompts=self._entering_prompts(adapter),
            fusions=self._fusions(adapter),
            start_layer=start,
            last_layers=self._last_layers(),
            span=self.texts.span(inputs) if is_text else None,
            visible=None if is_text or mask is None else mask.bool(),
            frozen=frozen,
            position_shift=settings.position_shift(self.spec),
            fusion_tokens=settings.fusion_tokens,
            selection=self._selection_of(settings),
            trace=trace,
            rotary=None if self.spec.rotary is None else getattr(self.base_layer, self.spec.rotary),
            read_token=None if read_token is None else beside_prompts(read_token, count, self.spec.insert_at),
        )
        with current_pass.set(prompted_pass):
            output = self._call_base(**inputs, return_dict=True)
        assert prompted_pass.prompted_shape is not None, "the pass has run layer start_layer"
        outputs.strip(output, self.spec, count, prompted_pass.prompted_shape)
        return output

    def _selection_of(self, settings: TowerSettings) -> Selection:
        """What chooses the tokens that an adapter's fusions read."""
        if settings.batch_coupled:
            return CoupledSelection()
        return ScatteredSelection() if settings.fusion_tokens == "random" else self.selection or Selection()

    def _entering_prompts(self, adapter: str) -> torch.Tensor:
        """The learned prompts (n, D) as they enter the first prompted layer."""
        prompts = read_parameter(self, f"sep_prompts.{adapter}")  # of a dictionary, whose forward nobody calls
        settings = self.sep_settings[adapter]
        if settings.start_layer > 0:
            return prompts
        if self.spec.positions is not None:
            positions = cast(SEPPositionEmbedding, self.base_layer.get_submodule(self.spec.positions))
            prompts = prompts + positions.of_prompts(settings.num_prompts, prompts.device)
        if self.spec.entry_embedding is not None:
            prompts = prompts + read_parameter(self.base_layer, f"{self.spec.entry_embedding}.weight")[0]
        if self.spec.entry_norm is not None:
            norm = self.base_layer.get_submodule(self.spec.entry_norm)
            prompts = norm(prompts.to(cast(torch.Tensor, norm.weight).dtype))
        return prompts

    def _fusions(self, adapter: str) -> dict[int, TokenFusion | LearnedPrompts]:
        if adapter not in self.sep_fusion:
            return {}
        fusions = cast(Mapping[str, TokenFusion | LearnedPrompts], self.sep_fusion[adapter])
        settings = self.sep_settings[adapter]
        return {i: fusions[SHARED if settings.share_fusion else str(i)] for i in settings.fusion_layers}


def _gradients(wanted: bool) -> torch.set_grad_enabled:
    """Gradients in the block where they are wanted and the caller has them on."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())
