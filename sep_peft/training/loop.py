"""The loop, on Accelerate: one process or many, killed and resumed, always the same images in the same order."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..method.base_recipe import BaseRecipe
from .averaging import averaged, share_of_epoch
from .checkpoint import Checkpoint, TrainingState
from .data import EpochDataset
from .epochs import Epochs
from .history import History, TrainingInterrupted
from .limits import Limits
from .progress import Progress
from .signals import Signals
from .steps import Step, labelled_step


#: Called with the history after every epoch.
Callback = Callable[[History], object]


class Validation(Protocol):
    """What measures a classifier while it trains; every process asks it."""

    def zero_shot(self) -> float | None:
        """What the base model has, in percent, before training; None: not known."""
        ...

    def measure(self) -> Mapping[str, float]:
        """What is noted of an epoch, one of `MEASURES` in percent among it."""
        ...


def train(
    classifier: nn.Module,
    images: EpochDataset,
    recipe: BaseRecipe,
    *,
    accelerator: Accelerator | None = None,
    checkpoint: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    unknown: Mapping[str, Any] | None = None,
    validation: Validation | None = None,
    callbacks: Sequence[Callback] = (),
    limits: Limits | None = None,
    workers: int = 0,
    quiet: bool = False,
    step: Step = labelled_step,
) -> History:
    """Train what requires gradients, in place; `fit` does all around it.

    A batch is shared out among the processes and weighed by its images, so that the result is that of one process up to
    rounding, uneven last batches included. The order of the images, their augmentation and dropout follow the recipe's
    seed; torch's, NumPy's and Python's generators are set to it in every epoch.

    Args:
        classifier: what is trained; by default takes an entry's tensors and gives `loss`, a mean over the batch, and
            `logits` (B, C).
        images: to train on.
        recipe: how to train.
        accelerator: for mixed precision and many processes; None: one without options, which leaves the classifier on
            its device where there is one process.
        checkpoint: a file that is written whole after every epoch, and gone on from where it is there: bit for bit, as
            if nothing had happened. None: no file. One that cannot be written is warned of, and training goes on.
        settings: what must be as it was for a training that goes on, beside recipe and images, as JSON knows it.
        unknown: name -> value of a setting with which a training is one that does not know it, where the recipe's
            `UNKNOWN` does not say so; None: it does.
        validation: measures the classifier after every epoch; None: nothing does.
        callbacks: called with the history after every epoch, in the main process; see `History.stop`.
        limits: when to end before the recipe does, and with which weights; None: `Limits()`.
        workers: processes that read images.
        quiet: without progress.
        step: computes the gradients of a batch; by default `classifier` gives the loss of an entry with `labels`.

    Returns:
        the history. The classifier has the weights of the last epoch, or with `validation` those of the best one; where
        the recipe averages them over epochs, the average up to that epoch.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM came; the classifier has the same weights as if the training had ended
            with the last epoch that was done.
        ValueError: the checkpoint is of another training, of other parameters or of other images. Or the loss is not
            finite; the classifier is as the epoch before left it.
    """
    accelerator, limits = accelerator or Accelerator(device_placement=False), limits or Limits()
    run = Epochs(classifier, images, recipe, accelerator, workers, step)
    made_for = recipe.of_steps | {"images": len(images), "samples": images.fingerprint} | dict(settings or {})
    unknown = {**recipe.UNKNOWN, **(unknown or {})}
    file = None if checkpoint is None else Checkpoint(checkpoint, made_for, run.optimizer, run.parts, unknown)
    state = TrainingState(History(-(-run.steps // run.per_epoch)), run.snapshot())
    if file is not None and (found := file.load(run.parameters)) is not None:
        state = found
        state.history.stopped = None
        run.take_steps_state(state.steps)
        run.take(state.parameters)
    elif validation is not None:
        state.history.zero_shot = validation.zero_shot()
    if not state.steps:
        run.take_steps_state({})
    history = state.history
    progress = Progress(history, run.steps, len(history) * run.per_epoch, quiet or not accelerator.is_main_process)
    run.prepare()
    with Signals() as signals:
        try:
            _train_epochs(run, state, file, validation, callbacks, limits, signals, progress)
        except KeyboardInterrupt:
            history.stopped = signals.received
            raise TrainingInterrupted(history) from None
        finally:
            progress.close()
            run.take(state.best if limits.keep == "best" and state.best is not None else state.shipped)
            run.release()
    return history


def _train_epochs(
    run: Epochs,
    state: TrainingState,
    file: Checkpoint | None,
    validation: Validation | None,
    callbacks: Sequence[Callback],
    limits: Limits,
    signals: Signals,
    progress: Progress,
) -> None:
    """All epochs that are left; `state` is always that of the last epoch that was done."""
    history, main, start = state.history, run.accelerator.is_main_process, time.monotonic()
    first = len(history)
    state.done = limits.done(history)
    while not state.done and history.stopped is None:
        begun = time.monotonic()
        row = run.epoch(len(history), progress)
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"The loss is {row['loss']} in epoch {row['epoch']}. Train with a lower learning rate; what the epochs "
                "before it left is kept."
            )
        parameters, average = run.snapshot(), None
        if run.recipe.average_center is not None:
            share = share_of_epoch(len(history) + 1, history.epochs, run.recipe)
            average = averaged(state.average, parameters, share)
        if validation is not None:
            row |= _measured(run, validation, parameters, average)
        with signals.held():
            history.rows.append(row)
            history.seconds.append(time.monotonic() - begun)
            state.parameters, state.average, state.steps = parameters, average, run.steps_state()
            if history.best == len(history):
                state.best = state.shipped
            state.done = limits.done(history)
            if file is not None and main:
                _save(file, state)
            progress.epoch()
        if main:
            for callback in callbacks:
                callback(history)
            history.stopped = history.stopped or limits.reason(history, time.monotonic() - start, len(history) - first)
        history.stopped = run.agree(history.stopped)


def _measured(
    run: Epochs,
    validation: Validation,
    parameters: Mapping[str, torch.Tensor],
    average: Mapping[str, torch.Tensor] | None,
) -> Mapping[str, float]:
    """What is noted of an epoch, of what would be shipped after it; the next one goes on from `parameters`."""
    if average is None:
        return validation.measure()
    steps = run.steps_state()
    run.take(average)
    try:
        return validation.measure()
    finally:
        run.take(parameters)
        run.take_steps_state(steps)  # a step would take what was written for a change from outside, and begin anew


def _save(file: Checkpoint, state: TrainingState) -> None:
    """Write a checkpoint; where that fails, training is worth more than the file."""
    try:
        file.save(state)
    except OSError as error:
        warnings.warn(
            f"No checkpoint could be written {state.history} ({error}); training goes on, but could only be resumed "
            "from the one before.",
            stacklevel=4,
        )
