"""What belongs to the running call of this thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class Current:
    """A value that belongs to the running call of this thread; None outside of one.

    `torch.compile` cannot trace `ContextVar.get`. What it traces reads and writes an attribute instead: a trace changes
    no object before it ends, and by then the attribute is as it was, so no other thread ever sees a value in it. Asking
    by `torch.compiler.is_dynamo_compiling` matters: code that `torch.export` runs by itself is no trace of dynamo.

    Args:
        name: for messages of Python.
    """

    def __init__(self, name: str):
        self._context: ContextVar[Any] = ContextVar(name, default=None)
        self._traced: Any = None

    def get(self) -> Any:
        """The value of the running call."""
        return self._traced if torch.compiler.is_dynamo_compiling() else self._context.get()

    def is_hidden(self) -> bool:
        """Whether this code is traced and cannot tell the value, because nothing has set one since the trace began.

        Something may have been set before, around a graph that is compiled by itself, such as that of an encoder.
        """
        return torch.compiler.is_dynamo_compiling() and self._traced is None

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        """Make `value` the current one inside the block."""
        if torch.compiler.is_dynamo_compiling():
            before, self._traced = self._traced, value
            try:
                yield
            finally:
                self._traced = before
        else:
            token = self._context.set(value)
            try:
                yield
            finally:
                self._context.reset(token)


#: The pass through a tower that runs in this thread; what the wrappers inside the towers ask.
current_pass = Current("sep_peft_current_pass")
#: What this call wants in place of the active adapter: one name for all samples, a tuple of one name a sample, or None.
chosen_adapters = Current("sep_peft_chosen_adapters")
#: The one adapter whose fusions this thread meets on its walks through a model, or None; see `AdapterFusions`.
walked_adapter = Current("sep_peft_walked_adapter")
