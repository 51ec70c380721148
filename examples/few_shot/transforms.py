"""Shifts of test images from what the model knows."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps


def grey(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.grayscale(image).convert("RGB")


def blur(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 48))


def noise(image: Image.Image, rng: random.Random) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    values = values + np.random.default_rng(rng.getrandbits(32)).normal(0, 40, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def edges(image: Image.Image, rng: random.Random) -> Image.Image:
    """Dark lines on white, like a drawing."""
    return ImageOps.invert(ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES)).convert("RGB")


#: Shifted inputs of the domain-generalization protocol.
SHIFTS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "grey": grey,
    "blur": blur,
    "noise": noise,
    "edges": edges,
}


def shift(name: str, image: Image.Image, key: str) -> Image.Image:
    """The shifted image, the same at every call for one key."""
    return SHIFTS[name](image, random.Random(zlib.crc32(f"{name}/{key}".encode())))
