"""``sep-peft search``: finds images by an image or a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..classifier.adapter import Adapter
from ..classifier.embeddings import embed_images, embed_texts
from ..classifier.image_index import ImageIndex, of_base
from ..classifier.images import ENDINGS, other_endings, read_image, warn_left_out
from ..training.image_pages import write_search_page
from ..tuner.messages import shown
from ..tuner.mixed_batch import BASE
from .folder_index import counts_of, facts_of, open_index
from .saving import check_file
from .session import AdapterSource, Result, Session, load_adapter, warn_unreadable


#: Who searched, in pages and lines.
SEP, BASE_MODEL = "with SEP", "by the base model"


def search(
    source: AdapterSource,
    folder: Path,
    query: str,
    session: Session,
    *,
    base_model: str | None = None,
    top_k: int = 10,
    index: Path | None = None,
    batch_size: int = 32,
    compare_base: bool = False,
    page: Path | None = None,
    command: str | None = None,
) -> Result:
    """Find the images in a folder that are most similar to an image or a text.

    Args:
        source: of the adapter.
        folder: images in it and below are searched.
        query: a file, an address of an image, or a text.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        top_k: images to name.
        index: file that keeps the embeddings; None: one in the cache.
        batch_size: images embedded at a time.
        compare_base: search by the base model alone as well, whose embeddings are kept in a file of their own.
        page: HTML file to write; see `write_search_page`; None: none.
        command: that was given, for the page; None: not known.

    Raises:
        FileNotFoundError: there is no such adapter, or no such image to search by.
        IsADirectoryError: `page` or `index` is a folder.
        NotADirectoryError: there is no such folder.
        OSError: `page` or `index` cannot be written.
        ValueError: it holds no image that can be read, the image cannot be read, or the text does not fit.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}.")
    if page is not None:
        check_file(page, "--page")
    given = read_image(query) if is_image_query(query) else query
    adapter = load_adapter(source, base_model, session)
    warn_left_out(folder, other_endings(folder))
    asked = {SEP: embed_query(adapter, given)}
    if compare_base:
        asked[BASE_MODEL] = embed_query(adapter, given, BASE)
    found = {SEP: open_index(folder, adapter, session, index, batch_size)}
    warn_unreadable(found[SEP].unreadable)
    if compare_base:
        found[BASE_MODEL] = open_index(folder, adapter, session, of_base(folder, index), batch_size, BASE)
    white = {SEP: adapter.whitening if isinstance(given, Image.Image) else None}  # texts have none
    hits = {who: each.search(asked[who], top_k, white.get(who)) for who, each in found.items()}
    data = _data(found, hits, query, isinstance(given, Image.Image), folder)
    result = Result(data, _lines(hits, folder), code=1 if found[SEP].unreadable else 0)
    if page is None:
        return result
    facts, count = facts_of(command, source, folder), len(found[SEP].names)
    write_search_page(page, given, folder, hits, name=query, images=count, facts=facts)
    return result.with_file("page", page)


def is_image_query(query: str) -> bool:
    """Whether a query is meant as an image: it is an address or a file, or has the ending or the path of one.

    Raises:
        FileNotFoundError: it has the ending of an image, and there is no such file.
    """
    if query.startswith(("http://", "https://")) or os.path.isfile(query):
        return True
    if Path(query).suffix.lower() in ENDINGS:
        raise FileNotFoundError(f"There is no image {shown(query)}. Pass a file that is there, or a text.")
    return os.sep in query and os.path.exists(query)  # a folder that is called like a text is none to search by


def embed_query(adapter: Adapter, query: str | Image.Image, by: str | None = None) -> torch.Tensor:
    """(E,) of a text or an image, by the adapter of this name; None: the active one."""
    model, processor = adapter.model, adapter.processor
    if isinstance(query, str):
        return embed_texts(model, processor, [query], by)[0]
    return embed_images(model, processor, [query], 1, by)[0]


def _data(
    found: dict[str, ImageIndex], hits: dict[str, list[tuple[str, float]]], query: str, is_image: bool, folder: Path
) -> dict[str, Any]:
    entries = {
        who: [{"image": str(folder / name), "similarity": cosine} for name, cosine in each]
        for who, each in hits.items()
    }
    data = {
        "query": {"image" if is_image else "text": query},
        "found": entries[SEP],
        **counts_of(found[SEP]),
    }
    return data | ({"found_by_base_model": entries[BASE_MODEL]} if BASE_MODEL in entries else {})


def _lines(hits: dict[str, list[tuple[str, float]]], folder: Path) -> list[str]:
    """One for each image; where the base model searched as well, below a line that says who did."""
    lines = []
    for who, each in hits.items():
        lines += [f"{who}:"] if len(hits) > 1 else []
        lines += [f"{cosine:.3f} {folder / name}" for name, cosine in each]
    return lines
