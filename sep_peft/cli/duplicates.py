"""``sep-peft duplicates``: finds images in a folder that are nearly the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..classifier.embeddings import embed_images
from ..classifier.image_index import of_base
from ..classifier.images import other_endings, warn_left_out
from ..classifier.near_duplicates import copy_similarity, groups
from ..training.image_pages import write_duplicates_page
from ..tuner.mixed_batch import BASE
from ..words import counted
from .folder_index import counts_of, facts_of, open_index
from .saving import check_file
from .session import AdapterSource, Result, Session, load_adapter, warn_unreadable


def duplicates(
    source: AdapterSource,
    folder: Path,
    session: Session,
    *,
    base_model: str | None = None,
    threshold: float | None = None,
    index: Path | None = None,
    batch_size: int = 32,
    page: Path | None = None,
    command: str | None = None,
) -> Result:
    """Find groups of images that are nearly the same, by the embeddings of the base model.

    Args:
        source: of the adapter, which names the base model.
        folder: images in it and below are compared.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        threshold: cosine from which on two images count; None: as `copy_similarity` measures it on these images.
        index: file that keeps the embeddings; None: one in the cache; both are those of ``search --compare-base``.
        batch_size: images embedded at a time.
        page: HTML file to write; see `write_duplicates_page`; None: none.
        command: that was given, for the page; None: not known.

    Raises:
        FileNotFoundError: there is no such adapter.
        IsADirectoryError: `page` or `index` is a folder.
        NotADirectoryError: there is no such folder.
        OSError: `page` or `index` cannot be written.
        ValueError: `threshold` is no cosine above 0, or the folder holds no image that can be read.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}.")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"--threshold must be above 0 and at most 1, a cosine, but got {threshold:g}.")
    if page is not None:
        check_file(page, "--page")
    adapter = load_adapter(source, base_model, session)
    warn_left_out(folder, other_endings(folder))
    embed = partial(embed_images, adapter.model, adapter.processor, batch_size=batch_size, adapter=BASE)
    found = open_index(folder, adapter, session, of_base(folder, index), batch_size, BASE)
    warn_unreadable(found.unreadable)
    paths = [folder / name for name in found.names]
    least = copy_similarity(paths, found.embeds, embed) if threshold is None else threshold
    same = groups(found.embeds, least, session.progress("comparing"))
    data = {
        "groups": [
            [{"image": str(paths[place]), "similarity": cosine} for place, cosine in zip(*group, strict=True)]
            for group in same
        ],
        "threshold": least,
        **counts_of(found),
    }
    lines = []
    for group in same:
        lines += [f"{cosine:.3f} {paths[place]}" for place, cosine in zip(*group, strict=True)]
        lines.append("")
    alike = sum(len(group.places) for group in same)
    lines.append(
        f"{alike} of {counted(len(paths), 'image')} in {counted(len(same), 'group')}, from a cosine of {least:.3f} on"
    )
    result = Result(data, lines, code=1 if found.unreadable else 0)
    if page is None:
        return result
    facts = facts_of(command, source, folder)
    write_duplicates_page(page, folder, found.names, same, least, measured=threshold is None, facts=facts)
    return result.with_file("page", page)
