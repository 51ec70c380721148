"""Which towers a model has: its row, by configuration, model type and class."""

from __future__ import annotations

from torch import nn

from .architectures import Architecture, TowerSpec
from .families import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION


#: Model type of `VisionTextDualEncoderModel`, whose towers are models of their own.
DUAL_ENCODER = "vision-text-dual-encoder"


def find_architecture(model: nn.Module) -> Architecture:
    """The row of a model.

    Raises:
        ValueError: its model type has none, or its class keeps its towers elsewhere.
    """
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
            f"{', '.join(sorted([*ARCHITECTURES, DUAL_ENCODER]))}."
        )
    row = ARCHITECTURES[model_type]
    row = row.variants.get(type(model).__name__, row)
    for spec in row.towers.values():
        if spec.path and not hasattr(model, spec.path.split(".")[0]):
            raise ValueError(
                f"SEP knows models of type {model_type!r} with a {spec.path!r}, but {type(model).__name__} has none."
            )
    return row


def _find_tower(model_type: str, rows: dict[str, TowerSpec]) -> TowerSpec:
    if model_type not in rows:
        raise ValueError(
            f"SEP does not know a tower of model type {model_type!r} inside a VisionTextDualEncoderModel; it knows "
            f"{', '.join(sorted(rows))}."
        )
    return rows[model_type]
