"""Styles that are drawn of photographs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import styles
from PIL import Image, ImageDraw
from readers import read_dataset


@pytest.fixture
def photograph():
    """A disc on another colour."""
    image = Image.new("RGB", (60, 40), (30, 90, 200))
    ImageDraw.Draw(image).ellipse((15, 5, 45, 35), fill=(230, 180, 40))
    return image


def test_each_style_keeps_the_size_and_changes_what_it_says(photograph):
    drawn = {name: np.asarray(draw(photograph)).astype(int) for name, draw in styles.STYLES.items()}
    assert {array.shape for array in drawn.values()} == {(40, 60, 3)}
    assert (drawn["photo"] == np.asarray(photograph)).all()
    red, green, blue = drawn["drawing"].transpose(2, 0, 1)
    assert (red == green).all() and (green == blue).all()
    assert red[20, 30] == red[1, 1] == 255 and red[18:22, 12:19].min() < 100  # lines are at the rim of the disc alone
    assert len(np.unique(drawn["cartoon"].reshape(-1, 3), axis=0)) <= 6
    assert abs(drawn["art"][20, 30] - drawn["photo"][20, 30]).max() > 20


def test_no_image_is_in_two_styles(images, scripts, tmp_path, monkeypatch, capsys):
    photographs = images("photographs", {"a_cat": 9, "dog": 4, "one": 1})
    command = ["styles.py", str(photographs), str(tmp_path / "styles"), "--classes", "a_cat", "dog", "--images", "8"]
    monkeypatch.setattr(sys, "argv", command)
    styles.main()
    data = read_dataset(scripts / "data_sets" / "styles.json", tmp_path)
    assert data.domains == sorted(styles.STYLES) and data.classes == ("a cat", "dog")
    drawn = sorted((tmp_path / "styles").glob("*/*/*.png"))
    assert len(drawn) == 12 and len({(path.parent.name, path.name) for path in drawn}) == 12
    before = {path: path.stat().st_mtime_ns for path in drawn}
    styles.main()
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "styles").glob("*/*/*"))} == before

    for wrong, message in [
        (["--classes", "cow"], f"{photographs} has no folder of images cow."),
        (["--classes", "one"], "a class needs an image for each of 4 styles, but one has fewer."),
        (["--images", "3"], "--images must be at least 4, one a style, but is 3."),
    ]:
        monkeypatch.setattr(sys, "argv", [*command[:3], *wrong])
        with pytest.raises(SystemExit):
            styles.main()
        assert message in capsys.readouterr().err
