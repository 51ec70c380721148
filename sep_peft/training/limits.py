"""When a training ends before its recipe does, and whose weights it keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .history import History


@dataclass(frozen=True)
class Limits:
    """When a training ends before its recipe does, and whose weights it keeps.

    Args:
        seconds: no epoch begins that would not end within them, by the mean of the epochs before; the first one always
            does. None: as long as it takes.
        patience: epochs that may pass without a better measure, one of `MEASURES`; None: any number.
        keep: "best": the weights of the epoch with the highest measure, where there is one; or "last".

    Raises:
        ValueError: a value is not allowed.
    """

    seconds: float | None = None
    patience: int | None = None
    keep: Literal["best", "last"] = "best"

    def __post_init__(self):
        seconds, patience = self.seconds, self.patience
        if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
            raise ValueError(f"max_seconds must be None or a finite number above 0, but got {seconds!r}.")
        if patience is not None and not (type(patience) is int and patience >= 1):
            raise ValueError(f"patience must be None or an integer of at least 1, but got {patience!r}.")
        if self.keep not in ("best", "last"):
            raise ValueError(f'keep must be "best" or "last", but got {self.keep!r}.')

    def done(self, history: History) -> bool:
        """Whether nothing is left to train, however often it is gone on with."""
        return len(history) >= history.epochs or self._out_of_patience(history)

    def reason(self, history: History, passed: float, epochs: int) -> str | None:
        """Why a training ends now, before its recipe does; None: it does not.

        Args:
            history: of all epochs.
            passed: seconds since this call began.
            epochs: that ended in this call.
        """
        if len(history) >= history.epochs:
            return None
        if self._out_of_patience(history):
            return "patience"
        late = self.seconds is not None and passed + passed / epochs > self.seconds
        return "time" if late else None

    def _out_of_patience(self, history: History) -> bool:
        return self.patience is not None and history.without_progress >= self.patience
