"""Which towers a model has: its row, by configuration, model type and class."""

from __future__ import annotations

from torch import nn

from .architectures import Architecture, TowerSpec
from .families import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION


#: Model type of `VisionTextDualEncoderModel`, whose towers are models of their own.
DUAL_ENCODER = "vision-text-dual-encoder"


def find_architecture(model: nn.Module, row: dict | None = None) -> Architecture:
    """The row of a model.

    Args:
        model: of transformers, or one's own.
        row: a row handed in by the configuration; it is taken as it is.

    Raises:
        ValueError: there is no row for the model's type.
    """
    if row is not None:
        return Architecture.from_dict(row)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type == DUAL_ENCODER:
        return Architecture(
            text=_find_tower(config.text_config.model_type, DUAL_ENCODER_TEXT),
            vision=_find_tower(config.vision_config.model_type, DUAL_ENCODER_VISION),
        )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"SEP does not know the towers of {type(model).__name__} (model type {model_type!r}); it knows "
            f"{', '.join(sorted([*ARCHITECTURES, DUAL_ENCODER]))}. Describe your own with "
            "SEPConfig(architecture=sep_peft.Architecture(...))."
        )
    row = ARCHITECTURES[model_type]
    return row.variants.get(type(model).__name__, row)


def _find_tower(model_type: str, rows: dict[str, TowerSpec]) -> TowerSpec:
    if model_type not in rows:
        raise ValueError(
            f"SEP does not know a tower of model type {model_type!r} inside a VisionTextDualEncoderModel; it knows "
            f"{', '.join(sorted(rows))}."
        )
    return rows[model_type]
