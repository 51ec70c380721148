"""Ctrl-C and SIGTERM end a training at once, but never between changes that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


#: Signal -> what people call it.
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Signals:
    """While it is entered, in the main thread, Ctrl-C and SIGTERM raise KeyboardInterrupt; elsewhere nothing changes.

    A signal that the process ignores, as a job in the background ignores Ctrl-C, stays ignored.

    Attributes:
        received: name of the first signal that came; "Ctrl-C" before.
    """

    def __init__(self):
        self.received = NAMES[signal.SIGINT]
        self._waiting = self._held = False
        self._before: dict[int, Any] = {}  # what getsignal gave

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        again, self._waiting = self._waiting, True
        if not again:
            self.received = NAMES[signal.Signals(number)]
        if not self._held or again:  # whoever asks twice does not wait
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is done here is done whole: a signal waits for its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            raise KeyboardInterrupt
