"""Text from outside, such as labels, file names and errors, made fit for a terminal.

A terminal obeys what it is sent: a file name with an escape sequence could clear the screen or forge a line of output.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any


#: Categories of Unicode that act on a terminal or cannot be encoded: controls, formats such as those that turn the
#: direction of writing, lone surrogates (file names that are no UTF-8), line and paragraph separators.
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
#: Formats that Persian, Indic scripts and emoji are spelled with, and that do nothing else.
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """One line that does nothing but show itself: characters that act become escapes, as in a Python string."""
    return "".join(_escape(character) if _acts(character) else character for character in text)


def one_line(text: str) -> str:
    """The same of a text of several lines, such as an error's, whose lines are joined by spaces."""
    return printable(" ".join(text.split()))


def json_text(data: Any) -> str:
    r"""Indented JSON that can be read by people; characters that act on a terminal are written as ``\uXXXX``."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda found: json.dumps(found[0])[1:-1] if _acts(found[0]) else found[0], text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ACTING and character not in JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
