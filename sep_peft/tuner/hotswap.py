"""New weights for an adapter in place, so that a compiled model need not be compiled again.

PEFT's `hotswap_adapter` knows LoRA only: it reads ranks and scalings from the configuration while it swaps, and fills
what a file lacks with zeros. This is the same call for SEP.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import load_peft_weights
from torch import nn

from .config import SEPConfig
from .files import read_shapes
from .messages import shown
from .model import SEPModel
from .registration import peft_type
from .soup import check_alike


#: Keyword arguments that choose a file on the Hub.
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put the weights of a saved adapter in the place of a loaded one's. All of them are swapped, or none.

    The parameters stay the same tensors, so graphs of torch.compile stay valid, and cached class texts are encoded
    anew. Threads must not predict with this adapter meanwhile. A `SEPClassifier` on the model keeps its own prototypes,
    head and calibration, which belong to the adapter that was there: give it tasks by `load_task`.

    Args:
        model: with the adapter; a `PeftModel`, a transformers model to which it was added, or either compiled.
        model_name_or_path: folder or repository of the new weights.
        adapter_name: the adapter whose weights are replaced.
        torch_device: where the file is loaded first; None for the CPU.
        kwargs: `subfolder`, `revision`, `cache_dir` and `token`, and what else loading takes.

    Raises:
        ValueError: there is no such adapter, the new one is of another method, model or options, or has modules of its
            own, or the model was made in inference mode.
        AdapterMismatchError: keys or shapes differ.

    Example:
        >>> compiled = torch.compile(model)
        >>> sep_peft.hotswap_adapter(compiled, "path/of/another", "default")
    """
    model = getattr(model, "_orig_mod", model)
    current = getattr(model, "peft_config", {}).get(adapter_name)
    if current is None or current.peft_type != peft_type():
        raise ValueError(f"There is no SEP adapter {adapter_name!r} in this model.")
    hub_options = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
    config = SEPConfig.of_adapter(model_name_or_path, **hub_options)
    _check_config(current, config, adapter_name, model_name_or_path)
    origin = config.take_weights_origin()
    if origin is not None and (file := origin.find()) is not None:
        read_shapes(file)  # damaged files are named before PEFT reads them
    state = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    state = SEPModel.model_keys(model, adapter_name, state)
    parameters = dict(model.named_parameters())
    if any(parameters[key].is_inference() for key in state):
        raise ValueError("The adapter was made in inference mode, where its weights cannot be swapped in place.")
    new = {key: value.to(parameters[key]) for key, value in state.items()}  # what can fail, fails here
    with torch.no_grad():
        for key, value in new.items():
            parameters[key].copy_(value)


def _check_config(current: SEPConfig, config: SEPConfig, adapter_name: str, source: str) -> None:
    check_alike(current, config, f"adapter {adapter_name!r} and that of {source}")
    if config.base_architecture not in (None, current.base_architecture):
        raise ValueError(
            f"The adapter of {source} was made for another architecture: it needs "
            f"{shown(config.base_architecture)}, but the "
            f"model has {current.base_architecture}."
        )
