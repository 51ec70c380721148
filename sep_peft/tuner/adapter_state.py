"""`AdapterState`: what a model holds of one adapter, and nothing of the base model.

PEFT saves the embeddings of the base model with an adapter where it finds that the vocabulary was resized, and where it
is asked to by ``save_embedding_layers=True``. Loaded, they would change the model for all its adapters, so the loaders
refuse them (`sep_peft.tuner.gate`). SEP does not train them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn


class AdapterState(dict[str, torch.Tensor]):
    """Key -> tensor, as PEFT's `get_peft_model_state_dict` collects them by `update`.

    Args:
        tensors: of the adapter.
        model: that they are of.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], model: nn.Module):
        super().__init__(tensors)
        self._model = model

    def update(self, entries: dict[str, torch.Tensor]) -> None:  # type: ignore[override]
        """Take entries in, but no weights of token embeddings; a warning names what is left out."""
        embeddings = set(_embedding_keys(self._model)) & set(entries)
        if embeddings:
            key = sorted(embeddings)[0].replace(".base_layer", "")
            warnings.warn(
                f"The base model's token embeddings ({key}) are not saved with the adapter, because "
                "they would change the model for all its adapters. Save the base model with its own save_pretrained, "
                "and the adapter with save_embedding_layers=False.",
                stacklevel=2,
            )
        super().update({key: value for key, value in entries.items() if key not in embeddings})


def _embedding_keys(model: nn.Module) -> Iterable[str]:
    """Keys of the parameters of all embeddings that are no module of an adapter (PEFT's `modules_to_save`)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield from (f"{path}.{name}" for name, _ in module.named_parameters())
