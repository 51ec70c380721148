"""Reading images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.image_utils import load_image


def read_image(image: Any):
    """A path, URL or `PIL.Image` as an RGB `PIL.Image`.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        return load_image(os.fspath(image) if isinstance(image, os.PathLike) else image)
    except Exception as error:  # Pillow, requests and codecs raise many kinds; all mean the same here
        raise ValueError(f"The image {image!r} cannot be read: {error}") from error


ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and below, by their endings, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
