"""``python -m sep_peft``: the same as the command ``sep-peft``."""

import sys

from .cli.app import main


if __name__ == "__main__":
    sys.exit(main())
