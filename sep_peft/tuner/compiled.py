"""Modules that are compiled by themselves, by ``torch.compile(module)`` or, in place, by ``module.compile()``.

A module that compiles in place goes on to work after SEP has changed what is inside of it: its graph is made anew, and
what it cannot see of a call is run outside of the graph (`wrappers`).
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.utils import is_compiled_module
from torch import nn

from .registration import PREFIX


def check_not_compiled(model: nn.Module) -> None:
    """Make sure that SEP finds the towers of a model, and not what `torch.compile` has put around something in it.

    Raises:
        ValueError: names the first compiled module.
    """
    for path, module in _own_modules(model, ""):
        if is_compiled_module(module):
            what = f"{path} is" if path else "the model is"
            raise ValueError(
                f"SEP cannot be put into what is compiled already: {what} a module that torch.compile has returned. "
                "Add the adapter first and compile afterwards: torch.compile(get_peft_model(model, SEPConfig()))."
            )


def check_reached(model: nn.Module, tower_path: str) -> None:
    """Make sure that the code of a tower, inside of a model, can see what is chosen for a call of the model.

    Raises:
        ValueError: the tower or something around it compiles in place, so its graph is that of the active adapter.
    """
    module, names = model, tower_path.split(".") if tower_path else []
    for index in range(len(names) + 1):
        # torch has no public name for it
        if module._compiled_call_impl is not None:
            path = ".".join(names[:index]) or "the model"
            raise ValueError(
                f"adapter_names do not reach {path}, which was compiled in place: its graph has the active adapter. "
                "Use set_adapter, or compile the call that passes adapter_names instead."
            )
        if index < len(names):
            module = module.get_submodule(names[index])


def _own_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of a module and all below it, without those of SEP's adapters, of which there may be many."""
    yield path, module
    if is_compiled_module(module):
        return
    for name, child in module.named_children():
        if not name.startswith(PREFIX):
            yield from _own_modules(child, f"{path}.{name}" if path else name)
