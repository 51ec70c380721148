"""Which adapters can stand for each other, and weighted sums of such: model soups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from peft.config import PeftConfig

from ..words import counted
from .config import SEPConfig
from .registration import peft_type


#: Options of the method itself, not of where an adapter comes from.
OPTIONS = sorted({f.name for f in fields(SEPConfig)} - {f.name for f in fields(PeftConfig)} - {"base_architecture"})


def check_combination(
    adapters: Sequence[str], weights: Sequence[float], adapter_name: str, configs: Mapping[str, SEPConfig]
) -> None:
    """Make sure that a weighted sum of adapters can be made.

    Raises:
        ValueError: no adapters, another number of weights, a weight that is no finite number, an adapter that does not
            exist, adapters of different options or with modules of their own, or a name that is taken.
    """
    if not adapters or isinstance(adapters, str):
        raise ValueError(f"adapters must be a list of at least one adapter name, but got {adapters!r}.")
    if len(weights) != len(adapters):
        raise ValueError(
            f"There must be a weight for each of {counted(len(adapters), 'adapter')}, but got {len(weights)}."
        )
    for weight in weights:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"A weight must be a finite number, but got {weight!r}.")
    if adapter_name in configs:
        raise ValueError(f"There is an adapter {adapter_name!r} already. Choose another name.")
    for name in adapters:
        if name not in configs or configs[name].peft_type != peft_type():
            raise ValueError(f"There is no SEP adapter {name!r} in this model.")
        check_alike(configs[adapters[0]], configs[name], f"adapters {adapters[0]!r} and {name!r}")


def check_alike(first: SEPConfig, second: SEPConfig, what: str) -> None:
    """Make sure that the parameters of one adapter mean the same in another.

    Args:
        first, second: their configurations.
        what: the adapters, for the message.

    Raises:
        ValueError: an option differs, or they bring modules of their own.
    """
    first_options, second_options = first.to_dict(), second.to_dict()
    differing = [
        f"{name} ({first_options[name]!r} and {second_options[name]!r})"
        for name in OPTIONS
        if first_options[name] != second_options[name]
    ]
    if differing:
        raise ValueError(f"The {what} differ in {', '.join(differing)}; their parameters must mean the same.")
    if first.modules_to_save:
        raise ValueError(f"The {what} have modules_to_save, which are no part of SEP's parameters.")


def weighted_sum(parameters: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum in fp32 or wider, in the dtype of the first."""
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    total = sum(weight * parameter.detach().to(wide) for weight, parameter in zip(weights, parameters, strict=True))
    assert isinstance(total, torch.Tensor), "there is at least one adapter"
    return total.to(parameters[0].dtype)
