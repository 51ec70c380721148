"""Whether the paths of a spec lead to modules and parameters of a model; they are looked up, nothing is run."""

from __future__ import annotations

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..families.spec import Architecture, TowerSpec
from .tower import SEPTower
from .wrappers import Wrapper


def check_tower_paths(model: nn.Module, modality: str, spec: TowerSpec) -> None:
    """Every path of a tower's spec must lead to what its field needs.

    Raises:
        ValueError: names the path, the field and what is there.
    """
    what = f"The spec of the {modality} tower"
    tower = find_module(model, spec.path, what, "path")
    base = tower.base_layer if isinstance(tower, SEPTower) else tower
    _check_options(base, spec, what)
    for field in ("projection", "reader"):
        if (path := getattr(spec, field)) is not None:
            find_module(model, path, what, field)
    if spec.queries is not None:
        shape = _find_tensor(model, spec.queries, what, "queries").shape
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(f"{what} names {spec.queries} as queries, but its shape is {tuple(shape)}, not (1, Q, D).")
    for field in ("rotary", "entry_norm"):
        if (path := getattr(spec, field)) is not None:
            find_module(base, path, what, field)
    for field in ("positions", "entry_embedding"):
        if (path := getattr(spec, field)) is not None:
            _check_embedding(find_module(base, path, what, field), path, what, field)
    lists = _check_layers(base, spec.layers, what)
    if spec.mlp_norm is not None:
        find_module(lists[-1][-1], spec.mlp_norm, what, "mlp_norm")


def check_model_paths(model: nn.Module, architecture: Architecture) -> None:
    """What an architecture names beside its towers must be numbers of the model.

    Raises:
        ValueError: names the path, the field and what is there.
    """
    for field in ("logit_scale", "logit_bias"):
        path = getattr(architecture, field)
        if path is None:
            continue
        tensor = _find_tensor(model, path, "The architecture", field)
        if tensor.numel() != 1:
            raise ValueError(f"The architecture names {path} as {field}, but it holds {tensor.numel()} numbers, not 1.")
    name = architecture.max_scale
    if name is not None and not isinstance(vars(model).get(name), (int, float)):
        raise ValueError(
            f"The architecture names {name} as max_scale, but {type(model).__name__} has no such attribute that is a "
            "number."
        )


def find_module(root: nn.Module, path: str, what: str, field: str) -> nn.Module:
    """The module at a dotted path, "" for `root` itself, found among children alone: no property is run.

    Raises:
        ValueError: there is none; the message begins with `what` and names the path, the field and the module.
    """
    found = root
    for name in path.split(".") if path else ():
        child = _child(found, name)
        if child is None:
            raise ValueError(f"{what} names {path} as {field}, but {type(root).__name__} has no such module.")
        found = child
    return found


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """A child, through the wrappers of adapters that are there already."""
    child = module._modules.get(name)  # `get_submodule` would run properties
    if child is None and isinstance(module, (Wrapper, AuxiliaryTrainingWrapper)):
        return _child(module.base_layer if isinstance(module, Wrapper) else module.original_module, name)
    return child


def _find_tensor(root: nn.Module, path: str, what: str, field: str) -> torch.Tensor:
    parent, _, name = path.rpartition(".")
    owner = find_module(root, parent, what, field)
    tensor = dict(owner.named_parameters(recurse=False)) | dict(owner.named_buffers(recurse=False))
    if name not in tensor:
        raise ValueError(f"{what} names {path} as {field}, but {type(root).__name__} has no such parameter.")
    return tensor[name]


def _check_embedding(module: nn.Module, path: str, what: str, field: str) -> None:
    """An embedding has a table, learned or, by the other name, sinusoidal."""
    inside = getattr(module, "base_layer", module)  # of SEP, or of LoRA
    tables = [getattr(inside, name, None) for name in ("weight", "weights")]
    if not any(isinstance(table, torch.Tensor) and table.ndim == 2 for table in tables):
        raise ValueError(f"{what} names {path} as {field}, but {type(module).__name__} is no embedding.")


def _check_layers(base: nn.Module, path: str, what: str) -> list[nn.ModuleList]:
    """The lists of encoder layers at a path that may hold "*"."""
    found: list[nn.Module] = [base]
    for name in path.split("."):
        below = [child for module in found for child in (module.children() if name == "*" else (_child(module, name),))]
        found = [child for child in below if child is not None]
        if len(found) < len(below):
            raise ValueError(f"{what} names {path} as layers, but {type(base).__name__} has no such module.")
    lists = [module for module in found if isinstance(module, nn.ModuleList) and len(module)]
    if not found or len(lists) < len(found):
        kinds = ", ".join(sorted({type(module).__name__ for module in found})) or "nothing"
        raise ValueError(f"{what} names {path} as layers, but there is {kinds} in the place of a list of layers.")
    return lists


def _check_options(base: nn.Module, spec: TowerSpec, what: str) -> None:
    """A tower has a configuration that holds its width."""
    config = getattr(base, "config", None)
    width = getattr(config, spec.hidden_size, None)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(
            f"{what} names {spec.hidden_size} as hidden_size, but the configuration of {type(base).__name__} has "
            f"{width!r} there, not a width."
        )
    if spec.unit_option is not None and not isinstance(getattr(config, spec.unit_option, None), bool):
        raise ValueError(
            f"{what} names {spec.unit_option} as unit_option, but the configuration of {type(base).__name__} has no "
            "such option that is True or False."
        )
