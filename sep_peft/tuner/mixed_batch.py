"""Batches whose rows use different adapters: who wants which, how rows are split, and how they are joined again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch

from .current import Current
from .registration import peft_type


if TYPE_CHECKING:
    from .tower import SEPTower

#: Name that stands for the model without an adapter, as in PEFT.
BASE = "__base__"
#: What this call wants in place of the active adapter: one name for all rows, a tuple of one name a row, or None.
chosen_adapters = Current("sep_peft_chosen_adapters")


def check_names(names: Iterable[str], configs: Mapping[str, Any]) -> None:
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


def check_rows(names: Sequence[str], inputs: Mapping[str, Any], main_inputs: Iterable[str]) -> None:
    """Make sure that there is a name for each row of every tower's input.

    Args:
        names: `adapter_names`.
        inputs: of the model, by name.
        main_inputs: names of the inputs whose rows count, or what these begin with.

    Raises:
        TypeError: `names` is no list.
        ValueError: another number of rows.
    """
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"adapter_names must be a list with a name for each row, but got {names!r}.")
    begins = tuple(main_inputs)
    for name, value in inputs.items():
        if name.startswith(begins) and isinstance(value, torch.Tensor) and len(value) != len(names):
            raise ValueError(
                f"adapter_names must hold a name for each row of {name}, which has {len(value)}, but it holds "
                f"{len(names)}."
            )


def by_rows(method: Callable) -> Callable:
    """Let a method of `SEPTower` that takes what the tower takes serve a mixed batch."""

    @wraps(method)
    def run(tower: SEPTower, *args, **kwargs):
        names = chosen_adapters.get()
        if not isinstance(names, tuple):
            return method(tower, *args, **kwargs)
        inputs = tower._bind(args, kwargs)
        return run_rows(names, inputs, partial(method, tower))

    return run


def forward(tower: SEPTower, inputs: dict):
    """`SEPTower.forward` for a mixed batch."""
    return_dict = tower.pop_return_dict(inputs)
    parts, order = _run_groups(chosen_adapters.get(), inputs, partial(tower.forward, return_dict=True))
    _align(tower, parts)
    output = join(parts, order)
    return output if return_dict else output.to_tuple()


def _align(tower: SEPTower, parts: list) -> None:
    """Where the model mixes after the tower, it must get both branches of all rows or of none.

    Rows without a mix have two equal branches, or one that counts alone.
    """
    if tower.spec.mixes_after_projection and len({part.pooler_output.shape[-1] for part in parts}) > 1:
        for part in parts:
            pooled = part.pooler_output
            if pooled.shape[-1] == tower.hidden_size:
                part.pooler_output = torch.cat([pooled, tower.project(pooled).to(pooled.dtype)], dim=-1)
    if tower.spec.reader is not None and len({part.last_hidden_state.shape[-1] for part in parts}) > 1:
        for part in parts:
            states = part.last_hidden_state
            if states.shape[-1] == tower.hidden_size:
                part.last_hidden_state = torch.cat([states, states], dim=-1)


def frozen_weight(tower: SEPTower, embeddings: torch.Tensor) -> float | torch.Tensor:
    """Share of the frozen embedding in the mix of what the model reads of all rows.

    Args:
        tower: whose adapters say it.
        embeddings: (B, Q, E) of these rows.

    Returns:
        a number, or (B, 1, 1) in a mixed batch.
    """
    names = chosen_adapters.get()
    if not isinstance(names, tuple):
        return tower.frozen_weight
    weights = []
    for name in names:
        with chosen_adapters.set(name):
            weights.append(tower.frozen_weight)
    return torch.tensor(weights, device=embeddings.device).repeat_interleave(len(embeddings) // len(names))[
        :, None, None
    ]


def run_rows(names: Sequence[str], inputs: Mapping[str, Any], call: Callable):
    """Call something once for each adapter of a batch, with the rows that want it, and join what it returns.

    Args:
        names: a name for each row of the batch, or for each input of several rows, such as the frames of a video.
        inputs: keyword arguments of `call`; the first tensor's rows are the batch, and tensors of as many are split.
        call: returns tensors with a row for each input row, or tuples or dicts of such.
    """
    return join(*_run_groups(names, inputs, call))


def _run_groups(names: Sequence[str], inputs: Mapping[str, Any], call: Callable) -> tuple[list, list[int]]:
    """What `call` returns for each adapter, and the position of every row in the concatenation of these."""
    count = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
    if count % len(names):
        raise ValueError(f"There are {len(names)} adapter names for a batch of {count} rows.")
    rows_of: dict[str, list[int]] = {}
    for row in range(count):
        rows_of.setdefault(names[row * len(names) // count], []).append(row)
    parts = []
    for name, rows in rows_of.items():
        with chosen_adapters.set(name):
            parts.append(call(**(inputs if len(rows_of) == 1 else _select(inputs, rows, count))))
    after = {row: position for position, row in enumerate(row for rows in rows_of.values() for row in rows)}
    return parts, [after[row] for row in range(count)]


def _select(inputs: Mapping[str, Any], rows: list[int], count: int) -> dict:
    """These rows of every tensor that has `count` of them; anything else belongs to all rows."""

    def select(value):
        has_rows = isinstance(value, torch.Tensor) and value.ndim and len(value) == count
        return value[torch.tensor(rows, device=value.device)] if has_rows else value

    return {name: select(value) for name, value in inputs.items()}


def join(parts: list, order: list[int]):
    """Outputs of several calls as that of one: tensors concatenated, with their rows in `order`.

    A tensor may have several rows for each in `order`, as many for each, side by side.

    Raises:
        ValueError: tensors differ in more than their rows.
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
            f"Rows of a mixed batch cannot be joined, because they have the shapes {', '.join(map(str, shapes))}."
        )
    joined = torch.cat(parts)
    index = torch.tensor(order, device=joined.device)
    if len(joined) == len(order):
        return joined[index]
    return joined.unflatten(0, (len(order), -1))[index].flatten(0, 1)
