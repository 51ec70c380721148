"""How far a classifier hears its adapter beside the frozen model, after training, and the heads that read the mix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..tuner.current import chosen_adapters
from ..tuner.messages import listed, shown
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from ..tuner.strength import set_frozen_weight
from ..tuner.tower import SEPTower
from .classes import TaskClasses
from .fitting import fitted_classes
from .prediction import Task


def kept_head(classes: TaskClasses) -> str | None:
    """The kind of head that predicts beside the texts of these classes; None: there is none."""
    if classes.head is not None:
        return classes.head.kind
    return None if classes.prototypes is None else "prototypes"


def with_frozen_weight(
    model: nn.Module,
    tower: SEPTower,
    tasks: Mapping[str | None, Task],
    name: str | None,
    weight: float,
    batches: Iterable[Mapping[str, torch.Tensor]] | None,
    trained: TaskClasses | None,
) -> dict[str | None, TaskClasses]:
    """Set the frozen weight of a task's adapter, and find out what becomes of the classes that it serves.

    Args:
        model: with the adapter.
        tower: of the images.
        tasks: all by name; None: the classifier's own classes and the active adapter.
        name: of the task whose adapter is meant.
        weight: the share of the frozen embedding.
        batches: training images of this task, for its head.
        trained: the classes that the classifier's own adapter was trained for, as they were kept.

    Returns:
        for this task and each other of the same adapter its new classes: without calibration, with the head made anew.

    Raises:
        ValueError: as `SEPClassifier.set_frozen_weight`; nothing is changed.
    """
    adapter, encoder = tasks[name]
    config = getattr(model, "peft_config", {}).get(adapter)
    if adapter is None or config is None:
        raise ValueError("There is no adapter whose frozen_weight could be set: the model predicts as it is.")
    served = {other: task.encoder.classes for other, task in tasks.items() if task.adapter == adapter}
    _check_heads(served, name, adapter, batches is not None)
    if None in served and trained is not None and trained is not served[None] and kept_head(trained):
        raise ValueError(
            "The classes that were trained keep a head for the present frozen_weight, but others are set. Call "
            "set_classes with the trained names first."
        )
    before = config.frozen_weight
    set_frozen_weight(model, adapter, weight)
    changed = {other: replace(classes, calibration=None) for other, classes in served.items()}
    if batches is None:
        return changed
    try:
        with chosen_adapters.set(adapter), evaluating(model):
            kind = kept_head(encoder.classes) or "prototypes"
            fitted = fitted_classes(kind, tower, encoder, batches, compute_device(model))
    except BaseException:
        set_frozen_weight(model, adapter, before)
        raise
    return {**changed, name: replace(fitted, calibration=None)}


def _check_heads(served: Mapping[str | None, TaskClasses], name: str | None, adapter: str, images: bool) -> None:
    """
    Raises:
        ValueError: classes that `adapter` serves keep heads, but there are no images to make those of `name` anew, or
            there are others; or there are images, but nothing to make anew.
    """
    others = [other for other, classes in served.items() if other != name and kept_head(classes)]
    if others:
        whose = listed("the classifier's own" if other is None else other for other in others)
        raise ValueError(
            f"Adapter {shown(adapter)} serves other classes as well ({whose}), whose heads belong to the present "
            "frozen_weight. Load the adapter a second time for one of them."
        )
    kind = kept_head(served[name])
    if kind is not None and not images:
        what = "prototypes, which belong" if kind == "prototypes" else f"a {kind} head, which belongs"
        raise ValueError(
            f"The classes keep {what} to the present frozen_weight. Pass batches of the training images, from which it "
            "can be made anew."
        )
    if kind is None and images:
        raise ValueError("batches must be left out: the classes keep neither prototypes nor another head.")
