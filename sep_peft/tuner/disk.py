"""Folders to save into: tried before long work begins, and a full disk is called a full disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


#: What the system answers where a disk, or a user's share of it, is full.
FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskFullError(OSError):
    """A disk has no room for what is to be saved."""


@contextmanager
def full_disk_named(folder: str | os.PathLike) -> Iterator[None]:
    """Errors of writing into a folder, where its disk is full, say so.

    Raises:
        DiskFullError: in the place of the error that the system or safetensors raises.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, DiskFullError) or _number(error) not in FULL:
            raise
        raise DiskFullError(
            f"The disk is full, so nothing could be saved in {os.fspath(folder)}. Make room, or choose a folder on "
            "another disk."
        ) from error


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors writes it into the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def try_folder(folder: str | os.PathLike, needed: int = 0) -> None:
    """Find out whether a folder can be saved into, by a file that is removed again; nothing is left.

    Args:
        folder: may be missing; it is tried above then, where it would be made.
        needed: bytes that its disk must have room for.

    Raises:
        NotADirectoryError: it is a file, or lies below one.
        PermissionError: nothing can be written there.
        DiskFullError: there is less room.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed to save into.")
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made, because {above} is a file. Choose another folder.")
    with full_disk_named(folder):
        try:
            with tempfile.TemporaryDirectory(dir=above, prefix=".trying-") as temporary:
                (Path(temporary) / "file").write_bytes(b"\0")
        except OSError as error:
            if error.errno in FULL:
                raise
            raise PermissionError(
                f"{folder} cannot be written ({error.strerror}). Choose another folder, or change its permissions."
            ) from error
    free = shutil.disk_usage(above).free
    if free < needed:
        raise DiskFullError(
            f"{folder} needs room for {needed / 1e6:.1f} MB, but its disk has {free / 1e6:.1f} MB left. Make room, or "
            "choose a folder on another disk."
        )
