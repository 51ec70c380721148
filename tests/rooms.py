"""The list of rooms and files in docs/architecture.md, made from the first sentence of each file.

python tests/rooms.py     # writes it there
"""

from __future__ import annotations

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "architecture.md"
START, END = "<!-- rooms -->\n", "<!-- end of rooms -->"
ORDER = ("cli", "training", "classifier", "tuner", "method", "families")


def first_sentence(file: Path) -> str:
    paragraph = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[A-Z])", paragraph)[0]


def render() -> str:
    """For each room what it is for, and its files."""
    lines = []
    for room in ORDER:
        folder = ROOT / "sep_peft" / room
        lines += [f"## {room}", "", first_sentence(folder / "__init__.py"), "", "| file | |", "|---|---|"]
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        lines += [f"| `{path.stem}` | {first_sentence(path)} |" for path in files] + [""]
    return "\n".join(lines)


def replace_in(text: str) -> str:
    """The document with the present rooms."""
    head, rest = text.split(START)
    return head + START + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOC.write_text(replace_in(DOC.read_text()))
