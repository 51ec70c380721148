"""Folders of images: which train, which test, and which cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from sep_peft.classifier.images import ENDINGS, find_images
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


def left_out(folder: Path, counts: str, lost: str = "") -> str:
    return f"Left out below {folder} are {counts}.{lost} Read are {', '.join(sorted(ENDINGS))}."


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


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "valid", "Test"),
        ("training", "validation", "testing"),
        ("TRAINING", "Val", "TEST"),
    ],
)
def test_parts(train, val, test, tmp_path):
    fill(tmp_path / train, cup=5, lamp=2)
    fill(tmp_path / val, cup=1)
    fill(tmp_path / test, cup=3, lamp=4)
    fill(tmp_path / "__MACOSX" / "train", cup=9)
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


def test_what_is_hidden_is_not_read(tmp_path):
    """Folders of editors and archives; files that macOS puts beside images."""
    fill(tmp_path, cup=2, lamp=2)
    fill(tmp_path / "cup", **{".ipynb_checkpoints": 2, "__MACOSX": 1, "more": 1})
    fill(tmp_path, **{"__MACOSX": 3, ".git": 1})
    (tmp_path / "lamp" / "._0.png").write_bytes(b"")
    folder = read_folder(tmp_path, shots=1, seed=0)
    assert folder.names == ["cup", "lamp"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path, _ in folder.train + folder.tests["test"]) == [
        "cup/0.png",
        "cup/1.png",
        "cup/more/0.png",
        "lamp/0.png",
        "lamp/1.png",
    ]


def test_a_hidden_folder_may_be_asked_for(tmp_path):
    assert read_folder(fill(tmp_path / ".data", cup=1, lamp=1), 1, 0).names == ["cup", "lamp"]


def test_classes_whose_endings_are_not_read(tmp_path):
    fill(tmp_path, cup=2, lamp=1, mug=0, scan=0)
    for name in ("lamp/a.xyz", "scan/a.dcm", "scan/b.DCM", "scan/c", ".hidden.dcm"):
        (tmp_path / name).write_bytes(b"")
    lost = " Without any image, so no classes: scan."
    message = left_out(tmp_path, "4 files: 2 .dcm, 1 .xyz, 1 without an ending", lost)
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert read_folder(tmp_path, 1, 0).names == ["cup", "lamp"]


@pytest.mark.filterwarnings("error")
def beside(caught) -> list[str]:
    return [str(warning.message) for warning in caught]


def test_images_beside_the_folders_of_classes_are_counted_and_named(tmp_path):
    fill(tmp_path, cup=2, lamp=2)
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        assert read_folder(tmp_path, shots=1, seed=0).names == ["cup", "lamp"]
    message = f"Left out are 2 images in {tmp_path} that lie in no folder of a class: 'a.JPG', 'b.png'."
    assert beside(caught) == [message]
    with pytest.warns(UserWarning) as caught:
        assert len(read_test(tmp_path)) == 4
    assert beside(caught) == [message]


def test_what_lies_beside_the_parts_is_named(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / part, cup=1, lamp=1)
    fill(tmp_path, umbrella=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose.png").write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        assert read_folder(tmp_path, shots=1, seed=0).names == ["cup", "lamp"]
    assert beside(caught) == [
        f"Left out is 1 image in {tmp_path} that lies in no folder of a class: 'loose.png'.",
        f"Left out are the folders with images in {tmp_path} beside its parts (train, test): 'umbrella'.",
    ]


def test_classes_may_be_called_like_parts(tmp_path):
    fill(tmp_path, valid=2, invalid=2, Test=1)
    assert read_folder(tmp_path, 1, 0).names == ["Test", "invalid", "valid"]
    assert counts(read_test(tmp_path)) == {"Test": 1, "invalid": 2, "valid": 2}


def test_hidden_empty_and_nested_folders(tmp_path):
    fill(tmp_path, cup=1, empty=0)
    fill(tmp_path / ".cache", x=1)
    fill(tmp_path / "lamp", more=2)
    (tmp_path / "lamp" / "notes.txt").write_text("no image")
    (tmp_path / "lamp" / "OLD.JPG").write_bytes(b"")
    (tmp_path / "loose.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=f"^{re.escape(left_out(tmp_path, '1 file: 1 .txt'))}$"):
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
        (
            lambda folder: fill(folder, Test=1, Train=1),
            ValueError,
            "{folder} has parts of a data set (Test, Train), but in them no folders, one per class.",
        ),
        (
            lambda folder: (fill(folder / "Test", cup=1, lamp=1), fill(folder, cup=1)),
            ValueError,
            "{folder} has Test, but no folder train with the folders of the classes to train on.",
        ),
        (
            lambda folder: (fill(folder / "Train", cup=1, lamp=1), fill(folder / "training", cup=1, lamp=1)),
            ValueError,
            "{folder} has Train and training, which are both the train part of a data set. Keep one.",
        ),
    ],
    ids=["missing", "one class", "untrained class", "parts without classes", "no part to train on", "two parts"],
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
        assert message.startswith(f"The image {str(path)!r} cannot be read: ")
