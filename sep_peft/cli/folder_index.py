"""The index of a folder's images, as commands open it and tell of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..classifier.adapter import Adapter
from ..classifier.image_index import ImageIndex
from .session import AdapterSource, Session, listed


def open_index(
    folder: Path, adapter: Adapter, session: Session, file: Path | None, batch_size: int, by: str | None = None
) -> ImageIndex:
    """The index of a folder, in which what is new is embedded.

    Args:
        folder: images in it and below.
        adapter: whose model and processor embed.
        session: how to work.
        file: that keeps the embeddings; None: one in the cache.
        batch_size: images embedded at a time.
        by: name of the model's adapter that embeds; None: the active one.

    Raises:
        as `ImageIndex.of_folder`.
    """
    progress = session.progress("batches")
    options: dict[str, Any] = {"file": file, "adapter": by, "batch_size": batch_size, "progress": progress}
    return ImageIndex.of_folder(folder, adapter.model, adapter.processor, **options)


def unreadable_in(folder: Path, found: dict[str, str]) -> list[dict[str, str]]:
    """What JSON says of an index's images that cannot be read."""
    return listed({folder / name: error for name, error in found.items()})


def counts_of(index: ImageIndex) -> dict[str, Any]:
    """What JSON says of an index: images that are compared, how many were embedded now, and those left out."""
    return {
        "images": len(index.names),
        "embedded": index.embedded,
        "unreadable": unreadable_in(index.folder, index.unreadable),
    }


def facts_of(command: str | None, source: AdapterSource, folder: Path) -> dict[str, Any]:
    """How a page of a folder was made."""
    return {"command": command, "adapter": source.name, "folder": str(folder.resolve())}
