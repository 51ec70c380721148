"""`History`: what a training did in each epoch, and why it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from ..words import counted


#: What may be measured on images to validate on after an epoch, in percent -> how people call it.
MEASURES = {"val_accuracy": "val", "val_recall": "val recall", "val_map": "val mAP"}


@dataclass
class History:
    """The epochs of a training; like a list of their rows to read.

    Args:
        epochs: that the recipe takes.
        rows: for each epoch that ended a dict: its number from 1 as "epoch", mean "loss", "accuracy" on the augmented
            training images in percent, the learning rate after it as "lr"; and where images to validate on were given
            "val_accuracy" in percent, "val_recall" of images with captions, or the mean average precision "val_map"
            where an image may have several classes, of which "accuracy" then counts the best; see `MEASURES`.
        zero_shot: the same of the base model; None: not measured.
        stopped: why the training ended before its last epoch: "time", "patience", "Ctrl-C", "SIGTERM", or what a
            callback said to `stop`; None: it did not.
        seconds: that each epoch took, validation included. They do not count when histories are compared.
    """

    epochs: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    zero_shot: float | None = None
    stopped: str | None = None
    seconds: list[float] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def best(self) -> int | None:
        """Number from 1 of the epoch with the highest of `MEASURES`, the last of equals, whose learning rate was the
        lowest; None without images to validate on."""
        found = self.measured
        return len(found) - found[::-1].index(max(found)) if found else None

    @property
    def without_progress(self) -> int:
        """Epochs at the end in which the measure did not rise above all before; 0 without images to validate on."""
        found = self.measured
        return len(found) - 1 - found.index(max(found)) if found else 0

    @property
    def measure(self) -> str | None:
        """Which of `MEASURES` the last epoch has; None without images to validate on."""
        return next((name for name in MEASURES if self.rows and name in self.rows[-1]), None)

    @property
    def measured(self) -> list[float]:
        """That measure of every epoch; empty without images to validate on."""
        name = self.measure
        return [] if name is None else [row[name] for row in self.rows if name in row]

    def stop(self, reason: str) -> None:
        """End the training after this epoch; for callbacks.

        Args:
            reason: for `stopped`.
        """
        self.stopped = reason

    def __str__(self) -> str:
        """How far it came, such as "after 12 of 30 epochs"."""
        return f"after {len(self)} of {counted(self.epochs, 'epoch')}"

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> History:
        """What `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(data, dict) or set(data) != {"epochs", "rows", "zero_shot", "stopped", "seconds"}:
            raise ValueError("its history is incomplete")
        history = cls(**data)
        rows, seconds = history.rows, history.seconds
        if not isinstance(rows, list) or not isinstance(seconds, list) or len(rows) != len(seconds):
            raise ValueError("its history is incomplete")
        for number, row in enumerate(rows, 1):
            names = {"epoch", "loss", "accuracy", "lr"}
            if not isinstance(row, dict) or not names <= set(row) or row["epoch"] != number:
                raise ValueError(f"epoch {number} of its history is incomplete")
        numbers = [value for row in rows for value in row.values()] + seconds
        if history.zero_shot is not None:
            numbers.append(history.zero_shot)
        if not all(isinstance(value, Real) and not isinstance(value, bool) for value in [*numbers, history.epochs]):
            raise ValueError("its history holds something else than numbers")
        return history


class TrainingInterrupted(KeyboardInterrupt):
    """Training was ended by Ctrl-C or SIGTERM; the classifier is as the epochs that ended left it.

    Args:
        history: of these epochs; its `stopped` names the signal.
        missing: what is fitted after the last epoch, and was not, such as "calibration".
        remedy: how to get it, for the message.
    """

    def __init__(self, history: History, missing: Sequence[str] = (), remedy: str = ""):
        self.history, self.missing = history, tuple(missing)
        lacks = " and ".join(f"no {name}" for name in missing)
        rest = f"; there is {lacks}, which comes after the last epoch. {remedy}" if missing else ""
        super().__init__(f"{self.ended}{rest}")

    @property
    def ended(self) -> str:
        """Why and when, such as "stopped by Ctrl-C after 12 of 30 epochs"."""
        return f"stopped by {self.history.stopped} {self.history}"
