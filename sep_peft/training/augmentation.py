"""What training shows of an image: a random part of it, in the size that the model takes, perhaps mirrored."""

from __future__ import annotations

import random
from math import exp, log

from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin


def crop_and_flip(
    image: Image.Image,
    smallest: float,
    size: tuple[int, int] | None,
    source: random.Random,
    mirrors: bool = True,
) -> Image.Image:
    """The field's augmentation: a random part of the image, resized and mirrored half of the time.

    Args:
        image: as it was read.
        smallest: least share of its area that is kept.
        size: (height, width) to resize to; None: a square as high as the image's shorter side.
        source: of what is drawn.
        mirrors: False never mirrors; the parts are the same.
    """
    height, width = size or (min(image.size),) * 2
    box = random_box(image.size, smallest, source)
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrors and source.random() < 0.5 else image


def random_box(size: tuple[int, int], smallest: float, source: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a part with at least `smallest` of the area and an aspect between 3/4 and 4/3.

    Args:
        size: (width, height) of the image.
        smallest: least share of its area.
        source: of what is drawn.
    """
    width, height = size
    for _ in range(10):
        area, ratio = width * height * source.uniform(smallest, 1), exp(source.uniform(log(3 / 4), log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = source.randint(0, width - w), source.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)  # an extreme aspect: the middle
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def input_size(image_processor: ImageProcessingMixin) -> tuple[int, int] | None:
    """(height, width) of what the processor gives; None where it depends on the image."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = getattr(image_processor, "crop_size" if crops else "size", None)
    if size is None or not (crops or getattr(image_processor, "do_resize", False)):
        return None
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    return (size["shortest_edge"],) * 2 if crops and "shortest_edge" in size else None
