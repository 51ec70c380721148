"""What commands print: one line a result, or JSON, neither of which acts on a terminal."""

from __future__ import annotations

import json
import re
from typing import Any

from ..tuner.messages import acts, one_line, printable


__all__ = ["json_text", "one_line", "printable"]


def json_text(data: Any) -> str:
    r"""Indented JSON that can be read by people; characters that act on a terminal are written as ``\uXXXX``."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda found: json.dumps(found[0])[1:-1] if acts(found[0]) else found[0], text)
