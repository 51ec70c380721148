"""How far an adapter is heard beside the frozen model, set after training."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .config import SEPConfig
from .messages import shown
from .model import find_towers
from .registration import peft_type


def set_frozen_weight(model: nn.Module, adapter_name: str, weight: float) -> None:
    """Set the share of the frozen embedding in the mix of a trained adapter, as `SEPConfig.frozen_weight`.

    A share above that of the training moves the model back to zero-shot, which may help inputs unlike those of the
    training; one below moves it away. The idea is that of WiSE-FT (arXiv 2109.01903), which mixes the weights of both
    models, here for embeddings. Every other adapter keeps its share, in mixed batches too, and the adapter is saved
    with the new one. Threads must not use the adapter meanwhile.

    Args:
        model: with the adapter; a `PeftModel`, or a transformers model to which it was added.
        adapter_name: of the adapter.
        weight: at least 0 and below 1; to hear the frozen model alone, disable the adapter.

    Raises:
        ValueError: there is no such adapter, or the weight is not allowed.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or config.peft_type != peft_type():
        raise ValueError(f"There is no SEP adapter {shown(adapter_name)} in this model.")
    SEPConfig(frozen_weight=weight)  # whose check is the one of all
    config.frozen_weight = weight
    for tower in find_towers(model).values():
        if adapter_name in tower.sep_settings:
            tower.sep_settings[adapter_name] = replace(tower.sep_settings[adapter_name], frozen_weight=weight)
