"""Folders of images: which train, which test, and which cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from sep_peft.classifier.images import find_images
from sep_peft.training.folders import read_classes, read_folder, read_test, without_unreadable


def fill(folder: Path, **classes: int) -> Path:
    """Class -> how many images."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (4, 4)).save(folder / name / f"{index}.png")
    return folder


def counts(samples) -> dict[str, int]:
    names = [name for _, name in samples]
    return {name: names.count(name) for name in names}


def test_class_folders_alone_are_split(tmp_path):
    fill(tmp_path, cup=5, lamp=2)
    folder = read_folder(tmp_path, shots=2, seed=0)
    assert folder.names == ["cup", "lamp"]
    assert counts(folder.train) == {"cup": 2, "lamp": 2}
    assert counts(folder.tests["test"]) == {"cup": 3}
    assert len({path for path, _ in folder.train + folder.tests["test"]}) == 7
    assert all(path.parent.name == name for path, name in folder.train)


def test_too_few_images_to_test_on(tmp_path):
    folder = read_folder(fill(tmp_path, cup=2, lamp=1), shots=2, seed=0)
    assert (counts(folder.train), folder.tests) == ({"cup": 2, "lamp": 1}, {})


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_parts(val, tmp_path):
    fill(tmp_path / "train", cup=5, lamp=2)
    fill(tmp_path / val, cup=1)
    fill(tmp_path / "test", cup=3, lamp=4)
    folder = read_folder(tmp_path, shots=3, seed=0)
    assert counts(folder.train) == {"cup": 3, "lamp": 2}
    assert {part: counts(samples) for part, samples in folder.tests.items()} == {
        "val": {"cup": 1},
        "test": {"cup": 3, "lamp": 4},
    }
    assert read_test(tmp_path) == folder.tests["test"]


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path):
    fill(tmp_path, cup=20, lamp=20)
    first, again, other = (read_folder(tmp_path, 4, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train != other.train


def test_read_test_without_test(tmp_path):
    assert counts(read_test(fill(tmp_path, cup=2))) == {"cup": 2}
    fill(tmp_path / "val", lamp=1)
    assert counts(read_test(tmp_path)) == {"lamp": 1}


def test_hidden_empty_and_nested_folders(tmp_path):
    fill(tmp_path, cup=1, empty=0)
    fill(tmp_path / ".cache", x=1)
    fill(tmp_path / "lamp", more=2)
    (tmp_path / "lamp" / "notes.txt").write_text("no image")
    (tmp_path / "lamp" / "OLD.JPG").write_bytes(b"")
    (tmp_path / "loose.png").write_bytes(b"")
    found = read_classes(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "cup": ["0.png"],
        "lamp": ["OLD.JPG", "0.png", "1.png"],
    }
    assert find_images(tmp_path / "lamp") == found["lamp"]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda folder: None, NotADirectoryError, "There is no folder {folder}."),
        (
            lambda folder: fill(folder, cup=2),
            ValueError,
            "{folder} needs at least two folders with images, one per class, but has 1.",
        ),
        (
            lambda folder: (fill(folder / "train", cup=1, lamp=1), fill(folder / "test", cup=1, mug=1, bowl=1)),
            ValueError,
            "{folder} has classes in test that are not in train: bowl, mug.",
        ),
    ],
    ids=["missing", "one class", "untrained class"],
)
def test_folders_that_cannot_train(make, kind, message, tmp_path):
    folder = tmp_path / "data"
    make(folder)
    with pytest.raises(kind, match=f"^{re.escape(message.format(folder=folder))}$"):
        read_folder(folder, 1, 0)


def test_nothing_to_test_on(tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path} has no folders with images, one per class.')}$"):
        read_test(tmp_path)


def test_unreadable_images_are_told_from_the_others(tmp_path):
    fill(tmp_path, cup=3)
    paths = sorted((tmp_path / "cup").iterdir())
    paths[0].write_bytes(b"no image")
    paths[1].write_bytes(paths[2].read_bytes()[:40])
    seen = []
    samples = [(path, "cup") for path in paths]
    readable, broken = without_unreadable(samples, lambda items: seen.extend(items) or iter(items))
    assert (readable, seen) == (samples[2:], samples)
    assert list(broken) == paths[:2]
    for path, message in broken.items():
        assert message.startswith(f"The image {path!r} cannot be read: ")
