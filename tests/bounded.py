"""How much memory and time refused loads take: a script that forks a process for each, so that none has the other's.

Reads a list of [way, folder] in JSON from the file it is given, and prints for each a line [MiB, seconds, error].
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

from small_classifier import CLASSES, TEMPLATES, make_model

from sep_peft import SEPClassifier
from sep_peft.cli.info import info
from sep_peft.cli.session import AdapterSource, Session


#: Address space beyond which a process gets no memory, in bytes, so that a mistake cannot stop the machine.
SPACE = 2**36


def main() -> None:
    warnings.simplefilter("ignore")
    classifier = SEPClassifier(make_model(), CLASSES, TEMPLATES, prototype_weight=0).eval()
    for way, folder in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            measure(classifier, way, Path(folder))
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, (way, folder)


def measure(classifier: SEPClassifier, way: str, folder: Path) -> None:
    """Print what a load took beyond what the process had: MiB, seconds of the CPU, and the error."""
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    before, start, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), None
    try:
        if way == "load":
            classifier.load_task(folder, "new")
        else:
            info(AdapterSource(str(folder)), Session())
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # KiB on Linux
    print(json.dumps([taken, seconds, message]))


if __name__ == "__main__":
    main()
