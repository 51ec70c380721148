"""Files that name the labels of images, of which each may have several: CSV, JSON and JSONL; and data sets of the Hub.

A row has an image, by a path beside the file, its labels, and perhaps the part of the data that it belongs to::

    image,labels,split                    {"image": "beach.jpg", "labels": ["dog", "sea"], "split": "train"}
    beach.jpg,dog;sea,train               {"image": "grey.jpg", "labels": [], "split": "test"}
    grey.jpg,,test

Labels in a cell are parted by ``;`` or ``|``, or are a list in JSON; in the place of that column there may be one for
each class that holds 0 and 1.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ..tuner.messages import listed, shown
from ..words import counted
from .folders import PARTS, path_below


#: Image and the names of its classes, of which there may be none.
LabelSamples = list[tuple[Any, tuple[str, ...]]]

#: Endings of files of labels.
ENDINGS = (".csv", ".json", ".jsonl")
#: What the columns may be called, in any case.
IMAGE_COLUMNS = ("image", "file_name", "filename", "file", "path")
LABEL_COLUMNS = ("labels", "label", "tags", "classes")
SPLIT_COLUMNS = ("split", "part")


@dataclass(frozen=True)
class LabelFile:
    """
    Args:
        names: class names, sorted.
        train: images to train on.
        tests: "val" and "test" -> images to test on; a part without images is left out.
    """

    names: list[str]
    train: LabelSamples
    tests: dict[str, LabelSamples] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """
    Args:
        place: in the file, for messages.
        values: column -> value, which is a text in a CSV file; the columns named above are in lower case.
    """

    place: str
    values: Mapping[str, Any]


def is_label_file(path: str | os.PathLike) -> bool:
    """Whether a path is that of a file of labels, by its ending."""
    return os.path.splitext(os.fspath(path))[1].lower() in ENDINGS and os.path.isfile(path)


def read_label_file(path: str | os.PathLike) -> LabelFile:
    """Read images with their labels.

    Args:
        path: of the file; see above. Rows without a part train.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has no rows, lacks a column, or a row has no image, an unknown part, or labels
            that are no names, an image leads out of the file's folder or has two rows; the message names the row. Or no
            row has a label.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} has no rows. It needs one for each image.")
    image, labels, split = (_column(rows[0].values, names) for names in (IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS))
    if image is None:
        raise ValueError(
            f"{path} needs a column of images, {_one_of(IMAGE_COLUMNS)}, but has {listed(rows[0].values)}."
        )
    parts: dict[str, LabelSamples] = {part: [] for part in PARTS}
    places: dict[Path, str] = {}
    for row in rows:
        file = row.values.get(image)
        if not isinstance(file, str) or not file.strip():
            raise ValueError(f"{row.place} of {path} needs a path in {shown(image)}, but has {shown(file)}.")
        place = _place(row, path, file.strip())
        if place in places:
            raise ValueError(
                f"{row.place} of {path} names the image {shown(file)} again, after {places[place].lower()}. Give an "
                "image one row with all its labels."
            )
        places[place] = row.place
        own = _labels(row, path, labels, {image, *([] if split is None else [split])})
        parts[_part(row, path, split)].append((place, own))
    names = sorted({name for samples in parts.values() for _, own in samples for name in own})
    if not names:
        raise ValueError(f"{path} has no label in any row.")
    return LabelFile(names, parts["train"], {part: parts[part] for part in ("val", "test") if parts[part]})


def read_labelled_test(path: str | os.PathLike) -> LabelSamples:
    """The images of the part test, else of val, else all of a file of labels; see `read_label_file`."""
    found = read_label_file(path)
    return found.tests.get("test") or found.tests.get("val") or found.train


def check_trainable(found: LabelFile, path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: fewer than two classes, or one that no training image has.
    """
    if len(found.names) < 2:
        raise ValueError(f"{os.fspath(path)} needs at least two classes, but has {len(found.names)}.")
    trained = {name for _, own in found.train for name in own}
    if missing := [name for name in found.names if name not in trained]:
        raise ValueError(f"{os.fspath(path)} has classes of which no training image is: {listed(missing)}.")


def label_samples(dataset: Any, image: str = "image", labels: str = "labels") -> tuple[list[str] | None, LabelSamples]:
    """Images with their labels of a data set of the package ``datasets``.

    Images stay as they are stored, as far as the data set can leave them so, and are decoded when they are needed.

    Args:
        dataset: a `datasets.Dataset`, or another sequence of rows.
        image: name of the column of images.
        labels: name of the column of labels, for each image a list of names or of `datasets.ClassLabel`.

    Returns:
        the class names of the column in their order, or None where it says none, and image with names for each row.

    Raises:
        ValueError: a column is missing, or labels are no names.

    Example:
        >>> names, samples = label_samples(datasets.load_dataset("user/name", split="train"))
    """
    features = getattr(dataset, "features", None) or {}
    if missing := [name for name in (image, labels) if features and name not in features]:
        raise ValueError(f"The data set has no column {listed(missing)}; it has {listed(features)}.")
    names = getattr(getattr(features.get(labels), "feature", None), "names", None)
    if image in features and hasattr(dataset, "cast_column") and hasattr(features[image], "decode"):
        dataset = dataset.cast_column(image, type(features[image])(decode=False))
    samples: LabelSamples = []
    for index, row in enumerate(dataset):
        own = row[labels]
        if names is not None and all(isinstance(each, int) for each in own):
            own = [names[each] for each in own]
        if not isinstance(own, (list, tuple)) or not all(isinstance(each, str) for each in own):
            raise ValueError(f"Row {index} of the data set needs a list of class names, but has {shown(own)}.")
        samples.append((_stored(row[image]), tuple(dict.fromkeys(own))))
    return names, samples


def _stored(image: Any) -> Any:
    """An image as a data set stores it: its bytes, or its path."""
    return (image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else image


def _rows(path: Path) -> list[_Row]:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8, or is not what its ending says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return [_Row(f"Line {number}", row) for number, row in _csv_rows(text)]
        if path.suffix.lower() == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            rows = [(f"Line {number}", json.loads(line)) for number, line in lines if line.strip()]
        else:
            data = json.loads(text)
            rows = [(f"Entry {place}", row) for place, row in enumerate(data if isinstance(data, list) else [data])]
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}.") from error
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} of {path} must be an object with image and labels, but is {shown(row)}.")
    return [_Row(place, {_key(name): value for name, value in row.items()}) for place, row in rows]


def _csv_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    """
    Raises:
        ValueError: two columns have one name, or a row has another number of values.
    """
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    header = [_key(name) for name in next(reader, [])]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"two columns are called {listed(twice)}")
    rows = []
    for values in reader:
        if not any(values):
            continue
        if len(values) != len(header):
            raise ValueError(
                f"line {reader.line_num} has {counted(len(values), 'value')} for {counted(len(header), 'column')}"
            )
        rows.append((reader.line_num, dict(zip(header, values, strict=True))))
    return rows


def _key(name: str) -> str:
    """The name of a column; in lower case unless it is a class."""
    name = name.strip()
    return name.lower() if name.lower() in {*IMAGE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS} else name


def _column(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in values), None)


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _part(row: _Row, path: Path, column: str | None) -> str:
    """
    Raises:
        ValueError: it is no part of a data set.
    """
    said = "" if column is None else row.values.get(column) or ""
    if not isinstance(said, str):
        raise ValueError(f"{row.place} of {path} needs train, val or test in {column}, but has {shown(said)}.")
    if not said.strip():
        return "train"
    for part, names in PARTS.items():
        if said.strip().lower() in names:
            return part
    raise ValueError(f"{row.place} of {path} needs train, val or test in {column}, but has {shown(said)}.")


def _place(row: _Row, path: Path, file: str) -> Path:
    """
    Raises:
        ValueError: it is not below the folder of the file of labels.
    """
    try:
        return path_below(path.parent, file)
    except ValueError as error:
        raise ValueError(f"{row.place} of {path} needs a path below its folder, but {error}.") from error


def _labels(row: _Row, path: Path, column: str | None, others: set[str]) -> tuple[str, ...]:
    """
    Raises:
        ValueError: what the row has for labels is no list of names, and no 0 or 1 for each class.
    """
    if column is None:
        return tuple(
            name for name, value in row.values.items() if name not in others and _is_one(row, path, name, value)
        )
    said = row.values.get(column)
    if isinstance(said, str):
        said = _split(said)
    if said is None:
        said = []
    if not isinstance(said, list) or not all(isinstance(name, str) and name.strip() for name in said):
        raise ValueError(f"{row.place} of {path} needs a list of class names in {column}, but has {shown(said)}.")
    return tuple(dict.fromkeys(name.strip() for name in said))


def _split(cell: str) -> Any:
    """The names in a cell; a list in JSON as it is."""
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            return cell  # which is then refused
    return [name.strip() for name in re.split("[;|]", cell) if name.strip()]


def _is_one(row: _Row, path: Path, name: str, value: Any) -> bool:
    """
    Raises:
        ValueError: neither 0 nor 1.
    """
    if str(value).strip() not in ("0", "1"):
        raise ValueError(
            f"{path} needs a column of labels, {_one_of(LABEL_COLUMNS)}, or one of 0 and 1 for each class, but "
            f"{row.place.lower()} has {shown(value)} in {shown(name)}."
        )
    return str(value).strip() == "1"
