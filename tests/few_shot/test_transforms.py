"""Shifts of test images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transforms import SHIFTS, shift


@pytest.fixture
def image():
    values = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


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
