"""Models that many tests ask for are made once, and each test gets a copy of its own."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch


Made = TypeVar("Made", bound=Callable)


def made_once(make: Made) -> Made:
    """What `make` returns for the same arguments, copied; random numbers go on as after making it."""
    kept: dict[Any, tuple[Copies, torch.Tensor, tuple]] = {}

    @functools.wraps(make)
    def copied(*args, **options):
        key = torch.get_default_device(), _key(args), _key(options)
        if key not in kept:
            made = make(*args, **options)
            kept[key] = Copies(made), torch.get_rng_state(), (args, options)  # these keep their identities
        copies, state, _ = kept[key]
        torch.set_rng_state(state)
        return copies.new()

    return copied  # type: ignore[return-value]


def _key(value: Any) -> Any:
    """Equal for equal plain values, and else for the same object."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_key, value))
    if isinstance(value, dict):
        return dict, tuple((name, _key(value[name])) for name in sorted(value))
    plain = value is None or isinstance(value, (str, int, float, torch.dtype))
    return (type(value), value) if plain else id(value)


class Copies:
    """As `copy.deepcopy` makes them of a module that has not run yet, in a quarter of the time.

    Args:
        original: what pickle takes but for functions, as which no module qualifies that transformers' hooks hang on.
    """

    def __init__(self, original: torch.nn.Module):
        self.shared: list[Any] = []
        file = io.BytesIO()
        _Pickler(file, self.shared).dump(original)
        self.pickled = file.getvalue()

    def new(self) -> Any:
        return _Unpickler(io.BytesIO(self.pickled), self.shared).load()


class _Pickler(pickle.Pickler):
    """Puts tensors and functions into a list; what is pickled refers to them."""

    def __init__(self, file: io.BytesIO, shared: list[Any]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.shared = shared
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, (torch.Tensor, FunctionType)):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.shared)
            self.shared.append(value)
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    """Copies what is in the list by `copy.deepcopy`: functions are the same ones, tensors share what they shared."""

    def __init__(self, file: io.BytesIO, shared: list[Any]):
        super().__init__(file)
        self.shared = shared
        self.copied: dict[int, Any] = {}

    def persistent_load(self, place: int) -> Any:
        return copy.deepcopy(self.shared[place], self.copied)
