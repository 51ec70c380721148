"""``sep-peft search``: finds images by an image or a text."""

from __future__ import annotations

import os
from pathlib import Path

from ..classifier.image_index import ImageIndex
from ..classifier.images import other_endings, warn_left_out
from .session import AdapterSource, Result, Session, listed, load_adapter, warn_unreadable


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

    Raises:
        FileNotFoundError: there is no such adapter.
        NotADirectoryError: there is no such folder.
        ValueError: it holds no image that can be read, the image cannot be read, or the text does not fit.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}.")
    adapter = load_adapter(source, base_model, session)
    warn_left_out(folder, other_endings(folder))
    shown = os.path.exists(query) or query.startswith(("http://", "https://"))
    embed = adapter.embed(query) if shown else adapter.embed_texts(query)
    found = ImageIndex.of_folder(
        folder,
        adapter.model,
        adapter.processor,
        file=index,
        batch_size=batch_size,
        progress=session.progress("batches"),
    )
    warn_unreadable(found.unreadable)
    best = [{"image": str(folder / name), "similarity": cosine} for name, cosine in found.search(embed, top_k)]
    data = {
        "query": {"image" if shown else "text": query},
        "found": best,
        "images": len(found.names),
        "embedded": found.embedded,
        "unreadable": listed({folder / name: error for name, error in found.unreadable.items()}),
    }
    lines = [f"{entry['similarity']:.3f} {entry['image']}" for entry in best]
    return Result(data, lines, code=1 if found.unreadable else 0)
