"""Class texts for `SEPConfig(batch_coupled=True)`, as the released code has them; see `sep_peft.method.coupled`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..method.coupled import pad_with_zeros
from ..tuner.offload import compute_device
from ..tuner.texts import TextInputs
from ..tuner.tower import SEPTower


def coupled_texts(tower: SEPTower, class_inputs: Mapping[str, torch.Tensor], num_prompts: int) -> TextInputs:
    """Class names (C, L) padded with 0, without a mask, on the tower's device.

    The selection of the released code runs past the end of short names, so padding of the right id must be there to be
    selected. All classes go through the tower at once, because each must see every other.

    Args:
        tower: of the texts.
        class_inputs: tokenized class names, tensors (C, L).
        num_prompts: text prompts of the adapter.
    """
    device = compute_device(tower.base_layer)
    trimmed = tower.texts.trim({key: value.to(device) for key, value in class_inputs.items()})
    assert tower.spec.insert_at is not None, "the released code puts text prompts after BOS"
    length = tower.spec.insert_at + num_prompts
    return {"input_ids": pad_with_zeros(trimmed["input_ids"], tower.texts.span(trimmed)[1], length)}
