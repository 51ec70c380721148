"""Pages of images in a folder: what a search found, and what is nearly the same; each one HTML file with all in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..classifier.images import read_image
from ..classifier.near_duplicates import Group
from .report import file_name, write_page
from .thumbnails import thumbnail


SEARCH_TEMPLATE, DUPLICATES_TEMPLATE = "search_template.html", "duplicates_template.html"
#: Groups of near duplicates that are shown, and images of each.
SHOWN_GROUPS, SHOWN_MEMBERS = 100, 12


@dataclass(frozen=True)
class Shown:
    """An image in a page.

    Args:
        uri: its data; None: it cannot be read any more.
        name: of its file below the folder.
        similarity: cosine to the query, or to the most similar image of its group.
        size: such as "640 x 480, 82 kB"; empty where it cannot be read.
    """

    uri: str | None
    name: str
    similarity: float
    size: str


def write_search_page(
    path: str | os.PathLike,
    query: str | Image.Image,
    folder: str | os.PathLike,
    found: Mapping[str, Sequence[tuple[str, float]]],
    *,
    name: str = "",
    images: int,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an HTML file with the images that a search found: no scripts, nothing from elsewhere.

    Args:
        path: of the file; its folder is made where it is missing.
        query: the text or the image that was searched by.
        folder: that was searched.
        found: what searched, such as "with SEP" -> names below the folder with their cosines, the most similar first.
            Of several, each image says its place among what the first of the others found.
        name: path or address of the image that was searched by; empty: not known.
        images: how many were searched.
        facts: as for `write_report`.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    title = query if isinstance(query, str) else file_name(name) or "An image"
    places = {who: {each: place for place, (each, _) in enumerate(hits, 1)} for who, hits in found.items()}
    seen: dict[str, Shown] = {}
    for hits in found.values():
        for each, cosine in hits:
            if each not in seen:
                seen[each] = _shown(Path(folder), each, cosine)
    page = {
        "title": title,
        "query": None if isinstance(query, str) else thumbnail(query),
        "images": images,
        "found": {
            who: [replace(seen[each], similarity=cosine) for each, cosine in hits] for who, hits in found.items()
        },
        "others": {who: next((other for other in found if other != who), None) for who in found},
        "places": places,
        "facts": facts or {},
    }
    write_page(path, SEARCH_TEMPLATE, page)


def write_duplicates_page(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    names: Sequence[str],
    found: Sequence[Group],
    least: float,
    *,
    measured: bool,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an HTML file with groups of images that are nearly the same, the first 100 and of each 12 images.

    Args:
        path, facts: as for `write_search_page`.
        folder: that the images are in.
        names: of all that were compared, below the folder.
        found: groups of them, by their indices.
        least: cosine from which on two count as nearly the same.
        measured: whether `copy_similarity` says so; else it was given.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    shown = [
        [_shown(Path(folder), names[place], cosine) for place, cosine in zip(*group, strict=True)][:SHOWN_MEMBERS]
        for group in (Group(g.places[:SHOWN_MEMBERS], g.similarities[:SHOWN_MEMBERS]) for g in found[:SHOWN_GROUPS])
    ]
    page = {
        "title": "Near duplicates",
        "images": len(names),
        "groups": list(zip(shown, [len(group.places) for group in found], strict=False)),
        "count": len(found),
        "alike": sum(len(group.places) for group in found),
        "least": least,
        "measured": measured,
        "facts": facts or {},
    }
    write_page(path, DUPLICATES_TEMPLATE, page)


def _shown(folder: Path, name: str, similarity: float) -> Shown:
    try:
        image = read_image(folder / name)
        size = f"{image.width} × {image.height}, {_bytes((folder / name).stat().st_size)}"
        return Shown(thumbnail(image), name, similarity, size)
    except (ValueError, FileNotFoundError):  # it was there when it was embedded
        return Shown(None, name, similarity, "")


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(1, round(count / 1e3))} kB"
