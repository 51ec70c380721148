"""Which towers a model has: its architecture, by configuration, model type and class."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .spec import Architecture, TowerSpec
from .table import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION


#: Model type of `VisionTextDualEncoderModel`, whose towers are models of their own.
DUAL_ENCODER = "vision-text-dual-encoder"
#: Where the layers are -> where they are in older releases of transformers, 5.8 among them.
OLDER_LAYERS = {"layers": "encoder.layer"}


def find_architecture(model: nn.Module, spec: dict | None = None) -> Architecture:
    """The architecture of a model.

    Args:
        model: of transformers, or one's own.
        spec: one handed in by the configuration; it is taken as it is.

    Raises:
        ValueError: the model's type is not known, or its class keeps its towers elsewhere.
    """
    if spec is not None:
        return Architecture.from_dict(spec)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is not None and model_type == DUAL_ENCODER:
        return Architecture(
            text=_find_tower(config.text_config, DUAL_ENCODER_TEXT),
            vision=_in_this_release(_find_tower(config.vision_config, DUAL_ENCODER_VISION), model),
        )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"SEP does not know the towers of {type(model).__name__} (model type {model_type!r}); it knows "
            f"{', '.join(sorted([*ARCHITECTURES, DUAL_ENCODER]))}. Describe your own with "
            "SEPConfig(architecture=sep_peft.Architecture(...))."
        )
    found = ARCHITECTURES[model_type]
    found = found.variants.get(type(model).__name__, found)
    for tower_spec in found.towers.values():
        path = tower_spec.path
        if path and not hasattr(model, path.split(".")[0]):
            raise ValueError(
                f"SEP knows models of type {model_type!r} with a {path!r}, but {type(model).__name__} has none."
            )
    towers = {
        name: tower_spec
        if tower_spec.refused
        else _check_options(tower_spec, model.get_submodule(tower_spec.path).config)
        for name, tower_spec in found.towers.items()
    }
    return replace(found, **towers)


def _find_tower(config, specs: dict[str, TowerSpec]) -> TowerSpec:
    """The spec of a tower that is a model of its own, by its configuration."""
    if config.model_type not in specs:
        known = sorted(name for name, spec in specs.items() if spec.refused is None)
        raise ValueError(
            f"SEP does not know a tower of model type {config.model_type!r} inside a VisionTextDualEncoderModel; it "
            f"knows {', '.join(known)}."
        )
    spec = _check_options(specs[config.model_type], config)
    return replace(spec, leading_tokens=spec.leading_tokens + getattr(config, "num_register_tokens", 0))


def _in_this_release(spec: TowerSpec, model: nn.Module) -> TowerSpec:
    """The spec of a tower, with the path at which the installed transformers has its layers."""
    tower, older = getattr(model, spec.path), OLDER_LAYERS.get(spec.layers)
    if older is None or hasattr(tower, spec.layers) or not hasattr(tower, older.partition(".")[0]):
        return spec
    return replace(spec, layers=older)


def _check_options(spec: TowerSpec, config) -> TowerSpec:
    """The spec of a tower, refused where options of its configuration leave no place for prompts."""
    for option, reason in spec.refused_options.items():
        if getattr(config, option):
            return replace(spec, refused=reason)
    for option, reason in spec.needed_options.items():
        if not getattr(config, option, True):  # transformers 5.17 leaves it out of the configuration where it is set
            return replace(spec, refused=reason)
    return spec
