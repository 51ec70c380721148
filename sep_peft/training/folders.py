"""Folders of images, one folder per class, as lists of samples."""

from __future__ import annotations

import os
import posixpath
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..classifier.images import find_images, is_hidden, is_image, other_endings, read_image, warn_left_out
from ..tuner.messages import listed, shown


#: Part of a data set -> names that its folder may have, in any case.
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}

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

    With ``train/`` below `folder`, `shots` images a class of it train, and ``val/`` and ``test/`` beside it test; see
    `find_parts`. Without any of them, the folders of the classes lie below `folder`; `shots` images of each train and
    its others test.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: fewer than two classes to train on, parts without one to train on, or a class that is in a test part
            alone.
    """
    folder, rng = _existing(folder), random.Random(seed)
    parts = find_parts(folder)
    _warn_beside_parts(folder, parts)
    if "train" in parts:
        train = {
            name: rng.sample(paths, min(shots, len(paths))) for name, paths in read_classes(parts["train"]).items()
        }
        found = {part: read_classes(parts[part]) for part in ("val", "test") if part in parts}
    elif parts:
        names = ", ".join(path.name for path in parts.values())
        raise ValueError(f"{folder} has {names}, but no folder train with the folders of the classes to train on.")
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
    """All images of ``test/``, else of ``val/`` below `folder`, else of the class folders in it; see `find_parts`.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: there are no images.
    """
    folder = _existing(folder)
    parts = find_parts(folder)
    _warn_beside_parts(folder, parts)
    samples = _samples(read_classes(parts.get("test") or parts.get("val") or folder))
    if not samples:
        raise ValueError(f"{folder} has no folders with images, one per class.")
    return samples


def has_no_test(folder: str | os.PathLike) -> bool:
    """Whether a folder has ``train/`` and neither ``test/`` nor ``val/``; see `find_parts`.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    return set(find_parts(_existing(folder))) == {"train"}


def find_parts(folder: Path) -> dict[str, Path]:
    """The parts "train", "val" and "test" -> their folders below `folder`, those that are there.

    A folder is a part by its name in any case, such as ``Train``, ``training``, ``valid`` or ``testing``, where the
    folders of classes lie in it; one with images alone is a class, so that classes may be called valid and invalid.

    Raises:
        ValueError: two folders for one part, or nothing but folders that are called like parts and hold no classes.
    """
    folders = _visible_folders(folder)
    named = {part: [path for path in folders if path.name.lower() in names] for part, names in PARTS.items()}
    parts: dict[str, Path] = {}
    for part, paths in named.items():
        paths = [path for path in paths if _visible_folders(path)]
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise ValueError(f"{folder} has {names}, which are both the {part} part of a data set. Keep one.")
        if paths:
            parts[part] = paths[0]
    flat = sorted(path for paths in named.values() for path in paths)
    if not parts and flat and flat == folders:
        names = ", ".join(path.name for path in flat)
        raise ValueError(f"{folder} has parts of a data set ({names}), but in them no folders, one per class.")
    return parts


def read_classes(folder: Path) -> dict[str, list[Path]]:
    """Name of each folder -> the images in it and below; without hidden folders and those without images.

    Files whose endings are not read are counted and named in a warning, and so are classes that have no others and
    images that lie beside the folders.
    """
    _warn_of_loose_images(folder)
    folders = _visible_folders(folder)
    classes = {entry.name: find_images(entry) for entry in folders}
    others = {entry.name: counts for entry in folders if (counts := other_endings(entry))}
    lost = [name for name in others if not classes[name]]
    more = f" Without any image, so no classes: {', '.join(lost)}." if lost else ""
    warn_left_out(folder, sum(others.values(), Counter()), more)
    return {name: paths for name, paths in classes.items() if paths}


def _warn_of_loose_images(folder: Path) -> None:
    """Warn of images that are in no folder of a class."""
    loose = sorted(path.name for path in folder.iterdir() if path.is_file() and is_image(path))
    if loose:
        count, lie = ("is 1 image", "lies") if len(loose) == 1 else (f"are {len(loose)} images", "lie")
        warnings.warn(
            f"Left out {count} in {folder} that {lie} in no folder of a class: {listed(loose)}.", stacklevel=3
        )


def _warn_beside_parts(folder: Path, parts: dict[str, Path]) -> None:
    """Warn of images and folders beside the parts of a data set."""
    if not parts:
        return
    _warn_of_loose_images(folder)
    others = [path.name for path in _visible_folders(folder) if path not in parts.values() and find_images(path)]
    if others:
        names = ", ".join(path.name for path in parts.values())
        warnings.warn(
            f"Left out are the folders with images in {folder} beside its parts ({names}): {listed(others)}.",
            stacklevel=3,
        )


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


def path_below(folder: Path, name: str) -> Path:
    """The place below a folder that a file of a data set names, which may be a stranger's.

    Raises:
        ValueError: it leads out of the folder.
    """
    place = posixpath.normpath(name.replace(os.sep, "/"))
    absolute = PurePosixPath(place).is_absolute() or PureWindowsPath(name).drive
    if absolute or place == ".." or place.startswith("../") or "\0" in name:
        raise ValueError(f"{shown(name)} leads out of the folder")
    return folder / place


def _existing(folder: str | os.PathLike) -> Path:
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"There is no folder {os.fspath(folder)}.")
    return Path(folder)


def _visible_folders(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not is_hidden(entry.name)]


def _samples(classes: dict[str, list[Path]]) -> Samples:
    return [(path, name) for name in sorted(classes) for path in classes[name]]
