"""`SEPTower`: stands in the place of a tower and holds the prompts and fusions of all adapters.

It runs the tower twice, once as it is (the frozen pass) and once with prompts (the prompted pass), and mixes what comes
out. There is no state between calls.

Source of the method: arXiv 2405.15549 and https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
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
from ..method.stacked import Fusion, PromptMaker, of_inputs
from ..tracing import is_traced
from . import outputs
from .config import SEPConfig
from .current import chosen_adapters, current_pass
from .head import Head
from .layer_fusions import SHARED, AdapterFusions, LayerFusions, fusion_keys, new_fusion
from .mixed_batch import Group, groups_of, join_groups, weights_of_samples
from .modes import evaluating
from .offload import compute_device, loaded, put_forward, read_parameter, reset_forward
from .passes import FrozenPass, FusionTrace, PlainPass, PromptedPass, Trunk, TrunkFeatures
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
        """`forward` for a batch whose samples use different adapters: one frozen pass, and a prompted one a group."""
        return_dict, groups = self._pop_return_dict(inputs), self._groups(names, inputs)
        # samples without prompts are those of the frozen pass, except where gradients go through them
        plain = any(not group.adapters for group in groups) and not torch.is_grad_enabled()
        frozen, frozen_pass = None, None
        if plain or any(self._frozen_weights(group) != 0.0 for group in groups):
            frozen, frozen_pass = self._run_frozen(inputs, self._starts(groups))
        parts = [self._group_output(group, inputs, frozen, frozen_pass) for group in groups]
        self.head.align(parts)
        output = join_groups(parts, groups)
        return output if return_dict else output.to_tuple()

    def _group_output(self, group: Group, inputs: dict, frozen: Any, frozen_pass: FrozenPass | None) -> Any:
        """`forward` for one group of a batch, of which the frozen pass has run where somebody needs it."""
        own = group.of_inputs(inputs)
        if not group.adapters:
            if frozen is not None and not torch.is_grad_enabled():
                return group.of_output(frozen)
            with current_pass.set(PlainPass()):
                return self._call_base(**own, return_dict=True)
        trunk = self._group_trunk(group, frozen_pass)
        prompted, known = self._run_prompted(group.adapters, own, trunk), group.of_output(frozen)
        if trunk is not None:
            start = self.sep_settings[group.adapters[0]].start_layer
            outputs.prepend_shared(prompted, known, self.spec, start, self._last_layers())
        if (weights := self._frozen_weights(group)) != 0.0:
            if isinstance(weights, list):
                weights = torch.tensor(weights, device=prompted.last_hidden_state.device)[:, None]  # (B,) -> (B, 1)
            self.head.mix(prompted, known, own, weights)
        return prompted

    def _frozen_weights(self, group: Group) -> float | list[float]:
        """Share of the frozen embedding in the mix of a group's samples: one for all, or one for each."""
        weights = [self.sep_settings[adapter].frozen_weight for adapter in group.adapters]
        return weights if len(set(weights)) > 1 else (weights or [0.0])[0]

    def _groups(self, names: Sequence[str], inputs: Mapping[str, Any]) -> list[Group]:
        """The samples of a mixed batch that go through the tower together."""
        return groups_of(names, inputs, self._form)

    def _form(self) -> tuple[str | None, Hashable]:
        """The adapter that this call uses here, and what others must have in common with it to share its pass.

        Inputs of coupled adapters share theirs with inputs of the same adapter alone.
        """
        adapter = self.prompting_adapter()
        if adapter is None:
            return None, None
        settings = self.sep_settings[adapter]
        own = adapter if settings.batch_coupled else None
        return adapter, (replace(settings, frozen_weight=0.0), self.sep_prompts[adapter].dtype, own)

    def _starts(self, groups: Sequence[Group]) -> set[int]:
        """Layers of which the frozen pass computes what is below for prompted passes of these groups."""
        return {self.sep_settings[group.adapters[0]].start_layer for group in groups if group.adapters} - {0}

    def _group_trunk(self, group: Group, frozen_pass: FrozenPass | None) -> Trunk | None:
        start = self.sep_settings[group.adapters[0]].start_layer
        if frozen_pass is None or start == 0:
            return None
        trunk = frozen_pass.trunk(start)
        return Trunk(group.of_tensor(trunk.hidden), trunk.num_outputs)

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
        inputs, names = self._bind(args, kwargs), chosen_adapters.get()
        if isinstance(names, tuple):
            if trace is not None:
                raise ValueError("A trace is that of one adapter, but a mixed batch has several. Choose one adapter.")
            return self._embed_mixed(names, inputs, through_frozen)
        adapter, head = self.prompting_adapter(), self.head
        if adapter is None:
            frozen_embeds = self._embed_frozen(inputs, through_frozen)
            return Branches(frozen_embeds, frozen_embeds)
        prompted, frozen = self._run(adapter, inputs, trace, embedding_only=True, through_frozen=through_frozen)
        return Branches(head.embed(prompted, inputs), head.embed(frozen, inputs))

    def _embed_mixed(self, names: tuple[str, ...], inputs: dict, through_frozen: bool) -> Branches:
        """`embed` for a batch whose samples use different adapters: one frozen pass, and a prompted one a group."""
        groups = self._groups(names, inputs)
        frozen, frozen_pass = self._run_frozen(
            inputs, self._starts(groups), self._read_token(inputs), through_frozen=through_frozen
        )
        frozen_embeds = self.head.embed(frozen, inputs)
        parts = [
            self._embed_group(group, inputs, frozen_pass) if group.adapters else group.of_tensor(frozen_embeds)
            for group in groups
        ]
        return Branches(join_groups(parts, groups), frozen_embeds)

    def _embed_group(self, group: Group, inputs: dict, frozen_pass: FrozenPass | None) -> torch.Tensor:
        """The prompted branch of one group of a mixed batch."""
        own = group.of_inputs(inputs)
        trunk = self._group_trunk(group, frozen_pass)
        output = self._run_prompted(group.adapters, own, trunk, read_token=self._read_token(own))
        return self.head.embed(output, own)

    def embed_by(self, adapters: Sequence[str], *args, **kwargs) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Both branches of several adapters for the same inputs; the frozen one is computed once for all of them.

        Takes what the tower takes after the adapters' names. Projected, not normalized.

        Returns:
            the prompted embeddings (B, E) of each adapter, and the frozen ones (B, E), which all share.
        """
        inputs = self._bind(args, kwargs)
        count = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
        groups = [group for name in adapters for group in self._groups([name] * count, inputs)]
        frozen, frozen_pass = self._run_frozen(inputs, self._starts(groups), self._read_token(inputs))
        frozen_embeds = self.head.embed(frozen, inputs)
        prompted = [
            self._embed_group(group, inputs, frozen_pass) if group.adapters else frozen_embeds for group in groups
        ]
        return prompted, frozen_embeds

    def embed_frozen(self, *args, **kwargs) -> torch.Tensor:
        """The frozen branch alone, (B, E), projected and not normalized; without gradients."""
        return self._embed_frozen(self._bind(args, kwargs))

    def _embed_frozen(self, inputs: dict, through_frozen: bool = False) -> torch.Tensor:
        with _gradients(through_frozen), current_pass.set(FrozenPass(read_token=self._read_token(inputs))):
            output = self._call_base(**inputs, return_dict=True)
            return self.head.embed(output, inputs)

    def embed_prompted(self, *args, trunk: TrunkFeatures | None = None, **kwargs) -> torch.Tensor:
        """The prompted branch alone, (B, E), projected and not normalized.

        Args:
            trunk: of these inputs, for one adapter; layers below `start_layer` are then not run.
        """
        inputs, names = self._bind(args, kwargs), chosen_adapters.get()
        if isinstance(names, tuple):
            if trunk is not None:
                raise ValueError("A trunk is that of one adapter, but a mixed batch has several. Choose one adapter.")
            groups = self._groups(names, inputs)
            parts = [
                self._embed_group(group, inputs, None)
                if group.adapters
                else self._embed_frozen(group.of_inputs(inputs))
                for group in groups
            ]
            return join_groups(parts, groups)
        adapter = self.prompting_adapter()
        if adapter is None:
            return self._embed_frozen(inputs)
        known = None if trunk is None else trunk.trunk
        output = self._run_prompted((adapter,), inputs, known, read_token=self._read_token(inputs))
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
        with evaluating(self.base_layer):
            output, frozen_pass = self._run_frozen(inputs, {settings.start_layer}, self._read_token(inputs))
        hidden, num_outputs = frozen_pass.trunk(settings.start_layer)
        if not is_traced():
            self._layer_outputs = (num_outputs,)
        return TrunkFeatures(hidden, self.head.embed(output, inputs), num_outputs)

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
        return self.head.mix_read(prompted, frozen, self.frozen_weight_beside(prompted))

    def frozen_weight_beside(self, embeddings: torch.Tensor) -> float | torch.Tensor:
        """Share of the frozen embedding beside embeddings (B, ...): a number, or in a mixed batch (B, 1, ...)."""
        names = chosen_adapters.get()
        if not isinstance(names, tuple):
            return self.frozen_weight
        return weights_of_samples(names, lambda: self.frozen_weight, embeddings)

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
            starts = {settings.start_layer} - {0}
            frozen, frozen_pass = self._run_frozen(inputs, starts, read_token, through_frozen)
            shared = frozen_pass.trunk(settings.start_layer) if starts else None
        prompted = self._run_prompted((adapter,), inputs, shared, trace, read_token)
        if shared is not None:
            outputs.prepend_shared(prompted, frozen, self.spec, settings.start_layer, self._last_layers())
        return prompted, frozen

    def _run_frozen(
        self,
        inputs: dict,
        start_layers: Collection[int],
        read_token: torch.Tensor | int | None = None,
        through_frozen: bool = False,
    ) -> tuple[Any, FrozenPass]:
        """Output of the frozen pass, and the pass, which remembers what is below `start_layers`."""
        frozen_pass = FrozenPass(start_layers, read_token)
        with _gradients(through_frozen), current_pass.set(frozen_pass):
            return self._call_base(**inputs, return_dict=True), frozen_pass

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
        adapters: Sequence[str],
        inputs: dict,
        trunk: Trunk | None,
        trace: dict | None = None,
        read_token: torch.Tensor | int | None = None,
    ):
        """Output of the prompted pass, by one adapter or by one of the same form for each input."""
        settings = self.sep_settings[adapters[0]]
        count, start = settings.num_prompts, settings.start_layer
        is_text, mask = self.spec.inputs == "input_ids", inputs.get(self.spec.mask_input)
        if is_text:
            self.texts.check_room(inputs, settings)
        prompted_pass = PromptedPass(
            spec=self.spec,
            prompts=self._prompts_of(adapters),
            fusions=self._fusions_of(adapters),
            start_layer=start,
            last_layers=self._last_layers(),
            span=self.texts.span(inputs) if is_text else None,
            visible=None if is_text or mask is None else mask.bool(),
            trunk=trunk,
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

    def _prompts_of(self, adapters: Sequence[str]) -> torch.Tensor:
        """The learned prompts as they enter: (n, D) of one adapter, or (B, n, D) of one for each input."""
        entering = {adapter: self._entering_prompts(adapter) for adapter in dict.fromkeys(adapters)}
        if len(entering) == 1:
            return entering[adapters[0]]
        return torch.stack([entering[adapter] for adapter in adapters])

    def _fusions_of(self, adapters: Sequence[str]) -> Mapping[int, Fusion | PromptMaker]:
        """What makes prompts anew before each layer, by one adapter or by one for each input."""
        known = {adapter: self._fusions(adapter) for adapter in dict.fromkeys(adapters)}
        if len(known) == 1:
            return known[adapters[0]]
        return {index: of_inputs([known[adapter][index] for adapter in adapters]) for index in known[adapters[0]]}

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
