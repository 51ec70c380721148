"""Numbers in sentences."""

from __future__ import annotations

import pytest

from sep_peft.words import are, counted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, "image"), "0 images are"),
        ((1, "image"), "1 image is"),
        ((1234, "image"), "1,234 images are"),
        ((1, "class", "classes"), "1 class is"),
        ((2, "class", "classes"), "2 classes are"),
    ],
)
def test_counted(arguments, text):
    assert f"{counted(*arguments)} {are(arguments[0])}" == text
