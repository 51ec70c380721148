"""Tasks over one base model, loaded when they are asked for; of too many the least recently used one goes.

Ray Serve's own `serve.multiplexed` keeps models in the same way, but `serve.batch` then runs a batch of its own for
each model (`_split_batch_by_model_id` of Ray 2.60), while samples of different adapters can share one. `serve.py` uses
this file; it knows nothing of Ray.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from serve_addresses import Refused

from sep_peft import SEPClassifier
from sep_peft.tuner.messages import one_line, shown


LOG = logging.getLogger(__name__)
#: Names of tasks: what no file system takes for anything but a name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: Seconds in which a task that could not be loaded is not tried again.
PAUSE = 30.0
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Sources:
    """Where tasks come from.

    Args:
        folder: holds a folder for each task, with what `SEPClassifier.save_pretrained` wrote; None: no folder.
        hub: name of a task -> id of its repository on the Hub.

    Raises:
        ValueError: the folder is none, or a name is not allowed.
    """

    folder: Path | None
    hub: Mapping[str, str]

    def __post_init__(self):
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder. Name one that holds a folder for each task.")
        for name in self.hub:
            if not NAME.fullmatch(name):
                raise ValueError(f"{shown(name)} is no name for a task: letters, digits, '.', '_' and '-' are.")

    def names(self) -> list[str]:
        """All tasks that can be asked for, sorted."""
        folders = [] if self.folder is None else [path.parent.name for path in self.folder.glob(f"*/{CONFIG}")]
        return sorted({*self.hub, *(name for name in folders if NAME.fullmatch(name))})

    def find(self, name: str) -> str:
        """Folder or repository of a task.

        Raises:
            Refused: the name is not allowed (422), or there is no such task (404).
        """
        if not NAME.fullmatch(name):
            message = f"{shown(name)} is no name of a task: letters, digits, '.', '_' and '-' are."
            raise Refused(422, "invalid_task", message)
        if name in self.hub:
            return self.hub[name]
        if self.folder is None or not (self.folder / name / CONFIG).is_file():
            raise Refused(404, "unknown_task", f"There is no task {name!r}; GET /tasks lists them.")
        return str(self.folder / name)

    def state(self, name: str) -> Any:
        """What changes when the files of a task do; of one from the Hub nothing here tells it."""
        if name in self.hub or self.folder is None:
            return None
        files = [path.stat() for path in sorted((self.folder / name).glob("*")) if path.is_file()]
        return [(file.st_ino, file.st_mtime_ns, file.st_size) for file in files]


@dataclass
class Loaded:
    """A task in memory: what the classifier calls it, and the state of its files when they were read."""

    name: str
    state: Any


class TaskCache:
    """The tasks that are in memory. One thread at a time may use it.

    Args:
        classifier: whose model takes the adapters in.
        sources: of the tasks.
        capacity: tasks that are kept; no batch may have more.
    """

    def __init__(self, classifier: SEPClassifier, sources: Sources, capacity: int):
        self.classifier, self.sources, self.capacity = classifier, sources, capacity
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used comes first
        self.loads = self.evictions = self.failures = 0
        self._failed: dict[str, float] = {}  # task -> when it is tried again

    def need(self, names: Iterable[str]) -> dict[str, str | Refused]:
        """Have all of these tasks in memory.

        Returns:
            name -> what the classifier calls the task, or why it cannot be used: its files are not to be read (503).
        """
        names, found = dict.fromkeys(names), {}
        for name in names:
            if name in self.loaded:
                self.loaded.move_to_end(name)
        for name in names:
            try:
                if name not in self.loaded:
                    self._make_room(names)
                    self.loaded[name] = self._load(name)
                found[name] = self.loaded[name].name
            except Refused as refused:
                found[name] = refused
        return found

    def refresh(self) -> None:
        """Read tasks anew whose files have changed, and forget those that are gone.

        Where the new files cannot be read, the task stays as it is.
        """
        self._failed.clear()
        for name in [*self.loaded]:
            before = self.loaded[name]
            try:
                self.sources.find(name)
            except Refused:
                self._evict(name)
                continue
            state = self.sources.state(name)
            if state is not None and state == before.state:
                continue
            try:
                after = self._load(name)
            except Refused:
                LOG.warning("the task %s stays as it was", name)
                continue
            self.loaded[name] = after  # keeps its place
            self._forget(before)

    def predict(self, names: Sequence[str], images: Sequence[Image.Image]) -> list[list[dict] | Exception]:
        """Classify each image by its task, all in one batch.

        Returns:
            for each image the classes of its task with their scores, best first, or what is wrong with this one.
        """
        found = self.need(names)
        good = [index for index, name in enumerate(names) if not isinstance(found[name], Refused)]
        answers: list[Any] = [found[name] for name in names]
        predicted = self._predict([images[index] for index in good], [answers[index] for index in good])
        for index, answer in zip(good, predicted, strict=True):
            answers[index] = answer
        return answers

    def _predict(self, images: list[Image.Image], tasks: list[str]) -> list[Any]:
        if not images:
            return []
        try:
            return self.classifier.predict(images, task=tasks, batch_size=len(images))
        except Exception as error:
            if len(images) == 1:
                LOG.exception("a prediction failed")
                return [error]
        # one image must not spoil the answers of others
        return [self._predict([image], [task])[0] for image, task in zip(images, tasks, strict=True)]

    def _load(self, name: str) -> Loaded:
        """
        Raises:
            Refused: the files are gone (404), or they cannot be read or do not fit the model (503).
        """
        path = self.sources.find(name)
        message = f"The task {name!r} cannot be loaded; the server's log says why."
        if self._failed.get(name, 0.0) > time.monotonic():
            raise Refused(503, "task_unavailable", message)
        own, state = f"task_{self.loads + self.failures}", self.sources.state(name)
        try:
            self.classifier.load_task(path, own)
        except Exception as error:  # a stranger's file can be wrong in any way; the message tells of folders here
            self.failures += 1
            self._failed[name] = time.monotonic() + PAUSE
            LOG.error("the task %s cannot be loaded: %s", name, one_line(str(error)))
            raise Refused(503, "task_unavailable", message) from error
        self.loads += 1
        return Loaded(own, state)

    def _make_room(self, needed: Mapping[str, Any]) -> None:
        while len(self.loaded) >= self.capacity:
            self._evict(next(name for name in self.loaded if name not in needed))

    def _evict(self, name: str) -> None:
        self._forget(self.loaded.pop(name))
        self.evictions += 1

    def _forget(self, loaded: Loaded) -> None:
        self.classifier.tasks.remove(loaded.name)
        self.classifier.model.delete_adapter(loaded.name)
