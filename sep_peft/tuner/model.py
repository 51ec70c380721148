"""`SEPModel`: puts SEP's layers into a model and takes them out again."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..families.find import find_architecture
from ..families.spec import Architecture
from .adapter_state import AdapterState
from .checks import check_adapter_name, check_config, target_towers
from .compiled import check_not_compiled, check_reached
from .config import SEPConfig
from .current import chosen_adapters, walked_adapter
from .files import check_numbers
from .gate import check_entries, check_weights
from .layer_fusions import LayerFusions
from .loading import current_loading
from .mixed_batch import check_a_name_for_each, check_adapter_names
from .offload import offload_hooks
from .registration import PREFIX
from .restore import unchanged_on_error
from .soup import check_combination, weighted_sum
from .tower import ROOT_CHILD, SEPTower
from .wrappers import SEPLayer, SEPProjection, SEPReader, Wrapper


#: Methods of models that take `adapter_names` as well, beside the forward.
FEATURE_METHODS = ("get_image_features", "get_text_features", "get_video_features")


class SEPModel(BaseTuner):
    """Self-Enhanced Prompt Tuning (arXiv 2405.15549) of both towers of a dual encoder.

    Usually made by `peft.get_peft_model(model, SEPConfig(...))`.

    Args:
        model: a dual encoder of transformers, such as `CLIPModel`.
        config: `SEPConfig`, or a dict of adapter name -> `SEPConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's parameters on the meta device, for loading.

    Raises:
        ValueError: the configuration does not fit the model; raised before the model is changed.

    Example:
        >>> import sep_peft
        >>> from peft import get_peft_model
        >>> from transformers import CLIPModel
        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch16")
        >>> model = get_peft_model(clip, sep_peft.SEPConfig())
        >>> model.print_trainable_parameters()
    """

    prefix: str = PREFIX
    tuner_layer_cls = SEPLayer
    peft_config: dict[str, SEPConfig]
    _architecture: Architecture  # of the model, as the adapter that is being added describes it

    # injection

    def __init__(self, model: nn.Module, config, adapter_name: str, *args, **kwargs):
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a PeftModel. To add SEP above the adapters it has, wrap the model inside: "
                "get_peft_model(model.get_base_model(), SEPConfig())."
            )
        if (loading := current_loading.get()) is not None:
            loading.remember()
        below = {k: c for k, c in getattr(model, "peft_config", {}).items() if not isinstance(c, SEPConfig)}
        if not below:
            super().__init__(model, config, adapter_name, *args, **kwargs)
            return
        # PEFT would write SEP's configurations into the dictionary of the method below, which would then save them
        owner = cast(Any, model)  # `nn.Module` declares tensors and modules as attributes, this is a dictionary
        before = owner.peft_config
        owner.peft_config = {k: c for k, c in before.items() if k not in below}
        try:
            super().__init__(model, config, adapter_name, *args, **kwargs)
        except Exception:
            owner.peft_config = before
            raise
        self.peft_config = owner.peft_config  # of its own: not found through the model any more
        owner.peft_config = below | self.peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter; see `BaseTuner.inject_adapter`. All checks come before `model` changes, those of the weights
        that a configuration was read with included, and where a later step fails, `model` is as before."""
        config, loading = self.peft_config.pop(adapter_name), current_loading.get()
        if loading is not None:
            loading.remember()
        self.peft_config[adapter_name] = config  # PEFT has put it there before this call
        try:
            check_adapter_name(adapter_name, model)
            check_not_compiled(model)
            _check_not_offloaded(model)
            architecture = find_architecture(model, config.architecture)
            found = check_config(config, architecture, model)
            check_weights(config, architecture, model, adapter_name, loading)
            self._architecture = architecture  # PEFT asks about every module of the model
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        if config.base_architecture not in (None, found):
            # A model of another architecture uses this very object and keeps it. Everywhere else PEFT's contract holds:
            # the configuration of a model is the object that was passed.
            config = self.peft_config[adapter_name] = copy.copy(config)
        config.base_architecture = found
        try:
            # a loader takes all back itself
            taken_back = nullcontext() if loading is not None else unchanged_on_error(self)
            with walked_adapter.set(adapter_name), taken_back:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        if loading is not None:
            loading.made.append((self, adapter_name))

    def _prepare_adapter_config(self, peft_config: SEPConfig, model_config: dict) -> SEPConfig:
        return peft_config

    def _prepare_model(self, peft_config: SEPConfig, model: nn.Module) -> None:
        """PEFT cannot replace the model itself, so one that is a tower gets a child for PEFT to replace."""
        is_tower = any(spec.path == "" for spec in self._architecture.towers.values())
        if is_tower and not hasattr(model, ROOT_CHILD):
            setattr(model, ROOT_CHILD, nn.Identity())

    def _check_target_module_exists(self, peft_config: SEPConfig, key: str) -> bool:
        modality = target_towers(peft_config, self._architecture).get(key)
        return modality is not None and self._architecture.towers[modality].refused is None

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """None where a model does not say which embeddings it has, as `FlavaForPreTraining`: PEFT asks all the same."""
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:
            return []

    def _create_and_replace(
        self,
        peft_config: SEPConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, SEPTower):
            modality = target_towers(peft_config, self._architecture)[current_key]
            base = self.model if current_key == ROOT_CHILD else target
            target = SEPTower(base, modality, self._architecture, self.model)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, peft_config)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze what the first adapter finds.

        A further one leaves everything that is there as it is, which is also what PEFT restores, but PEFT searches
        through the modules of all adapters for it.
        """
        if not any(len(tower.sep_settings) > 1 for tower in find_towers(model).values()):
            super()._mark_only_adapters_as_trainable(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, (SEPProjection, SEPReader)):  # a copy that `modules_to_save` trained
            new_module = new_module.base_layer
        if new_module is parent:  # unloading a model that is a tower itself
            delattr(parent, child_name)
        else:
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in fp32, to train in; `autocast_adapter_dtype=False` takes the model's dtype instead."""
        for tower in self.towers.values():
            if adapter_name not in tower.sep_prompts:
                continue
            dtype = torch.float32 if autocast_adapter_dtype else next(tower.base_layer.parameters()).dtype
            for parameter in tower.adapter_parameters(adapter_name):
                if parameter.dtype != dtype and (not autocast_adapter_dtype or parameter.dtype.itemsize < 4):
                    parameter.data = parameter.data.to(dtype)

    # use

    @property
    def towers(self) -> dict[str, SEPTower]:
        """ "text" and "vision" -> the wrapped tower."""
        return find_towers(self.model)

    @property
    def _trains_copies(self) -> bool:
        """Whether an adapter has `modules_to_save`, of which PEFT keeps a copy for each."""
        return any(config.modules_to_save for config in self.peft_config.values())

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            ValueError: more than one name.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"One SEP adapter can be active at a time, but got {list(adapter_name)}. Pass a single name."
            )
        if self._trains_copies:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            return
        # PEFT walks through all modules twice and switches every layer; a tower switches what is inside it
        for tower in self.towers.values():
            tower.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; where it was active, the first of the others becomes active."""
        # which other one becomes active PEFT finds out on its way through all of them
        with walked_adapter.set(None if adapter_name in self.active_adapters else adapter_name):
            super().delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters of SEP; those of methods below keep what they have."""
        for module in self._layers():
            module.set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self._layers():
            module.enable_adapters(enabled)

    def _layers(self) -> list[SEPLayer | AuxiliaryTrainingWrapper]:
        """Layers of SEP, and what `modules_to_save` wrapped if SEP did that; not those of methods below."""
        kinds = (SEPLayer, AuxiliaryTrainingWrapper) if self._trains_copies else SEPLayer
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose parameters are the weighted sum of those of others, a "model soup".

        It is not active, and not trained. Adapters that grew from one start, such as runs with different seeds of the
        data order or stages of one run, are worth to be averaged; ones that were initialized apart are not.

        Args:
            adapters: names of adapters of the same options.
            weights: one for each, taken as they are; an average has weights that sum to 1.
            adapter_name: name of the new adapter.

        Raises:
            ValueError: see `combine.check_combination`; raised before the model is changed.
        """
        check_combination(adapters, weights, adapter_name, self.peft_config)
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        self.inject_adapter(self.model, adapter_name)
        for tower in self.towers.values():
            sources = zip(*(tower.adapter_parameters(name) for name in adapters), strict=True)
            for target, parameters in zip(tower.adapter_parameters(adapter_name), sources, strict=True):
                target.data = weighted_sum(parameters, weights)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """What PEFT runs a forward in: `adapter_names` holds for this call and this thread."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with self._choosing(names, self.model.forward, args, kwargs):
            yield

    @contextmanager
    def _choosing(self, names: list[str], call: Callable, args: tuple, kwargs: dict) -> Iterator[None]:
        """Let each sample of a call's inputs use the adapter of its name.

        Raises:
            TypeError: `names` is no list.
            ValueError: the model is in training mode, a name is unknown, or their number is not that of the samples.
        """
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        inputs = dict(zip(inspect.signature(call).parameters, args, strict=False)) | kwargs
        check_a_name_for_each(names, inputs, (tower.spec.inputs for tower in self.towers.values()))
        check_adapter_names(names, self.peft_config)
        if not torch.compiler.is_dynamo_compiling():  # in a graph that begins further out they are seen
            for path, _ in named_towers(self.model):
                check_reached(self.model, path)
        with chosen_adapters.set(tuple(names)):
            yield

    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        return self._with_adapter_names(found) if name in FEATURE_METHODS else found

    def _with_adapter_names(self, method: Callable) -> Callable:
        """A method of the model that takes `adapter_names` too; ignored where this thread has disabled the adapters."""

        @wraps(method)
        def call(*args, adapter_names: list[str] | None = None, **kwargs):
            if adapter_names is None or any(tower.disabled_here for tower in self.towers.values()):
                return method(*args, **kwargs)
            with self._choosing(adapter_names, method, args, kwargs):
                return method(*args, **kwargs)

        return call

    def _check_merge_allowed(self) -> None:
        """Not a gap: there is nothing that a merge could write.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A SEP adapter cannot be merged: its prompts are computed from each input, so no change of the weights can "
            "stand for them. Keep the adapter attached, or call unload() to get the base model back without it."
        )

    # state dict: keys are `<tower>.sep_prompts` and `<tower>.sep_fusion.<layer>.<...>`

    @classmethod
    def _adapter_parameters(cls, model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
        """Key in `model.state_dict()` -> parameter, of one adapter."""
        found = {}
        for path, tower in named_towers(model):
            path = path.removeprefix("_fsdp_wrapped_module.")
            if adapter_name in tower.sep_prompts:
                found[f"{path}.sep_prompts.{adapter_name}"] = tower.sep_prompts[adapter_name]
            if adapter_name in tower.sep_fusion:
                prefix = f"{path}.sep_fusion.{adapter_name}"
                found |= {f"{prefix}.{key}": p for key, p in tower.sep_fusion[adapter_name].named_parameters()}
        return found

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        for tower in find_towers(model).values():
            if adapter_name in tower.sep_fusion:
                cast(LayerFusions, tower.sep_fusion[adapter_name]).check_parameters()
        tensors = {key: state_dict[key] for key in cls._adapter_parameters(model, adapter_name)}
        return AdapterState(tensors, model)  # to which PEFT would add embeddings of the base model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the name stands right after the container, where transformers' load_adapter puts it as well
        return re.sub(rf"(^|\.)({PREFIX}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)", r"\1\2", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """PEFT's hook for `model_keys`."""
        return cls.model_keys(model, adapter_name, state_dict)

    @classmethod
    def model_keys(
        cls, model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weights of an adapter file under the keys that the model has for them.

        Args:
            model: with an adapter of this name.
            adapter_name: of the adapter.
            state_dict: entries of the file.

        Raises:
            AdapterMismatchError: a key is missing, unexpected or of another shape.
            ValueError: a number is not finite or far too large.
        """
        parameters = cls._adapter_parameters(model, adapter_name)
        key_of = {
            "base_model.model."
            + cls._remove_adapter_name_from_key(key, adapter_name).removeprefix("base_model.model."): key
            for key in parameters
        }
        full_keys = {key: "base_model.model." + key.removeprefix("base_model.model.") for key in state_dict}
        others = [key for key, full in full_keys.items() if full not in key_of]
        # what modules_to_save brought has been renamed by PEFT already; nothing else of the model is a file's to change
        copies = f".modules_to_save.{adapter_name}."
        known = {key for key in model.state_dict() if copies in key} if others else ()
        remapped = {key_of.get(full_keys[key], key): value for key, value in state_dict.items()}
        found = {full: state_dict[key].shape for key, full in full_keys.items() if full in key_of or key not in known}
        expected = {full: parameters[key].shape for full, key in key_of.items()}
        source = f"the file of adapter {adapter_name!r}"
        check_entries(found, expected, model, source)
        check_numbers(state_dict.items(), source)
        return remapped


def named_towers(model: nn.Module, path: str = "") -> Iterator[tuple[str, SEPTower]]:
    """Path and tower of each tower with SEP's prompts in `model`, whose own path is `path`.

    Towers are not entered: what many adapters have in there takes a long time to walk through.
    """
    if isinstance(model, SEPTower):
        yield path, model
        return
    for name, child in model.named_children():
        yield from named_towers(child, f"{path}.{name}" if path else name)


def _check_not_offloaded(model: nn.Module) -> None:
    """
    Raises:
        ValueError: accelerate has offloaded adapters of the model, and would look for a further one among them.
    """
    for path, tower in named_towers(model):
        if offload_hooks(tower.sep_prompts):
            raise ValueError(
                f"accelerate offloads {path} with the adapters that it had then, so a further one would not be found. "
                "Add all adapters to the model first, and offload it then."
            )


def find_towers(model: nn.Module) -> dict[str, SEPTower]:
    """ "text" and "vision" -> the tower with SEP's prompts; empty without an adapter."""
    return {tower.modality: tower for _, tower in named_towers(model)}


@contextmanager
def lifted(model: nn.Module) -> Iterator[nn.Module]:
    """Take SEP out of a model for a while, so that adapters of other methods below it can be saved, loaded or merged.

    Other methods find their layers by path, and SEP's wrappers are a part of paths. In the block paths and outputs are
    those of the model below SEP; after it SEP is back, above whatever the block has made.

    Args:
        model: a `PeftModel` with SEP, or the model that it wraps.

    Yields:
        the model without SEP.

    Example:
        >>> with lifted(model):
        ...     lora_model.save_pretrained("my-lora")
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    places = []
    for path, module in base.named_modules():
        parent_path, _, name = path.rpartition(".")
        if isinstance(module, Wrapper) and name != ROOT_CHILD:
            places.append((base.get_submodule(parent_path), name, module))
    for parent, name, wrapper in places:
        setattr(parent, name, wrapper.base_layer)
    try:
        yield base
    finally:
        for parent, name, wrapper in places:
            wrapper.base_layer = getattr(parent, name)
            setattr(parent, name, wrapper)
