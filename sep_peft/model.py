"""`SEPModel`: puts SEP's layers into a model and takes them out again."""

from __future__ import annotations

import copy
import re

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .architectures import ARCHITECTURES, Architecture, TowerSpec
from .checkpoint import check_keys
from .config import SEPConfig
from .layer import SEPLayer, SEPTower
from .registration import PREFIX


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

    # injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter; see `BaseTuner.inject_adapter`. All checks come before `model` changes."""
        try:
            check_adapter_name(adapter_name, model)
            # A copy, because what is learned about this model is written into it, and one configuration may be used
            # for several models.
            config = copy.copy(self.peft_config[adapter_name])
            architecture = find_architecture(model)
            config.base_architecture = check_fit(config, architecture, model)
        except ValueError:
            del self.peft_config[adapter_name]
            raise
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: SEPConfig, model_config: dict) -> SEPConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: SEPConfig, key: str) -> bool:
        return key in target_towers(peft_config, find_architecture(self.model))

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
            tower = target_towers(peft_config, find_architecture(self.model))[current_key]
            spec = find_architecture(self.model).towers[tower]
            target = SEPTower(target, tower, spec, self.model)
            self._replace_module(parent, target_name, target, target.base_layer)
        target.update_layer(adapter_name, peft_config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
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
        return {module.tower: module for module in self.model.modules() if isinstance(module, SEPTower)}

    @property
    def architecture(self) -> Architecture:
        """The row of the wrapped model."""
        return find_architecture(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            ValueError: more than one name.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"One SEP adapter can be active at a time, but got {list(adapter_name)}. Pass a single name."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "A SEP adapter cannot be merged: its prompts are computed from each input, so no change of the weights can "
            "stand for them. Keep the adapter attached, or call unload() to get the base model back without it."
        )

    # state dict: keys are `<tower>.sep_prompts` and `<tower>.sep_fusion.<layer>.<...>`

    @classmethod
    def _adapter_keys(cls, model: nn.Module, adapter_name: str) -> list[str]:
        """Keys of one adapter in `model.state_dict()`."""
        keys = []
        for name, module in model.named_modules():
            if not isinstance(module, SEPTower):
                continue
            name = name.removeprefix("_fsdp_wrapped_module.")
            for child in ("sep_prompts", "sep_fusion"):
                prefix = f"{child}.{adapter_name}"
                keys += [
                    f"{name}.{key}"
                    for key, _ in module.named_parameters()
                    if key == prefix or key.startswith(prefix + ".")
                ]
        return keys

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        return {key: state_dict[key] for key in cls._adapter_keys(model, adapter_name)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the name stands right behind the container, where transformers' load_adapter puts it as well
        return re.sub(rf"(^|\.)({PREFIX}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)", r"\1\2", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Checkpoint keys -> model keys.

        Raises:
            AdapterMismatchError: a key is missing, unexpected or of another shape.
        """
        current = model.state_dict()
        model_keys = {
            "base_model.model."
            + cls._remove_adapter_name_from_key(key, adapter_name).removeprefix("base_model.model."): key
            for key in cls._adapter_keys(model, adapter_name)
        }
        remapped, found = {}, {}
        for key, value in state_dict.items():
            full = "base_model.model." + key.removeprefix("base_model.model.")
            if full in model_keys:
                remapped[model_keys[full]] = value
                found[full] = value.shape
            else:
                remapped[key] = value
                if key not in current:  # what modules_to_save brought has been renamed by PEFT already
                    found[full] = value.shape
        expected = {full: current[key].shape for full, key in model_keys.items()}
        check_keys(found, expected, f"the file of adapter {adapter_name!r}")
        return remapped


def find_architecture(model: nn.Module) -> Architecture:
    """The row of a model.

    Raises:
        ValueError: its model type has none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"SEP does not know the towers of {type(model).__name__} (model type {model_type!r}); it knows "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]


def target_towers(config: SEPConfig, architecture: Architecture) -> dict[str, str]:
    """Path of each tower to adapt -> "text" or "vision"."""
    towers = {spec.path: tower for tower, spec in architecture.towers.items()}
    if config.target_modules is None:
        return towers
    return {path: tower for path, tower in towers.items() if path in config.target_modules}


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse names that PEFT would confuse with parts of a key.

    Raises:
        ValueError: says which part.
    """
    if not name or "." in name:
        raise ValueError(f"An adapter name must not be empty nor contain a dot, but got {name!r}.")
    if name in PREFIX:
        raise ValueError(
            f"The adapter name {name!r} is a part of SEP's prefix {PREFIX!r}, so keys could not be told apart. Choose "
            "another name."
        )
    own = {part for path, _ in model.named_modules() if f"{PREFIX}" not in path for part in path.split(".")}
    if name in own | FUSION_PARTS:
        raise ValueError(
            f"The adapter name {name!r} is also the name of a module inside the model, so keys could not be told "
            "apart. Choose another name."
        )


#: Names below `sep_fusion.<adapter>` that may not be adapter names.
FUSION_PARTS = frozenset(
    "shared norm1 attention norm2 fc1 fc2 query key value output down up weight bias scale1 scale2".split()
)


def check_fit(config: SEPConfig, architecture: Architecture, model: nn.Module) -> dict:
    """Check a configuration against a model, without touching it.

    Returns:
        what an adapter must find to be loaded: model type, and width and depth of each tower.

    Raises:
        ValueError: an option does not fit, or the adapter was made for another architecture.
    """
    known = [spec.path for spec in architecture.towers.values()]
    for path in config.target_modules or ():
        if path not in known:
            raise ValueError(f"target_modules must be among {known} for this model, but got {path!r}.")
    found = {"model_type": model.config.model_type}
    for path, tower in target_towers(config, architecture).items():
        module = model.get_submodule(path)
        while isinstance(module, SEPTower):
            module = module.base_layer
        layers = module.get_submodule(architecture.towers[tower].layers)
        found[tower] = {"hidden_size": module.config.hidden_size, "num_layers": len(layers)}
        if config.prompts_of(tower):
            _check_tower(config, tower, architecture.towers[tower], module, len(layers))
    wanted = config.base_architecture
    if wanted is not None and wanted != found:
        raise ValueError(
            f"This adapter was made for another architecture: it needs {wanted}, but the model has {found}."
        )
    if not any(config.prompts_of(tower) for tower in found if tower != "model_type"):
        raise ValueError(
            f"No prompts are left for target_modules={config.target_modules}: num_text_prompts="
            f"{config.num_text_prompts}, num_vision_prompts={config.num_vision_prompts}."
        )
    return found


def _check_tower(config: SEPConfig, tower: str, spec: TowerSpec, module: nn.Module, num_layers: int) -> None:
    if config.start_layer >= num_layers:
        raise ValueError(
            f"start_layer must be below {num_layers}, the number of layers of the {tower} tower, but got "
            f"{config.start_layer}."
        )
    for index in config.layers_of(tower) or ():
        if index >= num_layers:
            raise ValueError(
                f"{tower}_layers must be below {num_layers}, the number of layers of the {tower} tower, but got "
                f"{index}."
            )
    count = config.prompts_of(tower)
    if spec.positions is not None and config.start_layer == 0:
        positions = module.get_submodule(spec.positions).weight.shape[0]
        room = positions - 2  # BOS and EOS stay
        if count > room:
            raise ValueError(
                f"num_{tower}_prompts must be at most {room}, because the {tower} tower has {positions} positions and "
                f"needs two for BOS and EOS, but got {count}."
            )
    elif spec.inputs == "pixel_values" and config.fusion == "attention":
        tokens = _num_image_tokens(module)
        if tokens is not None and count > tokens:
            raise ValueError(
                f"num_{tower}_prompts must be at most {tokens}, the number of tokens of a picture to select from, but "
                f"got {count}."
            )


def _num_image_tokens(tower: nn.Module) -> int | None:
    """Patches of a picture of the configured size, CLS not counted; None where the size is open."""
    size, patch = getattr(tower.config, "image_size", None), getattr(tower.config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    return (size // patch) ** 2
