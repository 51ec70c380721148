"""What belongs to the running call of this thread."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    pass


class Current:
    """A value that belongs to the running call of this thread; None outside of one.

    torch.compile cannot trace `ContextVar.get`; while it traces, under its own lock, a plain attribute serves.
    """

    def __init__(self, name: str):
        self._context = ContextVar(name, default=None)
        self._traced = None

    def get(self):
        return self._traced if torch.compiler.is_compiling() else self._context.get()

    @contextmanager
    def set(self, value):
        if torch.compiler.is_compiling():
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
