"""Which towers a model has: its row, by configuration, model type and class."""

from __future__ import annotations

from torch import nn

from .architectures import ARCHITECTURES, Architecture


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
    row = ARCHITECTURES[model_type]
    return row.variants.get(type(model).__name__, row)
