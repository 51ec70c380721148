"""The few-shot benchmark is a folder of scripts; here they are imported as they import each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "few_shot"
ASSETS = ROOT / "examples" / "assets"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture
def assets() -> Path:
    return ASSETS


@pytest.fixture
def scripts() -> Path:
    return SCRIPTS


@pytest.fixture
def images(tmp_path):
    """A function that makes class folders of tiny images: {"cat": 3} -> folder/cat/0.png ..."""

    def make(folder: str, counts: dict[str, int]) -> Path:
        for index, (name, count) in enumerate(counts.items()):
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(count):
                colour = (40 * index, 10 * number, 100)
                Image.new("RGB", (9, 7), colour).save(tmp_path / folder / name / f"{number:02d}.png")
        return tmp_path / folder

    return make


@pytest.fixture
def describe(tmp_path):
    """A function that writes a data set's JSON file."""

    def write(name: str, **options) -> Path:
        (tmp_path / f"{name}.json").write_text(json.dumps(options))
        return tmp_path / f"{name}.json"

    return write
