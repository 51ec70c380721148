"""Text and values from outside in messages: what acts on a terminal is escaped, and what is long is cut short.

A terminal obeys what it is sent: a file name with an escape sequence could clear the screen or forge a line of output.
"""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any


#: Categories of Unicode that act on a terminal or cannot be encoded: controls, formats such as those that turn the
#: direction of writing, lone surrogates (file names that are no UTF-8), line and paragraph separators.
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
#: Formats that Persian, Indic scripts and emoji are spelled with, and that do nothing else.
JOINERS = "\u200c\u200d"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 20
#: Items that a message lists.
LISTED = 20


def shown(value: Any) -> str:
    """`repr` without more than 200 characters of a text, 60 digits of an integer or 20 items of a list or dict."""
    return _REPR.repr(value)


def listed(values: Iterable[Any]) -> str:
    """Values after each other, 20 at most, such as "'a', 'b' and 3 more"."""
    values = list(values)
    rest = len(values) - LISTED
    return ", ".join(map(shown, values[:LISTED])) + (f" and {rest} more" if rest > 0 else "")


def printable(text: str) -> str:
    """One line that does nothing but show itself: characters that act become escapes, as in a Python string."""
    return "".join(_escape(character) if acts(character) else character for character in text)


def one_line(text: str) -> str:
    """The same of a text of several lines, such as an error's, whose lines are joined by spaces."""
    return printable(" ".join(text.split()))


def drawn(text: str, letters: int = 24) -> str:
    """A name in a drawing: one line of so many letters, without the dollars between which matplotlib reads formulas."""
    text = printable(" ".join(text.replace("_", " ").split()))
    return (text if len(text) <= letters else text[: letters - 1] + "…").replace("$", r"\$")


def acts(character: str) -> bool:
    """Whether a terminal would obey it in the place of showing it."""
    return unicodedata.category(character) in ACTING and character not in JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
