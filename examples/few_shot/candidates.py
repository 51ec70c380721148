"""Candidates of methods: changes of recipe and config that are tried in tuning, of every method as many.

A file of candidates is a JSON list; `{}` is the method as it is:

    [{}, {"recipe": {"learning_rate": 0.01}}, {"recipe": {"epochs": 20}, "config": {"num_text_prompts": 4}}]
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from methods import PARTS, SHIPPED, Method, read_method


#: The candidates that come with these scripts.
TUNING = SHIPPED.with_name("tuning")
#: Bytes of a title; most file systems allow 255 in a name.
LONGEST = 240


class Candidate(NamedTuple):
    """A method with one of its changes, and a folder name that says which."""

    title: str
    method: Method


def read_candidates(method: Path) -> list[Candidate]:
    """The candidates of a method's file: from a file of its name in a folder `tuning` beside it, or in that of these
    scripts.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it lists no candidates, one twice, or one that changes what the method does not have.
    """
    file = next((f / method.name for f in (method.parent / "tuning", TUNING) if (f / method.name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{method} has no candidates: there is no {method.name} in {method.parent / 'tuning'} or {TUNING}."
        )
    changes = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(changes, list) or not changes or not all(is_change(entry) for entry in changes):
        raise ValueError(f'{file} must be a list of candidates such as {{"recipe": {{"epochs": 20}}}} or {{}}.')
    found: list[Candidate] = []
    for number, entry in enumerate(changes, start=1):
        try:
            candidate = Candidate(title(entry), read_method(method, entry))
        except ValueError as error:
            raise ValueError(f"{file}, candidate {number}: {error}") from error
        if candidate.title in [other.title for other in found]:
            raise ValueError(f"{file} lists {candidate.title} twice.")
        found.append(candidate)
    return found


def equally_many(candidates: dict[str, list[Candidate]], budget: int | None) -> dict[str, list[Candidate]]:
    """The first candidates of every method.

    Args:
        candidates: by method.
        budget: how many at most; None: all.

    Raises:
        ValueError: a method has fewer than another.
    """
    chosen = {name: own[:budget] for name, own in candidates.items()}
    counts = {name: len(own) for name, own in chosen.items()}
    if (fewest := min(counts.values())) < max(counts.values()):
        fewer = ", ".join(f"{name} has {count}" for name, count in counts.items() if count == fewest)
        more = ", ".join(f"{name} {count}" for name, count in counts.items() if count > fewest)
        raise ValueError(
            f"Methods are tuned with as many candidates each, but {fewer} and {more}. Write more, or give --budget "
            f"{fewest}."
        )
    return chosen


def is_change(entry: Any) -> bool:
    """Whether it changes nothing but recipe and config."""
    return isinstance(entry, dict) and set(entry) <= set(PARTS) and all(isinstance(e, dict) for e in entry.values())


def title(changes: dict[str, dict[str, Any]]) -> str:
    """A folder name that says what changed; one that is too long for a file system ends in a checksum."""
    parts = [f"{key}={value}" for part in changes.values() for key, value in part.items()]
    name = ",".join(parts).replace(" ", "").replace("/", "-") or "unchanged"
    return name if len(name.encode()) <= LONGEST else f"{name[: LONGEST // 2]}-{zlib.crc32(name.encode()):08x}"
