"""Everything in a model as it was, where a change of it fails half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .layer_fusions import LayerFusions


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block raises, modules, parameters, hooks, modes and adapters of `model` are those of before it.

    What the block wrote into tensors stays written; a change must check its values before it copies any.
    """
    before = Known(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class Known:
    """Modules, parameters, hooks, modes and adapters of a model as they are, to come back later."""

    def __init__(self, model: nn.Module):
        modules = _modules(model)
        self._modules = [_KnownModule(module) for module in modules]
        self._trained = [(p, p.requires_grad) for module in modules for p in _parameters(module)]

    def restore(self) -> None:
        """Bring them back."""
        for module in self._modules:
            module.restore()
        for parameter, requires_grad in self._trained:
            parameter.requires_grad_(requires_grad)


class _KnownModule:
    """The attributes of one module, and what is in those of them that are containers."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = dict(vars(module))
        values = self.attributes.values()
        self.containers = [(value, value.copy()) for value in values if isinstance(value, (dict, list, set))]

    def restore(self) -> None:
        attributes = vars(self.module)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        for container, content in self.containers:
            _fill(container, content)
        if isinstance(self.module, LayerFusions):
            self.module.train(self.module.training)


def _fill(container: Any, content: Any) -> None:
    if container == content and (not isinstance(container, dict) or list(container) == list(content)):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _modules(root: nn.Module) -> list[nn.Module]:
    """All modules once, without those inside the fusions of an adapter, which never change and are very many."""
    found, waiting = {}, [root]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        if not isinstance(module, LayerFusions):
            waiting += module.children()
    return list(found.values())


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of one of `_modules`, and of what was left out below it."""
    return module.parameters(recurse=isinstance(module, LayerFusions))
