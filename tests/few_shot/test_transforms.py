"""Augmentation and shifts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transforms import SHIFTS, TrainTransform, input_size, random_box, shift


@pytest.fixture
def image_processor(assets):
    return AutoProcessor.from_pretrained(assets / "clip-small").image_processor


@pytest.fixture
def image():
    values = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(96, 64), (7, 200), (1, 1), (31, 33)])
@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
def test_box_is_inside_and_large_enough(size, smallest):
    rng = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = random_box(size, smallest, rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if 3 / 4 <= size[0] / size[1] <= 4 / 3 and min(size) > 20:
            assert (right - left) * (bottom - top) >= 0.9 * smallest * size[0] * size[1]


def test_whole_image_is_what_the_processor_gives(image_processor, image):
    """Without a crop, on an image that is square already, augmentation is the processor or its mirror image."""
    square = image.resize((64, 64))
    expected = image_processor(images=square, return_tensors="pt")["pixel_values"][0]
    transform = TrainTransform(image_processor, smallest=1.0)
    seen = set()
    for seed in range(20):
        pixels = transform(square, random.Random(seed))
        if pixels.shape == expected.shape and torch.allclose(pixels, expected, atol=1e-5):
            seen.add("as it is")
        if torch.allclose(pixels, expected.flip(-1), atol=1e-5):
            seen.add("mirrored")
    assert seen == {"as it is", "mirrored"}


def test_size_and_repetition(image_processor, image):
    transform = TrainTransform(image_processor, smallest=0.08)
    first, again, other = (transform(image, random.Random(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, *input_size(image_processor)) == (3, 64, 64)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_change_the_image_and_repeat(name, image):
    shifted = np.asarray(shift(name, image, "a.jpg"))
    assert shifted.shape == np.asarray(image).shape
    assert (shifted != np.asarray(image)).mean() > 0.5
    assert (shifted == np.asarray(shift(name, image, "a.jpg"))).all()
    assert (shifted == np.asarray(shift(name, image, "b.jpg"))).all() == (name != "noise")


def test_grey_has_no_colour(image):
    red, green, blue = np.asarray(shift("grey", image, "")).transpose(2, 0, 1)
    assert (red == green).all() and (green == blue).all()
