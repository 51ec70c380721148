"""The pages of ``sep-peft search`` and ``sep-peft duplicates`` in headless Chromium; `.ci/run` calls it by name.

python -m pytest tests/image_pages_in_browser.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from browser import WIDTHS, open_browser
from bundled import IMAGE_FILES, NAMES
from shallow_classifier import classifier_maker

from sep_peft.cli.app import main
from sep_peft.training import Recipe


#: Name of a file that would do something, were it HTML, and that is as wide as a window where it cannot be broken.
EVIL = "<img src=x onerror=document.title='owned'>" + "long" * 30 + ".jpg"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """What a page is of -> its file."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "images").mkdir()
    for name, path in zip(NAMES, IMAGE_FILES, strict=True):
        shutil.copy(path, folder / "images" / f"{name}.jpg")
    shutil.copy(IMAGE_FILES[0], folder / "images" / EVIL)
    classifier_maker(Recipe())().save_pretrained(folder / "adapter")
    query = "<b>pizza</b> " + "x" * 50
    runs = {
        "text": ["search", folder / "images", query, "--compare-base"],
        "image": ["search", folder / "images", folder / "images" / EVIL],
        "same": ["duplicates", folder / "images"],
    }
    for kind, (command, *arguments) in runs.items():
        options = ["--index", folder / "index", "--page", folder / f"{kind}.html", "--quiet"]
        assert main([command, str(folder / "adapter"), *map(str, [*arguments, *options])]) == 0
    return {kind: folder / f"{kind}.html" for kind in runs}


@pytest.mark.parametrize(
    ("kind", "images", "said"),
    [
        ("text", 10, ["5 images searched", "Found with SEP", "Found by the base model", "<b>pizza</b>"]),
        ("image", 6, ["5 images searched", "Query", EVIL]),
        ("same", 2, ["2 of 5 images in 1 group", EVIL]),
    ],
)
def test_a_browser_shows_it(kind, images, said, pages, tmp_path):
    with open_browser() as browser:
        for width in WIDTHS:
            browser.open(pages[kind], width, dark=width == WIDTHS[1])
            assert browser.errors() == [] and browser.requests() == [] and browser.broken_images() == []
            assert browser.overflow() == 0 and browser.run("return document.images.length") == images
            assert browser.run("return document.title") != "owned"
            text = " ".join(browser.text().split())
            assert all(" ".join(each.split()) in text for each in said)
            browser.screenshot(tmp_path / f"{kind}-{width}.png")
