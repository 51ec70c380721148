"""What is shown while a training runs: a bar over its steps and a line for every epoch."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from ..classifier.on_the_way import OnTheWay
from .history import MEASURES, History


class Progress:
    """A bar over all steps, on standard error or in a notebook's cell, and above it a line for each epoch that ended.

    Args:
        history: of the training, as it grows.
        steps: that the training takes.
        done: steps that are done already.
        quiet: show nothing.
    """

    def __init__(self, history: History, steps: int, done: int, quiet: bool):
        self._history, self._quiet = history, quiet
        self._bar = tqdm(total=steps, initial=done, leave=False, disable=quiet)
        self._next: OnTheWay | None = None  # the mean loss of a step that an accelerator may not have done yet

    def step(self, loss: torch.Tensor, seen: int) -> None:
        """Another step.

        Args:
            loss: (), summed over the images of this epoch so far.
            seen: these images.
        """
        if self._quiet:
            return
        self._next = self._next or OnTheWay(loss.detach() / max(seen, 1))
        if (mean := self._next.get()) is not None:
            shown = f"epoch {len(self._history) + 1}/{self._history.epochs} loss {mean.item():.2f}"
            self._bar.set_description(shown + measured(self._history), refresh=False)
            self._next = None
        self._bar.update()

    def epoch(self) -> None:
        """An epoch has ended, the last one of the history."""
        if not self._quiet:
            self._bar.write(epoch_line(self._history), file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


def epoch_line(history: History) -> str:
    """The last epoch, such as "epoch 12/30 loss 1.83 val 36.1 % (zero-shot 10.6)"."""
    row = history[-1]
    shown = measured(history) or f" train {row['accuracy']:.1f} %"
    return f"epoch {row['epoch']}/{history.epochs} loss {row['loss']:.2f}{shown}"


def measured(history: History) -> str:
    """What validation found last, beside zero-shot, after a space; empty where nothing was measured."""
    if (name := history.measure) is None:
        return ""
    beside = "" if history.zero_shot is None else f" (zero-shot {history.zero_shot:.1f})"
    return f" {MEASURES[name]} {history[-1][name]:.1f} %{beside}"
