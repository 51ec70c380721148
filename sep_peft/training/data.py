"""Images with labels, augmented, as training reads them."""

from __future__ import annotations

import random

import torch
from PIL import Image

from ..classifier.images import read_image
from .folders import Samples


class Images(torch.utils.data.Dataset):
    """Images with labels as a Trainer wants them.

    Args:
        samples: images and names of their classes.
        names: all class names, in the order of the labels.
        processor: with an image processor of transformers.
        smallest_crop: crop at random to so much of the area or more, and flip; None: images as they are.
    """

    def __init__(self, samples: Samples, names: list[str], processor, smallest_crop: float | None = None):
        self.samples = [(path, names.index(name)) for path, name in samples]
        self.processor = getattr(processor, "image_processor", processor)
        self.smallest_crop = smallest_crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.read(index, random)

    def read(self, index: int, source) -> dict:
        """An image, augmented by draws from `source`, the module `random` or a `random.Random`."""
        path, label = self.samples[index]
        image = read_image(path)
        if self.smallest_crop is not None:
            image = random_crop_and_flip(image, self.smallest_crop, source)
        return {"pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0], "labels": label}


class FixedViews(torch.utils.data.Dataset):
    """`views` augmentations of each image, the same ones every time: entry i + N v is view v of image i.

    Args:
        images: N of them, augmented.
        views: augmentations of each.
        seed: of them.
    """

    def __init__(self, images: Images, views: int, seed: int):
        self.images, self.views, self.seed = images, views, seed

    def __len__(self) -> int:
        return len(self.images) * self.views

    def __getitem__(self, index: int) -> dict:
        return self.images.read(index % len(self.images), random.Random(f"{self.seed}/{index}"))


def random_crop_and_flip(image: Image.Image, smallest: float, source=random) -> Image.Image:
    """A square-ish part of `smallest` to all of the area, mirrored half of the time: the field's augmentation."""
    width, height = image.size
    area, ratio = width * height * source.uniform(smallest, 1), source.uniform(3 / 4, 4 / 3)
    part = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = source.randint(0, width - part[0]), source.randint(0, height - part[1])
    side = min(width, height)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + part[0], top + part[1]))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if source.random() < 0.5 else image
