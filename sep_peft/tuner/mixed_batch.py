"""Batches whose samples use different adapters: who wants which, how they are split, and how they are joined again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .current import chosen_adapters
from .registration import peft_type


#: Name that stands for the model without an adapter, as in PEFT.
BASE = "__base__"


def check_adapter_names(names: Iterable[str], configs: Mapping[str, Any]) -> None:
    """Make sure that adapters can be chosen by name for a single call.

    Args:
        names: names of adapters, or `BASE`.
        configs: the model's `peft_config`.

    Raises:
        ValueError: an adapter does not exist, or one brings modules of its own, which PEFT switches for all threads.
    """
    known = {name: config for name, config in configs.items() if config.peft_type == peft_type()}
    if unknown := sorted(set(names) - {BASE, *known}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if own := sorted(name for name, config in known.items() if config.modules_to_save):
        raise ValueError(
            f"An adapter cannot be chosen by name for a single call while one has modules_to_save, as {', '.join(own)} "
            "does: these modules follow the active adapter. Use set_adapter."
        )


def check_a_name_for_each(names: Sequence[str], inputs: Mapping[str, Any], main_inputs: Iterable[str]) -> None:
    """Make sure that there is a name for each sample of every tower's input.

    Args:
        names: `adapter_names`.
        inputs: of the model, by name.
        main_inputs: names of the inputs whose samples count, or what these begin with.

    Raises:
        TypeError: `names` is no list.
        ValueError: another number of samples.
    """
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"adapter_names must be a list with a name for each sample, but got {names!r}.")
    begins = tuple(main_inputs)
    for name, value in inputs.items():
        if name.startswith(begins) and isinstance(value, torch.Tensor) and len(value) != len(names):
            raise ValueError(
                f"adapter_names must hold a name for each sample of {name}, which has {len(value)}, but it holds "
                f"{len(names)}."
            )


def weights_of_samples(names: Sequence[str], weight_of: Callable[[], float], embeddings: torch.Tensor) -> torch.Tensor:
    """A weight of each sample's adapter, as a tensor beside embeddings.

    Args:
        names: an adapter for each sample.
        weight_of: the weight under the chosen adapter.
        embeddings: (B, Q, E), with one or more of B for each name, side by side.

    Returns:
        (B, 1, 1).
    """
    weights = []
    for name in names:
        with chosen_adapters.set(name):
            weights.append(weight_of())
    repeated = torch.tensor(weights, device=embeddings.device).repeat_interleave(len(embeddings) // len(names))  # (B,)
    return repeated[:, None, None]  # (B,) -> (B, 1, 1)


def run_samples(names: Sequence[str], inputs: Mapping[str, Any], call: Callable):
    """Call something once for each adapter of a batch, with the samples that want it, and join what it returns.

    Args:
        names: a name for each sample, or for each of several side by side, such as the frames of a video.
        inputs: keyword arguments of `call`; the first tensor's length is the batch, and tensors as long are split.
        call: returns tensors with an entry for each sample, or tuples or dicts of such.
    """
    return join(*run_groups(names, inputs, call))


def run_groups(names: Sequence[str], inputs: Mapping[str, Any], call: Callable) -> tuple[list, list[int]]:
    """What `call` returns for each adapter, and the place of every sample in the concatenation of these."""
    count = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
    if count % len(names):
        raise ValueError(f"There are {len(names)} adapter names for a batch of {count} samples.")
    samples_of: dict[str, list[int]] = {}
    for sample in range(count):
        samples_of.setdefault(names[sample * len(names) // count], []).append(sample)
    parts = []
    for name, samples in samples_of.items():
        with chosen_adapters.set(name):
            parts.append(call(**(inputs if len(samples_of) == 1 else _select(inputs, samples, count))))
    order = [sample for samples in samples_of.values() for sample in samples]
    place = {sample: index for index, sample in enumerate(order)}
    return parts, [place[sample] for sample in range(count)]


def _select(inputs: Mapping[str, Any], samples: list[int], count: int) -> dict:
    """These samples of every tensor that has `count` of them; anything else belongs to all of them."""

    def select(value):
        has_samples = isinstance(value, torch.Tensor) and value.ndim and len(value) == count
        return value[torch.tensor(samples, device=value.device)] if has_samples else value

    return {name: select(value) for name, value in inputs.items()}


def join(parts: list, order: list[int]) -> Any:
    """Outputs of several calls as that of one: tensors concatenated, with their samples in `order`.

    A tensor may have several entries for each in `order`, as many for each, side by side.

    Raises:
        ValueError: tensors differ in more than their number.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return _join_tensors(parts, order)
    if isinstance(first, Mapping):
        return type(first)(**{key: join([part[key] for part in parts], order) for key in first})
    if isinstance(first, tuple):
        joined = [join(list(items), order) for items in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    return first


def _join_tensors(parts: list[torch.Tensor], order: list[int]) -> torch.Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise ValueError(
            f"Samples of a mixed batch cannot be joined, because they have the shapes {', '.join(map(str, shapes))}."
        )
    joined = torch.cat(parts)
    index = torch.tensor(order, device=joined.device)
    if len(joined) == len(order):
        return joined[index]
    return joined.unflatten(0, (len(order), -1))[index].flatten(0, 1)
