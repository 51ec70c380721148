"""Whether the running thread is traced.

`torch.compiler.is_compiling()` is true for the whole process while any thread compiles, so it says nothing about the
code that asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch._guards import detect_fake_mode


_Function = TypeVar("_Function", bound=Callable)


def is_traced() -> bool:
    """Whether this thread is traced by `torch.compile` or `torch.export`, or runs on tensors without values.

    Dynamo takes `is_dynamo_compiling` for True in what it traces, and only there. `torch.export` runs the code itself,
    on fake tensors, whose mode belongs to the thread. Where it is true there must be no branch on the values of
    tensors, and nothing that was computed may be kept for later.
    """
    return torch.compiler.is_dynamo_compiling() or detect_fake_mode() is not None


def untraced(function: _Function) -> _Function:
    """`torch.compiler.disable` as a decorator that keeps the type of a function: compilers run it as it is."""
    return cast(_Function, torch.compiler.disable(function))
