"""Evaluation mode for as long as somebody needs it, in a model that several threads share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..tracing import is_traced


_lock = threading.Lock()
#: Module that was training when the first block around it began -> blocks around it that have not ended.
_switched: dict[nn.Module, int] = {}


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Evaluation mode of a module and all below it inside the block; after it each module's own mode again.

    Blocks may overlap, in several threads and around parts of one model: a module trains again when the last block
    around it has ended, so nobody inside of a block ever meets dropout. While threads are in such blocks the mode must
    not be set otherwise.

    A thread that is traced switches nothing: its graph is of the mode that it was asked for in.

    Args:
        root: of the modules to switch.
    """
    if is_traced():
        yield
        return
    with _lock:
        modules = [module for module in root.modules() if module.training or module in _switched]
        for module in modules:
            module.training = False
            _switched[module] = _switched.get(module, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _switched[module] -= 1
                if not _switched[module]:
                    del _switched[module]
                    module.training = True
