"""Models whose weights accelerate keeps in CPU memory or on disk: where they compute, and how a weight is read.

An offloaded module has its weights on the meta device; a hook of accelerate brings them while its forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from types import MethodType

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


#: What accelerate hangs on a module: its hook, and the forward that the hook runs.
HOOK, HOOKED_FORWARD = "_hf_hook", "_old_forward"


def compute_device(module: nn.Module) -> torch.device:
    """Where a module computes: on the device of its first parameter, or on that to which accelerate brings it.

    Meta, where the weights are nowhere.
    """
    brought_to = None  # by a hook of the module that owns the parameter, or of one around it
    for part in module.modules():
        for hook in offload_hooks(part):
            brought_to = hook.execution_device
        parameter = next(part.parameters(recurse=False), None)
        if parameter is not None:
            return torch.device(brought_to) if parameter.is_meta and brought_to is not None else parameter.device
    return torch.device("cpu")


def offload_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of accelerate that bring the weights of this very module for its forward, and take them away again."""
    hook = getattr(module, HOOK, None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """The weights of this very module are there in the block, as in its own forward."""
    with ExitStack() as stack:
        for hook in offload_hooks(module):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def put_forward(module: nn.Module, forward: Callable) -> None:
    """Let a module run another forward, inside the hook of accelerate where it has one."""
    setattr(module, HOOKED_FORWARD if HOOKED_FORWARD in vars(module) else "forward", forward)


def reset_forward(module: nn.Module) -> None:
    """Undo `put_forward`, whether the hook came before it or after it."""
    if HOOKED_FORWARD in vars(module):
        setattr(module, HOOKED_FORWARD, MethodType(type(module).forward, module))
    else:
        del vars(module)["forward"]


def read_parameter(root: nn.Module, path: str) -> torch.Tensor:
    """The parameter or buffer at a dotted path, with its values also where accelerate keeps them elsewhere.

    Raises:
        AttributeError: there is none.
    """
    parameter = attrgetter(path)(root)
    if not parameter.is_meta:
        return parameter
    parent, _, _ = path.rpartition(".")
    with loaded(root.get_submodule(parent)):
        return attrgetter(path)(root)
