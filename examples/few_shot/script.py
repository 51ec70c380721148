"""How these scripts end: a mistake is one line, as that of the command line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_as_script(main: Callable[[], None]) -> None:
    """Call `main`; an error is one line on standard error and exit code 1. `--debug` shows where it was raised."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        main()
    except Exception as error:  # a user's mistakes come as errors of many libraries
        from sep_peft.tuner.messages import one_line  # which loads all that summarize.py does without

        if debug:
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: error: {one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(1) from None
