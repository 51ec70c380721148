"""Which towers a model has: its row, by configuration, model type and class."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .spec import Architecture, TowerSpec
from .table import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION


#: Model type of `VisionTextDualEncoderModel`, whose towers are models of their own.
DUAL_ENCODER = "vision-text-dual-encoder"


def find_architecture(model: nn.Module, row: dict | None = None) -> Architecture:
    """The row of a model.

    Args:
        model: of transformers, or one's own.
        row: a row handed in by the configuration; it is taken as it is.

    Raises:
        ValueError: there is no row for the model's type, or its class keeps its towers elsewhere.
    """
    if row is not None:
        return Architecture.from_dict(row)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type == DUAL_ENCODER:
        return Architecture(
            text=_find_tower(config.text_config, DUAL_ENCODER_TEXT),
            vision=_find_tower(config.vision_config, DUAL_ENCODER_VISION),
        )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"SEP does not know the towers of {type(model).__name__} (model type {model_type!r}); it knows "
            f"{', '.join(sorted([*ARCHITECTURES, DUAL_ENCODER]))}. Describe your own with "
            "SEPConfig(architecture=sep_peft.Architecture(...))."
        )
    row = ARCHITECTURES[model_type]
    row = row.variants.get(type(model).__name__, row)
    for spec in row.towers.values():
        if spec.path and not hasattr(model, spec.path.split(".")[0]):
            raise ValueError(
                f"SEP knows models of type {model_type!r} with a {spec.path!r}, but {type(model).__name__} has none."
            )
    towers = {
        name: spec if spec.refused else _check_options(spec, model.get_submodule(spec.path).config)
        for name, spec in row.towers.items()
    }
    return replace(row, **towers)


def _find_tower(config, rows: dict[str, TowerSpec]) -> TowerSpec:
    """The row of a tower that is a model of its own, by its configuration."""
    if config.model_type not in rows:
        known = sorted(name for name, row in rows.items() if row.refused is None)
        raise ValueError(
            f"SEP does not know a tower of model type {config.model_type!r} inside a VisionTextDualEncoderModel; it "
            f"knows {', '.join(known)}."
        )
    row = _check_options(rows[config.model_type], config)
    return replace(row, leading_tokens=row.leading_tokens + getattr(config, "num_register_tokens", 0))


def _check_options(spec: TowerSpec, config) -> TowerSpec:
    """The row of a tower, refused where options of its configuration leave no place for prompts."""
    for option, reason in spec.refused_options.items():
        if getattr(config, option):
            return replace(spec, refused=reason)
    for option, reason in spec.needed_options.items():
        if not getattr(config, option):
            return replace(spec, refused=reason)
    return spec
