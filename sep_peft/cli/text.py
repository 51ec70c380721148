"""What commands print: one line a result, or JSON, neither of which acts on a terminal."""

from __future__ import annotations

import json
import re
from typing import Any

from ..tuner.messages import acts, one_line, printable


__all__ = ["json_text", "one_line", "printable"]


def json_text(data: Any, encoding: str = "utf-8") -> str:
    r"""Indented JSON that can be read by people.

    Characters that act on a terminal, or that `encoding` does not have, are written as ``\uXXXX``.
    """

    def written(found: re.Match) -> str:
        shown = not acts(found[0]) and found[0].encode(encoding, "ignore")
        return found[0] if shown else json.dumps(found[0])[1:-1]

    return re.sub(r"[^\n -~]", written, json.dumps(data, indent=1, ensure_ascii=False))
