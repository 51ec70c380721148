"""What happens to images: the field's augmentation while training, and shifts from what the model knows."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from math import exp, log

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps


class TrainTransform:
    """A random part of the image, resized to the model's input and mirrored half of the time.

    The field's RandomResizedCrop and flip, on Pillow. Deterministic for a `random.Random`, so that a resumed run and
    one on several processes see the same images.

    Args:
        image_processor: of transformers; gives input size, mean and standard deviation.
        smallest: least share of the area that is kept, 0.08 in the field's recipe.
    """

    def __init__(self, image_processor, smallest: float):
        self.size = input_size(image_processor)
        self.mean = torch.tensor(image_processor.image_mean)[:, None, None]
        self.std = torch.tensor(image_processor.image_std)[:, None, None]
        self.smallest = smallest

    def __call__(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        """(3, H, W), normalized."""
        box = random_box(image.size, self.smallest, rng)
        image = image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        return (pixels / 255 - self.mean) / self.std


def input_size(image_processor) -> tuple[int, int]:
    """(height, width) of what the model is given."""
    size = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    size = size or image_processor.size
    return (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2


def random_box(size: tuple[int, int], smallest: float, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a part with at least `smallest` of the area and an aspect between 3/4 and 4/3."""
    width, height = size
    for _ in range(10):
        area, ratio = width * height * rng.uniform(smallest, 1), exp(rng.uniform(log(3 / 4), log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)  # an extreme aspect: the middle
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


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
