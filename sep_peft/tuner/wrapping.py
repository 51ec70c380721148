"""Puts SEP's wrappers around what stands inside a tower and after it, and takes them off again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from ..families.spec import TowerSpec
from .wrappers import (
    SEPActivation,
    SEPEncoderLayer,
    SEPLastNorm,
    SEPLayer,
    SEPPositionEmbedding,
    SEPProjection,
    SEPReader,
    Wrapper,
    layer_lists,
)


def wrap_tower(base: nn.Module, spec: TowerSpec) -> tuple[SEPLayer, ...]:
    """Wrap encoder layers, their activations, the norm before the last MLP, and position embeddings of a tower.

    Returns:
        the wrappers that are layers of SEP, those of encoder layers first.
    """
    inner: list[SEPLayer] = []
    for layers in layer_lists(base, spec.layers):
        for place, layer in enumerate(layers):
            for path in _paths_of(QuickGELUActivation, layer):
                put(layer, path, SEPActivation(layer.get_submodule(path)))
            wrapper = SEPEncoderLayer(layer, len(inner))
            layers[place] = wrapper
            inner.append(wrapper)
    if spec.mlp_norm is not None:
        last = inner[-1].base_layer
        inner.append(SEPLastNorm(last.get_submodule(spec.mlp_norm)))
        put(last, spec.mlp_norm, inner[-1])
    if spec.positions is not None:
        assert spec.insert_at is not None, "prompts with positions of their own stand at a fixed index"
        inner.append(SEPPositionEmbedding(base.get_submodule(spec.positions), spec.insert_at))
        put(base, spec.positions, inner[-1])
    return tuple(inner)


def wrapped_modules(base: nn.Module, spec: TowerSpec) -> list[nn.Module]:
    """What `wrap_tower` would wrap of all that has weights, in a tower without wrappers."""
    lists = layer_lists(base, spec.layers)
    below = [(lists[-1][-1], spec.mlp_norm), (base, spec.positions)]
    return [layer for layers in lists for layer in layers] + [
        root.get_submodule(path) for root, path in below if path is not None
    ]


def unwrap_tower(base: nn.Module, spec: TowerSpec) -> None:
    """Undo `wrap_tower`."""
    lists = layer_lists(base, spec.layers)
    for layers in lists:
        for place, layer in enumerate(layers):
            for path in _paths_of(SEPActivation, layer):
                _take_off(layer, path)
            if isinstance(layer, SEPEncoderLayer):  # in a model that is the tower PEFT gets to them first
                layers[place] = layer.base_layer
    if spec.mlp_norm is not None:
        _take_off(lists[-1][-1], spec.mlp_norm)
    if spec.positions is not None:
        _take_off(base, spec.positions)


def wrap_after(
    owner: nn.Module, spec: TowerSpec, width: int, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Wrap what the mix happens after: a projection that is not affine, and a reader. The tuner takes these off.

    Args:
        owner: the model that owns them.
        spec: of the tower.
        width: D of the tower.
        mix: see `SEPReader`.
    """
    if spec.mixes_after_projection:
        assert spec.projection is not None, "the mix follows a projection"
        put(owner, spec.projection, SEPProjection(owner.get_submodule(spec.projection), width))
    if spec.reader is not None:
        put(owner, spec.reader, SEPReader(owner.get_submodule(spec.reader), width, mix))


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path below another."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _paths_of(kind: type[nn.Module], root: nn.Module) -> list[str]:
    """Paths below `root` of modules of this very type."""
    return [path for path, module in root.named_modules() if type(module) is kind]


def _take_off(root: nn.Module, path: str) -> None:
    module = root.get_submodule(path)
    if isinstance(module, Wrapper):
        put(root, path, module.base_layer)
