"""`RunLog`: what a training leaves beside its adapter while it runs, its settings and a log of its epochs."""

from __future__ import annotations

import csv
import json
import os
import platform
import warnings
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ..classifier.card import package_versions
from ..tuner.files import replace_files
from .history import History


#: Folder below that of the adapter, and what lies in it.
RUN_FOLDER = "run"
SETTINGS_FILE, LOG_FILE, CURVES_FILE, REPORT_FILE = "settings.json", "log.csv", "curves.png", "report.html"


class RunLog:
    """Writes the settings and the log of a training after every epoch; a callback of `fit`, which makes one.

    The log is a table with a row for each epoch: what `History` has of it, and its seconds. What cannot be written,
    because a disk is full for example, is warned of, and training goes on.

    Args:
        folder: of the adapter; the files lie in `RUN_FOLDER` below it.
        settings: of the training, as JSON knows them; versions are added.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]):
        self._folder = Path(folder, RUN_FOLDER)
        versions = package_versions() | {"python": platform.python_version(), "system": platform.platform()}
        self._settings = {**settings, "versions": versions}
        self._begun = False

    def __call__(self, history: History) -> None:
        try:
            with replace_files(self._folder) as temporary:
                Path(temporary, SETTINGS_FILE).write_text(json.dumps(self._settings, indent=1), encoding="utf-8")
                Path(temporary, LOG_FILE).write_text(log_of(history), encoding="utf-8")
            if not self._begun:  # of an earlier training
                for name in (CURVES_FILE, REPORT_FILE):
                    (self._folder / name).unlink(missing_ok=True)
            self._begun = True
        except OSError as error:
            warnings.warn(f"No log could be written {history} ({error}); training goes on.", stacklevel=2)


def log_of(history: History) -> str:
    """A history as CSV, with a line of names."""
    rows = [row | {"seconds": seconds} for row, seconds in zip(history, history.seconds, strict=True)]
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    return file.getvalue()
