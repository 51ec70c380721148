"""Whether a configuration fits a model; everything is found out before the model is changed."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..families.spec import Architecture, TowerSpec
from .config import CHOSEN_TOKENS, SEPConfig
from .lengths import count_image_tokens, most_tokens
from .messages import shown
from .offload import offload_hooks
from .paths import check_model_paths, check_tower_paths
from .registration import PREFIX
from .tower import ROOT_CHILD, SEPTower
from .wrappers import SEPLayer, count_positions, layer_lists
from .wrapping import wrapped_modules


#: Longest name of an adapter, in UTF-8; file systems take 255 bytes, temporary names included.
MAX_NAME_BYTES = 200
#: What a `SEPTower` holds by adapter.
OWN_PARTS = (*SEPTower.adapter_layer_names, *SEPTower.other_param_names)
#: Most prompts of a tower: they join the tokens of every layer, and no tower reads more tokens than these.
MAX_PROMPTS = 4096
#: More tokens than any tower has whose images may have any size.
MAX_TOKENS = 1_000_000
#: The fusion's MLP may be this wide in any tower, or `MLP_RATIO` times the tower; that of a transformer is 4 times it.
MAX_MLP_SIZE = 1024
MLP_RATIO = 8
#: Modules that are looked into and never called, of which PEFT makes no copies.
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def target_towers(config: SEPConfig, architecture: Architecture) -> dict[str, str]:
    """Path of each tower to adapt -> its modality; a model that is a tower itself has it at `ROOT_CHILD`."""
    modalities = {spec.path: modality for modality, spec in architecture.towers.items()}
    if config.target_modules is not None:
        modalities = {path: modality for path, modality in modalities.items() if path in config.target_modules}
    return {path or ROOT_CHILD: modality for path, modality in modalities.items()}


def base_tower(model: nn.Module, spec: TowerSpec) -> nn.Module:
    """The tower of a model without SEP's wrapper."""
    module = model.get_submodule(spec.path)
    return module.base_layer if isinstance(module, SEPTower) else module


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse names that PEFT would confuse with parts of a key, or that are no name of a folder.

    Raises:
        ValueError: says why.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"An adapter name must not be empty nor contain a dot, but got {name!r}.")
    if wrong := sorted({letter for letter in name if letter in "/\\:" or not letter.isprintable()}):
        raise ValueError(
            f"An adapter name must not contain any of {wrong}, because PEFT saves it as a folder of this name, but got "
            f"{name!r}."
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"An adapter name must be at most {MAX_NAME_BYTES} bytes long, because PEFT saves it as a folder of this "
            f"name, but got {len(name.encode())}: {name[:40]!r}..."
        )
    if name in OWN_PARTS:
        raise ValueError(
            f"The adapter name {name!r} is also the name of a part of every SEP adapter, so keys could not be told "
            "apart. Choose another name."
        )
    if name in PREFIX:
        raise ValueError(
            f"The adapter name {name!r} is a part of SEP's prefix {PREFIX!r}, so keys could not be told apart. Choose "
            "another name."
        )
    own = _module_names(model)
    if name in own | FUSION_PARTS:
        raise ValueError(
            f"The adapter name {name!r} is also the name of a module inside the model, so keys could not be told "
            "apart. Choose another name."
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"The adapter name {name!r} is also an attribute of the dictionary that holds adapters by name. Choose "
            "another name."
        )


def _module_names(module: nn.Module) -> set[str]:
    """Names of all modules below `module`, without those of SEP and those inside the layers of other methods."""
    names = set()
    for name, child in module.named_children():
        if PREFIX in name:
            continue
        names.add(name)
        if isinstance(child, SEPLayer) or not isinstance(child, BaseTunerLayer):
            names |= _module_names(child)
    return names


#: Names below `sep_fusion.<adapter>` that may not be adapter names.
FUSION_PARTS = frozenset(
    "shared norm1 attention norm2 fc1 fc2 query key value output down up weight bias scale1 scale2".split()
)


def check_config(config: SEPConfig, architecture: Architecture, model: nn.Module) -> dict:
    """Check a configuration against a model, without touching it.

    Returns:
        what an adapter must find to be loaded: model type, and width and depth of each tower.

    Raises:
        ValueError: an option does not fit, or the adapter was made for another architecture.
    """
    known = [spec.path for spec in architecture.towers.values()]
    for path in config.target_modules or ():
        if path not in known:
            raise ValueError(f"target_modules must be among {known} for this model, but got {shown(path)}.")
    check_model_paths(model, architecture)
    found: dict[str, Any] = {"model_type": getattr(getattr(model, "config", None), "model_type", "custom")}
    for modality in target_towers(config, architecture).values():
        spec = architecture.towers[modality]
        if spec.refused is not None:
            _check_refused(config, modality, spec)
            continue
        check_tower_paths(model, modality, spec)
        module = base_tower(model, spec)
        num_layers = sum(map(len, layer_lists(module, spec.layers)))
        hidden_size = getattr(module.config, spec.hidden_size)
        found[modality] = {"hidden_size": hidden_size, "num_layers": num_layers}
        if config.prompts_of(modality):
            _check_tower(config, modality, spec, module, num_layers)
            _check_sizes(config, modality, hidden_size)
            _check_offload(model, spec)
    wanted = config.made_for
    if wanted is not None and wanted != found:
        raise ValueError(
            f"This adapter was made for another architecture: it needs {shown(wanted)}, but the model has {found}."
        )
    if not any(config.prompts_of(modality) for modality in found if modality != "model_type"):
        raise ValueError(
            f"No prompts are left for target_modules={config.target_modules}: num_text_prompts="
            f"{config.num_text_prompts}, num_vision_prompts={config.num_vision_prompts}."
        )
    if config.modules_to_save:
        _check_modules_to_save(config, architecture, model)
    return found


def modules_to_save(config: SEPConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of what `modules_to_save` names, as PEFT finds it: every path that ends with a name.

    Where another adapter has a copy of a module, it is the original that is returned.
    """
    if not config.modules_to_save:
        return {}
    names = tuple(config.modules_to_save)
    found = {path: module for path, module in model.named_modules(remove_duplicate=False) if path.endswith(names)}
    return {
        path: module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for path, module in found.items()
    }


def _check_modules_to_save(config: SEPConfig, architecture: Architecture, model: nn.Module) -> None:
    """Refuse what PEFT cannot copy, or what would not be used or found again."""
    found = modules_to_save(config, model)
    for name in config.modules_to_save or ():
        if not any(path.endswith(name) for path in found):
            raise ValueError(
                f"modules_to_save must name modules of {type(model).__name__}, but it has no {shown(name)}."
            )
    modules = list(model.named_modules(remove_duplicate=False))
    targets = target_towers(config, architecture).items()
    towers = {path for path, modality in targets if architecture.towers[modality].refused is None}
    towers |= {path for path, module in modules if isinstance(module, SEPTower)}
    layers = [path for path, module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for path, module in found.items():
        if ROOT_CHILD in towers or any(_is_part(path, tower) or _is_part(tower, path) for tower in towers):
            raise ValueError(
                f"modules_to_save must name modules outside of the towers that take prompts, but {_bare(path)} is one, "
                "in one or around one."
            )
        if isinstance(module, BaseTunerLayer) or any(_is_part(path, layer) and path != layer for layer in layers):
            raise ValueError(f"modules_to_save must not name layers of other adapters, but {_bare(path)} is in one.")
        if any(offload_hooks(part) for part in module.modules()):
            raise ValueError(
                f"modules_to_save must name modules whose weights are in memory, but accelerate offloads {path}, so "
                "that a copy of it would never be trained nor loaded. Load the model without offloading."
            )
        if isinstance(module, CONTAINERS):
            kind = type(module).__name__
            raise ValueError(f"modules_to_save must name modules that are called, but {path} is a {kind}.")
        for other in found:
            if path != other and _is_part(path, other):
                raise ValueError(f"modules_to_save must not name parts of one another, but {path} is in {other}.")


def _bare(path: str) -> str:
    """A path as it is without any wrapper."""
    return path.replace(".base_layer", "")


def _is_part(path: str, of: str) -> bool:
    """Whether a path is `of`, or below it."""
    return path == of or path.startswith(f"{of}.")


def _check_sizes(config: SEPConfig, modality: str, width: int) -> None:
    """Sizes that could only be a mistake, or a file's way to take all memory."""
    count = config.prompts_of(modality)
    if count > MAX_PROMPTS:
        raise ValueError(
            f"num_{modality}_prompts must be at most {MAX_PROMPTS}, because prompts join the tokens of every layer, "
            f"but got {count}."
        )
    if config.fusion != "attention":
        return
    if config.fusion_rank is not None and config.fusion_rank > width:
        raise ValueError(
            f"fusion_rank must be at most {width}, the width of the {modality} tower, but got {config.fusion_rank}. "
            "None stands for full width."
        )
    if config.fusion_hidden_size > (limit := max(MAX_MLP_SIZE, MLP_RATIO * width)):
        raise ValueError(
            f"fusion_hidden_size must be at most {limit} for the {modality} tower, which is {width} wide, but got "
            f"{config.fusion_hidden_size}."
        )


def _check_offload(model: nn.Module, spec: TowerSpec) -> None:
    """accelerate finds weights that it offloads as one piece by their paths, which wrappers inside of it change."""
    tower = model.get_submodule(spec.path)
    if isinstance(tower, SEPTower):
        return
    wrapped = set(wrapped_modules(tower, spec))
    for path, module in model.named_modules():
        whole = any(hook.place_submodules for hook in offload_hooks(module))
        if whole and any(part in wrapped and part is not module for part in module.modules()):
            raise ValueError(
                f"accelerate offloads {path or 'the model'} in one piece, but SEP wraps modules inside of it, whose "
                f"weights would not be found. Leave {type(module).__name__} out of preload_module_classes."
            )


def _check_refused(config: SEPConfig, modality: str, spec: TowerSpec) -> None:
    if config.prompts_of(modality):
        raise ValueError(f"num_{modality}_prompts must be 0 for this model, because {spec.refused}.")


def _check_tower(config: SEPConfig, modality: str, spec: TowerSpec, module: nn.Module, num_layers: int) -> None:
    start = config.start_layer_of(modality)
    if start >= num_layers:
        raise ValueError(
            f"start_layer must be below {num_layers}, the number of layers of the {modality} tower, but got {start}."
        )
    for index in config.layers_of(modality) or ():
        if index >= num_layers:
            raise ValueError(
                f"{modality}_layers must be below {num_layers}, the number of layers of the {modality} tower, but got "
                f"{index}."
            )
    count = config.prompts_of(modality)
    _check_token_counts(modality, spec, module)
    if spec.positions is not None and start == 0:
        positions = count_positions(module.get_submodule(spec.positions))
        room = positions - 2  # BOS and EOS stay
        if count > room:
            raise ValueError(
                f"num_{modality}_prompts must be at most {room}, because the {modality} tower has {positions} "
                f"positions and needs two for BOS and EOS, but got {count}."
            )
    elif spec.inputs == "pixel_values" and config.fusion == "attention" and config.fusion_tokens in CHOSEN_TOKENS:
        tokens = count_image_tokens(module)
        if tokens is not None and count > tokens:
            raise ValueError(
                f"num_{modality}_prompts must be at most {tokens}, the number of tokens of an image to select from, "
                f"but got {count}."
            )


def _check_token_counts(modality: str, spec: TowerSpec, module: nn.Module) -> None:
    """Refuse numbers and places of tokens beyond all tokens of the tower."""
    known = most_tokens(module, spec)
    has = f"the tower has at most {known} tokens" if known is not None else f"no tower has {MAX_TOKENS} tokens"
    for name in ("insert_at", "leading_tokens", "layer_tokens"):
        value = getattr(spec, name)
        if value is not None and value >= (MAX_TOKENS if known is None else known):
            raise ValueError(f"The spec of the {modality} tower has {name}={value}, but {has}.")
