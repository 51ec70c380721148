"""Readers: from images as they lie on disk to an `ImageSet`.

A data set is described by a small JSON file, see the folder `data_sets`:

    {"reader": "coop", "root": "caltech101", "split_file": "split_zhou_Caltech101.json", "template": "a photo of a {}."}

`root` is below the folder given by `--data-root`. `classes` keeps some of the classes only.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sep_peft.classifier.images import is_hidden, read_image
from sep_peft.training.folders import find_parts, read_classes


SPLITS = ("train", "val", "test")
#: What Pillow raises for images that are cut short, damaged or none at all.
UNREADABLE = (OSError, SyntaxError, ValueError)
#: Parts of images that nobody has split yet: half to train on, a fifth of the rest to tune on, as in CoOp.
TRAIN_PART, VAL_PART = 0.5, 0.2


class Sample(NamedTuple):
    """An image by the key under which its data set opens it, its class, and the domain it belongs to."""

    key: str
    label: int
    domain: str = ""


@dataclass(frozen=True)
class ImageSet:
    """Images of C classes in three parts.

    Args:
        name: of the data set.
        classes: C class names; labels count in their order.
        splits: "train", "val" and "test" -> samples.
        open: key of a sample -> image; raises what Pillow raises for one that cannot be read.
        template: what the frozen text branch reads, with ``{}`` in place of the class name.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    open: Callable[[str], Image.Image] = field(compare=False, repr=False)
    template: str = "a photo of a {}."

    @property
    def domains(self) -> list[str]:
        return sorted({sample.domain for samples in self.splits.values() for sample in samples})

    def only(self, classes: list[str]) -> ImageSet:
        """The part of some classes, labelled anew in the order of `classes`."""
        if unknown := sorted(set(classes) - set(self.classes)):
            raise ValueError(f"{self.name} has no classes {unknown}; it has {', '.join(self.classes)}.")
        labels = {self.classes.index(name): label for label, name in enumerate(classes)}
        splits = {
            split: [sample._replace(label=labels[sample.label]) for sample in samples if sample.label in labels]
            for split, samples in self.splits.items()
        }
        return replace(self, classes=tuple(classes), splits=splits)


def read_dataset(description: Path, data_root: Path) -> ImageSet:
    """Read the data set that a JSON file describes.

    Raises:
        ValueError: the file names no known reader, an option that its reader does not have, or classes that are not
            there.
        FileNotFoundError: the images are not where it says.
    """
    options = json.loads(description.read_text(encoding="utf-8"))
    reader = READERS.get(options.pop("reader", None))
    if reader is None:
        raise ValueError(f'{description}: "reader" must be one of {", ".join(READERS)}.')
    classes = options.pop("classes", None)
    template = options.pop("template", ImageSet.template)
    allowed = set(inspect.signature(reader).parameters) - {"name", "root"}
    if unknown := sorted(set(options) - allowed - {"root"}):
        raise ValueError(f"{description}: unknown options {unknown}; this reader takes {sorted(allowed)}.")
    root = data_root / options.pop("root", description.stem)
    found = replace(reader(name=description.stem, root=root, **options), template=template)
    return found if classes is None else found.only(classes)


def read_coop(name: str, root: Path, split_file: str, images: str = ".") -> ImageSet:
    """The field's own splits: ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``."""
    entries = json.loads((root / split_file).read_text(encoding="utf-8"))
    names = {label: class_name for split in SPLITS for _, label, class_name in entries[split]}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{root / split_file}: labels must count from 0 to {len(names) - 1}, but are {sorted(names)}.")
    splits = {split: [Sample(path, label) for path, label, _ in entries[split]] for split in SPLITS}
    return ImageSet(name, tuple(names[label] for label in sorted(names)), splits, file_opener(root / images))


def read_class_folders(name: str, root: Path, split_seed: int = 1) -> ImageSet:
    """One folder of images per class, or train/, val/ and test/ with such folders, called as `find_parts` has it.

    What is missing is made with a seed: the validation part from the training part, all three from one folder.
    """
    parts = find_parts(root) if root.is_dir() else {}
    if "train" in parts:
        found = {split: images_by_class(root, parts[split]) if split in parts else {} for split in SPLITS}
        if not found["test"]:
            raise FileNotFoundError(
                f"{root} has a folder {parts['train'].name} but no images below {parts.get('test', root / 'test')}."
            )
        if not found["val"]:
            found["train"], found["val"] = cut(found["train"], 1 - VAL_PART, split_seed)
    else:
        found = cut_in_three(images_by_class(root, root), split_seed)
    return from_classes(name, root, {"": found})


def read_domains(name: str, root: Path, split_seed: int = 1) -> ImageSet:
    """Several domains of the same classes: domain/class/image, each domain split with a seed."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    found = {path.name: cut_in_three(images_by_class(root, path), split_seed) for path in folders}
    if len(found) < 2:
        raise ValueError(f"{root} needs at least two domains, folders of class folders, but has {len(found)}.")
    return from_classes(name, root, found)


def read_huggingface(
    name: str,
    root: Path,
    path: str | None = None,
    config: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    splits: dict[str, str] | None = None,
    split_seed: int = 1,
) -> ImageSet:
    """A data set of the Hub, or on disk at `root` where no `path` is given, read by the package `datasets`.

    Args:
        splits: our "train", "val", "test" -> the data set's names of them.
    """
    try:
        from datasets import Image as ImageColumn
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("This data set is read by the package datasets: pip install datasets") from error
    tables = load_dataset(path or str(root), config)
    places = splits or {"train": "train", "val": "validation", "test": "test"}
    tables = {place: tables[place] for place in places.values() if place in tables}
    feature = next(iter(tables.values())).features[label_column]
    if not hasattr(feature, "names"):
        raise ValueError(f"{path or root}: column {label_column!r} must hold class labels, but it is {feature}.")
    found: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for split, place in places.items():
        for index, label in enumerate(tables[place][label_column] if place in tables else ()):
            found[split].setdefault(feature.names[label], []).append(f"{place}/{index}")
    if not found["val"]:
        found["train"], found["val"] = cut(found["train"], 1 - VAL_PART, split_seed)
    # a column of paths or bytes is read as images too; it is not decoded, so that all images are read in one way
    tables = {place: table.cast_column(image_column, ImageColumn(decode=False)) for place, table in tables.items()}

    def open_row(key: str) -> Image.Image:
        place, index = key.rsplit("/", 1)
        return read_image(tables[place][int(index)][image_column])

    data = from_classes(name, root, {"": found}, order=[n for n in feature.names if n in found["train"]])
    return replace(data, open=open_row)


READERS = {"coop": read_coop, "folder": read_class_folders, "domains": read_domains, "huggingface": read_huggingface}


def file_opener(root: Path) -> Callable[[str], Image.Image]:
    """Opens images by their path below `root`."""
    return lambda key: read_image(root / key)


def images_by_class(root: Path, folder: Path) -> dict[str, list[str]]:
    """Name of each folder in `folder` -> paths of its images, relative to `root`, both sorted."""
    classes = read_classes(folder) if folder.is_dir() else {}
    return {name: sorted(path.relative_to(root).as_posix() for path in paths) for name, paths in classes.items()}


def cut(classes: dict[str, list[str]], first: float, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Cut each class in two at random; both parts keep at least one image where there are two."""
    rng = random.Random(seed)
    parts: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for name, paths in classes.items():
        shuffled = rng.sample(paths, len(paths))
        count = min(max(1, round(first * len(paths))), max(1, len(paths) - 1))
        for part, chosen in zip(parts, (shuffled[:count], shuffled[count:]), strict=True):
            if chosen:
                part[name] = chosen
    return parts


def cut_in_three(classes: dict[str, list[str]], seed: int) -> dict[str, dict[str, list[str]]]:
    train, rest = cut(classes, TRAIN_PART, seed)
    # the larger part of the rest is for testing
    test, val = cut(rest, 1 - VAL_PART, seed)
    return {"train": train, "val": val, "test": test}


def from_classes(
    name: str, root: Path, domains: dict[str, dict[str, dict[str, list[str]]]], order: list[str] | None = None
) -> ImageSet:
    """Put together what was found: domain -> split -> class name -> keys.

    Raises:
        FileNotFoundError: less than two classes have images.
    """
    names = order or sorted({c for splits in domains.values() for classes in splits.values() for c in classes})
    if len(names) < 2:
        raise FileNotFoundError(f"{root} needs images of at least two classes, one folder each, but has {names}.")
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for domain, found in domains.items():
        for split, classes in found.items():
            for class_name, keys in classes.items():
                splits[split] += [Sample(key, names.index(class_name), domain) for key in keys]
    return ImageSet(name, tuple(names), splits, file_opener(root))


def describe(data: ImageSet) -> dict[str, Any]:
    """Counts, for people."""
    return {"classes": len(data.classes), **{split: len(samples) for split, samples in data.splits.items()}}
