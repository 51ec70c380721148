"""Batches whose samples use different adapters: who wants which, who goes together, and how all are joined again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..words import are, counted
from .current import chosen_adapters
from .messages import listed
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
        raise ValueError(
            f"The model has no SEP adapter {listed(unknown)}; it has {listed(sorted(known)) or 'none'}. Add or load it "
            f'first, or name one of these, or "{BASE}" for the model without an adapter.'
        )
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


class Group(NamedTuple):
    """Samples of a mixed batch that go through a tower together.

    Attributes:
        adapters: one for each of these samples; empty where none puts prompts into the tower.
        samples: their places in the batch.
        count: B, samples of the whole batch.
    """

    adapters: tuple[str, ...]
    samples: list[int]
    count: int

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """What belongs to these samples of a tensor with as many entries for each of B, side by side."""
        if len(self.samples) == self.count:
            return tensor
        index = torch.tensor(self.samples, device=tensor.device)
        if len(tensor) == self.count:
            return tensor[index]
        return tensor.unflatten(0, (self.count, -1))[index].flatten(0, 1)  # (B * k, ...) -> (samples * k, ...)

    def of_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """These samples of every tensor that has B of them; anything else belongs to all of them."""
        return {
            name: self.of_tensor(value)
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == self.count
            else value
            for name, value in inputs.items()
        }

    def of_output(self, output: Any) -> Any:
        """These samples of a tensor, or of all tensors in tuples or dicts."""
        if len(self.samples) == self.count:
            return output
        if isinstance(output, torch.Tensor):
            return self.of_tensor(output)
        if isinstance(output, Mapping):
            return type(output)(**{key: self.of_output(value) for key, value in output.items()})
        if isinstance(output, tuple):
            items = [self.of_output(value) for value in output]
            return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
        return output


def groups_of(
    names: Sequence[str], inputs: Mapping[str, Any], form_of: Callable[[], tuple[str | None, Hashable]]
) -> list[Group]:
    """The samples of a batch in groups whose adapters are of one form.

    Args:
        names: a name for each sample, or for each of several side by side, such as the frames of a video.
        inputs: of a tower; the length of the first tensor is the batch.
        form_of: the adapter that puts prompts into the tower under the chosen name, and its form; None for neither.
    """
    count = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
    if count % len(names):
        raise ValueError(
            f"There {are(len(names))} {counted(len(names), 'adapter name')} for a batch of {counted(count, 'sample')}."
        )
    forms = {}
    for name in dict.fromkeys(names):
        with chosen_adapters.set(name):
            forms[name] = form_of()
    members: dict[Hashable, list[tuple[str | None, int]]] = {}
    for sample in range(count):
        adapter, form = forms[names[sample * len(names) // count]]
        members.setdefault(form, []).append((adapter, sample))
    return [
        Group(tuple(adapter for adapter, _ in group if adapter is not None), [sample for _, sample in group], count)
        for group in members.values()
    ]


def weights_of_samples(names: Sequence[str], weight_of: Callable[[], float], embeddings: torch.Tensor) -> torch.Tensor:
    """A weight of each sample's adapter, as a tensor beside embeddings.

    Args:
        names: an adapter for each sample.
        weight_of: the weight under the chosen adapter.
        embeddings: (B, ...), with one or more of B for each name, side by side.

    Returns:
        (B, 1, ...), with as many dimensions as the embeddings.
    """
    weights = {}
    for name in dict.fromkeys(names):
        with chosen_adapters.set(name):
            weights[name] = weight_of()
    of_names = torch.tensor([weights[name] for name in names], device=embeddings.device)
    repeated = of_names.repeat_interleave(len(embeddings) // len(names))  # (B,)
    return repeated.view(-1, *[1] * (embeddings.ndim - 1))  # (B,) -> (B, 1, ...)


def join_groups(parts: list, groups: Sequence[Group]) -> Any:
    """Outputs for each group as that of the whole batch; see `join`."""
    order = [sample for group in groups for sample in group.samples]
    return join(parts, sorted(range(len(order)), key=order.__getitem__))


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
