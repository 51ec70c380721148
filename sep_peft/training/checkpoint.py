"""`Checkpoint`: the file that a training goes on from, in safetensors and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..tuner.disk import full_disk_named
from ..tuner.files import check_file, check_numbers
from .history import History


#: Name of the file in the folder of a training.
CHECKPOINT_FILE = "sep_checkpoint.safetensors"
#: Key of the file's metadata that holds all that is no tensor, as JSON, and the version of its layout.
ENTRY = "sep_checkpoint"
FORMAT_VERSION = 1
#: What precedes the names of tensors: trained parameters, those of the best epoch, their average over epochs, the
#: optimizer's state, and the state of the steps.
PARAMETERS, BEST, AVERAGE, OPTIMIZER, STEPS = "parameters/", "best/", "average/", "optimizer/", "steps/"


@dataclass
class TrainingState:
    """How far a training has come, beside its optimizer and schedule.

    Args:
        history: of the epochs that ended.
        parameters: name -> tensor of what is trained.
        best: the same as it would be shipped after the best epoch; None without images to validate on.
        done: whether nothing is left to train.
        steps: what a step needs of those before it beside parameters, as `SEPClassifier.steps_state` gives it.
        average: the average of what is trained over the epochs that ended; None where the recipe has none.
    """

    history: History
    parameters: Mapping[str, torch.Tensor]
    best: Mapping[str, torch.Tensor] | None = None
    done: bool = False
    steps: Mapping[str, torch.Tensor] = field(default_factory=dict)
    average: Mapping[str, torch.Tensor] | None = None

    @property
    def shipped(self) -> Mapping[str, torch.Tensor]:
        """What the training would leave if it ended here."""
        return self.parameters if self.average is None else self.average


class Checkpoint:
    """A file that holds all of a training after an epoch.

    There is no random state in it: in every epoch the generators are set to the recipe's seed and the epoch's number.

    Args:
        path: of the file.
        made_for: what must be the same for a training that goes on, as JSON knows it.
        optimizer: whose state is kept.
        parts: name -> what else has a state of numbers (`state_dict`, `load_state_dict`), such as the schedule.
        unknown: name -> value of what a file may not name in `made_for`, because the training that wrote it did not
            know it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        made_for: Mapping[str, Any],
        optimizer,
        parts: Mapping[str, Any],
        unknown: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        # as they are read: tuples are lists
        self._made_for, self._unknown = json.loads(json.dumps([dict(made_for), dict(unknown or {})]))
        self._optimizer, self._parts = optimizer, dict(parts)

    def save(self, state: TrainingState) -> None:
        """Write the file under another name and rename it, so that a kill leaves the one before.

        Raises:
            OSError: it cannot be written; the one before stays.
        """
        optimizer = self._optimizer.state_dict()
        tensors = {PARAMETERS + name: value for name, value in state.parameters.items()}
        tensors |= {BEST + name: value.clone() for name, value in (state.best or {}).items()}
        tensors |= {AVERAGE + name: value for name, value in (state.average or {}).items()}
        tensors |= {STEPS + name: value for name, value in state.steps.items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"{OPTIMIZER}{index}/{name}": value for name, value in values.items()}
        data = {
            "format_version": FORMAT_VERSION,
            "made_for": self._made_for,
            "history": state.history.to_json(),
            "done": state.done,
            "groups": optimizer["param_groups"],
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with full_disk_named(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, temporary, metadata={ENTRY: json.dumps(data)})
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)

    def load(self, parameters: Mapping[str, torch.Tensor]) -> TrainingState | None:
        """Give optimizer and parts the state in the file; None where there is no file.

        Args:
            parameters: name -> what is trained; read for shapes alone.

        Raises:
            SafetensorError: the file is cut short.
            ValueError: it is no checkpoint, or one of another training; nothing is changed then.
        """
        if not self.path.exists():
            return None
        data, tensors = read_entry(self.path), load_file(self.path)
        found = {name: value for name, value in tensors.items() if name.startswith(PARAMETERS)}
        expected = {**self._made_for, "parameters": {PARAMETERS + name: p.shape for name, p in parameters.items()}}
        begun_with = {**self._unknown, **data["made_for"]}
        made_for = {**begun_with, "parameters": {name: value.shape for name, value in found.items()}}
        if differ := sorted(name for name, value in expected.items() if made_for.get(name) != value):
            raise ValueError(
                f"{self.path} is a checkpoint of another training ({', '.join(differ)} differ). Go on as it was begun, "
                "or remove the file."
            )
        try:
            history = History.from_json(data["history"])
            best = {name: tensors[BEST + name] for name in parameters} if history.best is not None else None
            has_average = any(name.startswith(AVERAGE) for name in tensors)
            average = {name: tensors[AVERAGE + name] for name in parameters} if has_average else None
            optimizer = self._state(data["groups"], tensors)
            self._check_parts(data["parts"])
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged(self.path, error) from error
        check_numbers(tensors.items(), str(self.path))
        self._optimizer.load_state_dict(optimizer)
        for name, part in self._parts.items():
            part.load_state_dict(data["parts"][name])
        steps = {name.removeprefix(STEPS): value for name, value in tensors.items() if name.startswith(STEPS)}
        return TrainingState(
            history, {name: found[PARAMETERS + name] for name in parameters}, best, data["done"], steps, average
        )

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def _state(self, groups: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The optimizer's state, compared with the optimizer that is there."""
        own = self._optimizer.state_dict()["param_groups"]
        shapes = [(sorted(group), group["params"]) for group in own]
        if not isinstance(groups, list) or [(sorted(group), group["params"]) for group in groups] != shapes:
            raise ValueError("its optimizer has other groups")
        sizes = [p.shape for group in self._optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(OPTIMIZER):
                index, name = key.removeprefix(OPTIMIZER).split("/")
                if value.ndim and value.shape != sizes[int(index)]:
                    raise ValueError(f"{key} has another shape than the parameter it belongs to")
                state.setdefault(int(index), {})[name] = value
        return {"state": state, "param_groups": groups}

    def _check_parts(self, parts: Any) -> None:
        for name, part in self._parts.items():
            if set(parts[name]) != set(part.state_dict()):
                raise ValueError(f"its {name} has other entries")


def read_entry(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    Raises:
        SafetensorError: the file is cut short.
        ValueError: it is no checkpoint, or of a newer format.
    """
    check_file(path)
    with safe_open(path, framework="pt") as file:
        entry = (file.metadata() or {}).get(ENTRY)
    try:
        data = json.loads(entry or "null")
        if not isinstance(data, dict) or not isinstance(data["made_for"], dict) or "done" not in data:
            raise ValueError("it says nothing of a training")
    except (KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    if data.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {data.get('format_version')!r}, but this version of sep_peft reads "
            f"{FORMAT_VERSION}. Go on with the version that wrote it."
        )
    return data


def history_in(folder: str | os.PathLike, unfinished: bool = False) -> History | None:
    """The history of the training whose checkpoint is in a folder; None where there is none.

    Args:
        folder: may be missing.
        unfinished: None as well where no epoch is left to train.

    Raises:
        SafetensorError, ValueError: as `read_entry`.
    """
    path = Path(folder, CHECKPOINT_FILE)
    if not path.exists():
        return None
    data = read_entry(path)
    try:
        return None if unfinished and data["done"] else History.from_json(data["history"])
    except (KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is no checkpoint of a training, or damaged ({error}). Remove it to begin anew.")
