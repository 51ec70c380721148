"""Many tasks over one model: for each an adapter and classes of its own, chosen by name for a single call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..tuner.current import chosen_adapters, walked_adapter
from ..tuner.messages import shown
from ..tuner.mixed_batch import check_adapter_names
from ..tuner.modes import evaluating
from ..tuner.restore import unchanged_on_error
from ..words import counted
from .class_encoder import ClassEncoder
from .classes import TaskClasses
from .prediction import Task


class Tasks(nn.Module):
    """The tasks of a classifier by name; class texts are cached for each.

    Nothing here touches the active adapter, so threads may use different tasks at once. Tasks are added and removed
    while no thread predicts.

    Args:
        model: with SEP adapters. It is no child of this module: the owner of this owns the model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = (model,)
        self._tasks: dict[str, Task] = {}
        self._encoders = nn.ModuleList()  # so that token ids follow the model to its device

    def _configs(self) -> Mapping[str, Any]:
        """The model's `peft_config`."""
        return cast(Any, self._model[0]).peft_config

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def __getitem__(self, name: str) -> Task:
        """
        Raises:
            ValueError: there is no such task; the message lists what there is.
        """
        if name not in self._tasks:
            raise ValueError(f"There is no task {name!r}; the tasks are {list(self._tasks)}.")
        return self._tasks[name]

    def add(self, name: str, classes: TaskClasses, adapter: str, chunk_size: int) -> None:
        """
        Args:
            name: of the task.
            classes: its classes.
            adapter: name of its adapter, or "__base__" for the model without one.
            chunk_size: see `ClassEncoder`.

        Raises:
            ValueError: the name is taken, there is no such adapter, or a class text does not fit.
        """
        self.check_new(name)
        check_adapter_names([adapter], self._configs())
        with chosen_adapters.set(adapter):
            encoder = ClassEncoder(self._model[0], classes, chunk_size).train(self.training)
        self._tasks[name] = Task(adapter, encoder)
        self._encoders.append(encoder)

    def load(self, name: str, path: str, classes: TaskClasses, chunk_size: int, **options) -> None:
        """Load an adapter under the name of the task and add the task; on an error neither is there.

        Args:
            name, classes, chunk_size: as for `add`.
            path: folder or repository of the adapter.
            options: of `PeftModel.load_adapter`.

        Raises:
            TypeError: the model is no `PeftModel`.
            ValueError: the name is taken by a task or an adapter, or a class text does not fit.
            AdapterMismatchError: the weights do not fit the model.
        """
        model = self._model[0]
        if not isinstance(model, PeftModel):
            raise TypeError(f"Loading a task needs a PeftModel, but the model is a {type(model).__name__}.")
        self.check_new(name)
        if name in model.peft_config:
            raise ValueError(f"There is an adapter {name!r} already. Choose another name, or use add_task.")
        with walked_adapter.set(name):  # whatever walks through the model meets no other adapter
            training, known = model.training, set(model.modules())
            with unchanged_on_error(model), evaluating(model):  # as PEFT leaves all; each module's own mode comes back
                model.load_adapter(path, name, **options)
                self.add(name, classes, name, chunk_size)
            for module in set(model.modules()) - known:
                module.training = training

    def put(self, name: str, classes: TaskClasses) -> None:
        """Put other classes in the place of a task's; its adapter stays.

        Raises:
            ValueError: there is no such task, or a class text does not fit.
        """
        adapter, before = self[name]
        with chosen_adapters.set(adapter):
            encoder = ClassEncoder(self._model[0], classes, before.chunk_size).train(self.training)
        self._tasks[name] = Task(adapter, encoder)
        self._encoders = nn.ModuleList(encoder if old is before else old for old in self._encoders)

    def remove(self, name: str) -> None:
        """Forget a task; its adapter stays in the model.

        Raises:
            ValueError: there is no such task.
        """
        removed = self[name]
        del self._tasks[name]
        self._encoders = nn.ModuleList(encoder for encoder in self._encoders if encoder is not removed.encoder)

    def check_new(self, name: str) -> None:
        """
        Raises:
            ValueError: the name is blank, no text, or taken.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"A task's name must be a text that is not blank, but got {name!r}.")
        if name in self._tasks:
            raise ValueError(f"There is a task {name!r} already. Remove it first, or choose another name.")

    def of_samples(self, task: str | Sequence[str], count: int) -> list[Task]:
        """One task for each sample.

        Args:
            task: name of one for all samples, or one for each.
            count: samples.

        Raises:
            TypeError: `task` is neither a name nor a list of names.
            ValueError: another number of tasks than samples, a task that does not exist, or one without its adapter.
        """
        if not isinstance(task, (str, Sequence)):
            raise TypeError(f"task must be a name or a list of names, but got {shown(task)}.")
        names = [task] * count if isinstance(task, str) else list(task)
        if len(names) != count:
            raise ValueError(
                f"task must be one name or one for each of {counted(count, 'image')}, but got {len(names)}."
            )
        used = {name: self[name] for name in ([task] if isinstance(task, str) else names)}
        adapters = [found.adapter for found in used.values() if found.adapter is not None]
        check_adapter_names(adapters, self._configs())
        return [used[name] for name in names]
