"""Folders of images, one folder per class, as lists of samples."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..classifier.images import find_images, read_image


#: Part of a data set -> names that its folder may have.
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

#: Image and name of its class.
Samples = list[tuple[Path, str]]


@dataclass(frozen=True)
class ImageFolder:
    """
    Args:
        names: class names, sorted.
        train: images to train on.
        tests: "val" and "test" -> images to test on; a part without images is left out.
    """

    names: list[str]
    train: Samples
    tests: dict[str, Samples] = field(default_factory=dict)


def read_folder(folder: str | os.PathLike, shots: int, seed: int) -> ImageFolder:
    """Find images to train and to test on.

    With ``train/`` below `folder`, `shots` images a class of it train, and ``val/`` and ``test/`` beside it test.
    Without, the folders of the classes lie below `folder`; `shots` images of each train and its others test.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: fewer than two classes to train on, or a class that is in a test part alone.
    """
    folder, rng = _existing(folder), random.Random(seed)
    if (folder / "train").is_dir():
        train = {
            name: rng.sample(paths, min(shots, len(paths))) for name, paths in read_classes(folder / "train").items()
        }
        found = {part: read_classes(path) for part in ("val", "test") if (path := _part(folder, part))}
    else:
        classes = read_classes(folder)
        for paths in classes.values():
            rng.shuffle(paths)
        train = {name: paths[:shots] for name, paths in classes.items()}
        found = {"test": {name: paths[shots:] for name, paths in classes.items()}}
    if len(train) < 2:
        raise ValueError(f"{folder} needs at least two folders with images, one per class, but has {len(train)}.")
    for part, classes in found.items():
        if unknown := sorted(set(classes) - set(train)):
            raise ValueError(f"{folder} has classes in {part} that are not in train: {', '.join(unknown)}.")
    tests = {part: samples for part, classes in found.items() if (samples := _samples(classes))}
    return ImageFolder(sorted(train), _samples(train), tests)


def read_test(folder: str | os.PathLike) -> Samples:
    """All images of ``test/``, else of ``val/`` below `folder`, else of the class folders in it.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: there are no images.
    """
    folder = _existing(folder)
    samples = _samples(read_classes(_part(folder, "test") or _part(folder, "val") or folder))
    if not samples:
        raise ValueError(f"{folder} has no folders with images, one per class.")
    return samples


def read_classes(folder: Path) -> dict[str, list[Path]]:
    """Name of each folder -> the images in it and below; without hidden and empty ones."""
    folders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    classes = {entry.name: find_images(entry) for entry in folders}
    return {name: paths for name, paths in classes.items() if paths}


def without_unreadable(
    samples: Samples, progress: Callable[[Iterable], Iterable] = iter
) -> tuple[Samples, dict[Path, str]]:
    """Open every image once.

    Args:
        samples: what to open.
        progress: wraps the samples, such as tqdm.

    Returns:
        the samples whose images can be read, and image -> what is wrong with it for the others.
    """
    readable, broken = [], {}
    for path, name in progress(samples):
        try:
            read_image(path)
        except ValueError as error:
            broken[path] = str(error)
        else:
            readable.append((path, name))
    return readable, broken


def _existing(folder: str | os.PathLike) -> Path:
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"There is no folder {os.fspath(folder)}.")
    return Path(folder)


def _part(folder: Path, part: str) -> Path | None:
    return next((folder / name for name in PARTS[part] if (folder / name).is_dir()), None)


def _samples(classes: dict[str, list[Path]]) -> Samples:
    return [(path, name) for name in sorted(classes) for path in classes[name]]
