"""`DecodedImages`: images that were read, kept in memory as far as there is room for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image


#: Bytes that decoded images may take: some 900 of 500 x 300 pixels.
DECODED_BYTES = 512 * 2**20
#: Bytes that Pillow keeps of a pixel of an RGB image.
PIXEL_BYTES = 4


class DecodedImages:
    """Reads images by `read` and keeps what it made of files, so that a small set is decoded once for all epochs.

    The first ones are kept, until there is no room for the next; the others are read anew each time. What is an image
    already is not kept. A copy for another process begins empty.

    Args:
        read: what stands for an image -> an RGB `PIL.Image`, which nobody changes.
        room: bytes that images may take; 0: nothing is kept.
    """

    def __init__(self, read: Callable[[Any], Image.Image], room: int = DECODED_BYTES):
        self._read, self._room, self._left = read, room, room
        self._images: dict[int, Image.Image] = {}

    def __reduce__(self):
        return DecodedImages, (self._read, self._room)

    def __call__(self, index: int, image: Any) -> Image.Image:
        """The image that has a number in its set."""
        if isinstance(image, Image.Image):
            return self._read(image)
        if (known := self._images.get(index)) is not None:
            return known
        found = self._read(image)
        size = PIXEL_BYTES * found.width * found.height
        if size <= self._left:
            self._left -= size
            self._images[index] = found
        return found
