"""Reading pictures."""

from __future__ import annotations

import os
from typing import Any

from transformers.image_utils import load_image


def read_picture(image: Any):
    """A path, URL or `PIL.Image` as an RGB `PIL.Image`.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        return load_image(os.fspath(image) if isinstance(image, os.PathLike) else image)
    except Exception as error:  # Pillow, requests and codecs raise many kinds; all mean the same here
        raise ValueError(f"The picture {image!r} cannot be read: {error}") from error
