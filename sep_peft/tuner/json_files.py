"""JSON from strangers: read within bounds of size and depth, and refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from .messages import shown


#: Largest configuration of an adapter, in bytes; one of ours has about a thousand.
MAX_CONFIG_BYTES = 2**20
#: Deepest nesting of lists and objects; our own files have four levels.
MAX_DEPTH = 20
#: Most lists and objects of a file. Python needs 64 bytes for each, while two characters make one.
MAX_CONTAINERS = 2**19


class JSONFileError(ValueError):
    """A JSON file is damaged, or larger or deeper than any of ours."""


def read_json(path: str | os.PathLike, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Size and containers are counted before anything is parsed, so that a file never takes much more memory than its own
    size.

    Args:
        path: of the file.
        max_bytes: a larger file is not read.

    Raises:
        JSONFileError: the file is too large, no UTF-8, no JSON, no object, nested too deeply, or an object of it has a
            key twice; the message names the file.
    """
    file = os.fspath(path)
    if (size := os.path.getsize(file)) > max_bytes:
        raise JSONFileError(f"{file} has {size} bytes, but at most {max_bytes} are read.")
    with open(file, "rb") as stream:
        text = stream.read()
    containers = text.count(b"[") + text.count(b"{")
    if containers > MAX_CONTAINERS:
        raise JSONFileError(f"{file} holds {containers} lists and objects, but at most {MAX_CONTAINERS} are read.")
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refused)
        _check_depth(data)
    except (ValueError, RecursionError) as error:
        reason = f"it is nested more than {MAX_DEPTH} deep" if isinstance(error, RecursionError) else error
        raise JSONFileError(f"{file} is no valid JSON ({reason}). Copy or download it again.") from error
    if not isinstance(data, dict):
        raise JSONFileError(f"{file} must hold a JSON object, but holds {shown(data)}.")
    return data


def write_json(data: dict[str, Any], path: str | os.PathLike) -> None:
    """Write an object that `check_json` lets through."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(_text(data))


def check_json(data: dict[str, Any], name: str, max_bytes: int = MAX_CONFIG_BYTES) -> None:
    """Make sure that `read_json` will read what `write_json` writes.

    Args:
        data: to be written.
        name: of the file, for the message.
        max_bytes: as for `read_json`.

    Raises:
        JSONFileError: the file would be too large, or hold too many lists and objects.
    """
    text = _text(data)
    if len(text) > max_bytes:  # of ASCII
        raise JSONFileError(
            f"{name} would have {len(text)} bytes, but at most {max_bytes} are read, so it is not written. Leave out "
            "some of what it lists."
        )
    containers = text.count("[") + text.count("{")
    if containers > MAX_CONTAINERS:
        raise JSONFileError(
            f"{name} would hold {containers} lists and objects, but at most {MAX_CONTAINERS} are read, so it is not "
            "written. Leave out some of what it lists."
        )


def _text(data: dict[str, Any]) -> str:
    """The JSON that is written, in ASCII."""
    return json.dumps(data, indent=1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; JSON does not say which of two counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        found[key] = value
    return found


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [value for container in level for value in _values(container) if isinstance(value, (list, dict))]
        if not level:
            return
    raise RecursionError


def _values(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container if isinstance(container, list) else ())
