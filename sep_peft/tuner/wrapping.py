"""Puts SEP's wrappers around what stands inside a tower and after it, and takes them off again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.activations import QuickGELUActivation

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


if TYPE_CHECKING:
    from .tower import SEPTower


def wrap(tower: SEPTower) -> tuple[SEPLayer, ...]:
    """Wrap encoder layers, their activations, the norm before the last MLP, positions, and what the mix is after.

    Returns:
        the wrappers inside the tower, those of its encoder layers first.
    """
    spec, base, inner = tower.spec, tower.base_layer, []
    for layers in layer_lists(base, spec.layers):
        for position, layer in enumerate(layers):
            for path in _paths_of(QuickGELUActivation, layer):
                put(layer, path, SEPActivation(layer.get_submodule(path)))
            layers[position] = SEPEncoderLayer(layer, len(inner))
            inner.append(layers[position])
    if spec.mlp_norm is not None:
        last = inner[-1].base_layer
        inner.append(SEPLastNorm(last.get_submodule(spec.mlp_norm)))
        put(last, spec.mlp_norm, inner[-1])
    if spec.positions is not None:
        inner.append(SEPPositionEmbedding(base.get_submodule(spec.positions), spec.insert_at))
        put(base, spec.positions, inner[-1])
    if spec.mixes_after_projection:
        put(tower.owner, spec.projection, SEPProjection(tower.model_projection, tower.hidden_size))
    if spec.reader is not None:
        reader = SEPReader(tower.owner.get_submodule(spec.reader), tower.hidden_size, tower.mix_read)
        put(tower.owner, spec.reader, reader)
    return tuple(inner)


def unwrap(tower: SEPTower) -> None:
    """Undo `wrap` inside the tower; what wraps the projection or a reader is the model's to remove."""
    spec, base = tower.spec, tower.base_layer
    lists = layer_lists(base, spec.layers)
    for layers in lists:
        for position, layer in enumerate(layers):
            for path in _paths_of(SEPActivation, layer):
                _take_off(layer, path)
            if isinstance(layer, SEPEncoderLayer):  # in a model that is the tower PEFT gets to them first
                layers[position] = layer.base_layer
    if spec.mlp_norm is not None:
        _take_off(lists[-1][-1], spec.mlp_norm)
    if spec.positions is not None:
        _take_off(base, spec.positions)


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
