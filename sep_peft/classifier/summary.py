"""`summarize`: a classifier in a few lines, where `torch.nn.Module` would print every module of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from peft import PeftModel
from torch import nn

from ..tuner.messages import shown
from ..tuner.tower import SEPTower
from ..words import counted
from .calibration import Calibration
from .classes import TaskClasses
from .label_calibration import LabelCalibration


#: Names of classes or of tasks that are written out.
NAMED = 3


def summarize(module: nn.Module, towers: Mapping[str, SEPTower], classes: TaskClasses, tasks: Sequence[str]) -> str:
    """What a classifier is, one thing a line; names from outside are escaped and cut short.

    Args:
        module: the classifier, whose parameters are counted.
        towers: by modality; they know the model and the active adapter.
        classes: of the classifier.
        tasks: names of its tasks.
    """
    # PEFT counts what is packed into four bits; its method asks for nothing but named_parameters()
    trained, count = PeftModel.get_nb_trainable_parameters(cast(PeftModel, module))
    tower = towers["vision"]
    adapters = [p for each in towers.values() for name in each.active_adapters for p in each.adapter_parameters(name)]
    own = sum(p.numel() for p in adapters)
    lines = {
        "classes": _counted(classes.names),
        "base": _base(tower.owner),
        "adapter": "off" if tower.disable_adapters else ", ".join(map(shown, tower.active_adapters)) or "none",
        "parameters": f"{own:,} in the adapter, {count:,} in all, {trained:,} being trained",
        "tasks": _counted(tasks),
        "calibration": _calibrated(classes.calibration),
    }
    return "\n".join((f"{type(module).__name__}(", *(f"  {name}: {text}" for name, text in lines.items()), ")"))


def _counted(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    if not names:
        return "none"
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names):,} ({', '.join(map(shown, names[:NAMED]))}{more})"


def _base(model: nn.Module) -> str:
    """Class of a model, and where it came from as far as it knows."""
    name = getattr(model, "name_or_path", "")
    return f"{type(model).__name__} {shown(name)}" if name else type(model).__name__


def _calibrated(calibration: Calibration | LabelCalibration | None) -> str:
    if calibration is None:
        return "none"
    if isinstance(calibration, LabelCalibration):
        kind = "several labels an image"
    else:
        kind = f"temperature {calibration.temperature:.3g}"
    return f"{kind}, found on {counted(calibration.images, 'image')} ({calibration.source})"
