"""How much memory and time a refused load takes; a module of its own, because every load runs in a new process."""

from __future__ import annotations

import json
import resource
import time
import warnings
from pathlib import Path

from small_classifier import CLASSES, TEMPLATES, make_model

from sep_peft import SEPClassifier
from sep_peft.cli.commands import AdapterSource, Session, info


warnings.simplefilter("ignore")
#: Address space beyond which the process gets no memory, in bytes, so that a mistake cannot stop the machine.
SPACE = 2**36
CLASSIFIER = SEPClassifier(make_model(), CLASSES, TEMPLATES, prototype_weight=0).eval()


def load(folder: Path) -> None:
    CLASSIFIER.load_task(folder, "new")


def tell(folder: Path) -> None:
    info(AdapterSource(str(folder)), Session())


def measure(way: str, folder: str) -> None:
    """Print as JSON what the load took beyond what the process had: MiB, seconds of the CPU, and the error."""
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    before, start, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), None
    try:
        {"load": load, "tell": tell}[way](Path(folder))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # KiB on Linux
    print(json.dumps([taken, seconds, message]))
