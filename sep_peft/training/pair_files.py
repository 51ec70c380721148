"""Files and folders of images with captions, read and checked before anything is loaded.

A file of JSON lines has an object a line: a path below the file's folder as "file_name" or "image", its caption or a
list of captions as "text", "caption" or "captions", and perhaps a list of "negatives". A folder has such a file as
``metadata.jsonl``, as the package datasets reads it, or beside each image a .txt file of its name with a caption a
line, as open_clip and webdataset unpack theirs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..classifier.images import find_images, is_hidden, visible_files
from ..tuner.messages import listed, shown
from ..words import are, counted
from .folders import PARTS, path_below
from .pairs import Pair, is_unicode


METADATA = "metadata.jsonl"
IMAGE_KEYS, CAPTION_KEYS, NEGATIVES_KEY = ("file_name", "image"), ("text", "caption", "captions"), "negatives"
#: Longest line of JSON and largest .txt file that are read, in bytes, and problems that a message tells.
MAX_LINE, MAX_TEXT_FILE, TOLD = 2**20, 2**20, 5
#: Endings of tables, of which none is JSON lines.
TABLES = (".csv", ".tsv", ".parquet", ".xlsx")


@dataclass(frozen=True)
class PairFolder:
    """
    Args:
        train: images with captions to train on.
        tests: "val" and "test" -> those to measure on, where there are any.
        layout: how they lay there, for people, such as "metadata.jsonl".
    """

    train: list[Pair]
    tests: dict[str, list[Pair]] = field(default_factory=dict)
    layout: str = ""


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """Images with captions in a file or a folder, of a folder with parts those to train on; see `read_pair_folder`.

    Raises:
        FileNotFoundError, ValueError: as `read_pair_folder`.

    Example:
        >>> fit_pairs(model, read_pairs("pairs.jsonl"), processor=processor)
    """
    return read_pair_folder(path).train


def read_pair_folder(path: str | os.PathLike) -> PairFolder:
    """Images with captions in a file of JSON lines, or in a folder.

    A folder may have parts: ``train/``, and ``val/`` and ``test/`` if any, under the names that folders of classes may
    have for them. Lines of one image are put together. What stands there twice is left out with a warning, and so are
    images without a caption.

    Args:
        path: of a file or a folder; see the head of this file for how they look.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no images with captions, a line is no JSON object with a path and a caption, a path leads
            out of the folder, an image is missing, or a caption is blank; the message names files and lines.
    """
    path = Path(path)
    if path.is_file():
        _check_kind(path)
        return PairFolder(_of_lines(path), {}, "JSON lines")
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {shown(str(path))}.")
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not is_hidden(entry.name)]
    parts = {part: entry for entry in folders for part, names in PARTS.items() if entry.name.lower() in names}
    if (path / METADATA).is_file() or "train" not in parts:
        train, layout = _of_folder(path)
        return PairFolder(train, {}, layout)
    found = {part: _of_folder(entry) for part, entry in parts.items()}
    tests = {part: pairs for part, (pairs, _) in found.items() if part != "train"}
    return PairFolder(found["train"][0], tests, found["train"][1])


def _check_kind(file: Path) -> None:
    """
    Raises:
        ValueError: it is no file of JSON lines, as its ending or its first letter says; without this there would be a
            mistake in each of its lines.
    """
    example = '{"file_name": "a.jpg", "text": "a cat"}'
    if file.suffix.lower() in TABLES:
        raise ValueError(
            f"{shown(str(file))} is a table, but images with captions are read from JSON lines, such as {example}. "
            "Labels, of which an image may have several, are for `sep-peft train`, which takes a .csv."
        )
    with open(file, "rb") as stream:
        begin = stream.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin[:1] == b"[" and begin[1:].lstrip()[:1] in (b"{", b""):
        raise ValueError(
            f"{shown(str(file))} is one list, but images with captions are read from JSON lines: an object such as "
            f"{example} in each line, without brackets around them and commas after them."
        )


def _of_folder(folder: Path) -> tuple[list[Pair], str]:
    """The pairs of a folder without parts, and how they lie there."""
    texts = [file for file in visible_files(folder) if file.suffix.lower() == ".txt"]
    if (folder / METADATA).is_file():
        pairs = _of_lines(folder / METADATA)
        named = {os.path.normpath(pair.image) for pair in pairs}
        _warn_left_out(folder, [file for file in find_images(folder) if os.path.normpath(file) not in named], METADATA)
        return pairs, METADATA
    if texts:
        return _of_text_files(folder, texts), ".txt beside each image"
    raise ValueError(
        f"{shown(str(folder))} holds no images with captions: neither {METADATA} nor a .txt file beside each image."
    )


def _warn_left_out(folder: Path, images: list[Path], where: str) -> None:
    if images:
        names = listed(str(image.relative_to(folder)) for image in images[:3])
        more = "" if len(images) <= 3 else ", ..."
        warnings.warn(
            f"{counted(len(images), 'image')} in {shown(str(folder))} {'has' if len(images) == 1 else 'have'} no "
            f"caption in {where} and {are(len(images))} left out: {names}{more}.",
            stacklevel=2,
        )


# problems


class _Problems:
    """What is wrong, all of it in one message; and what stands there twice, which is left out."""

    def __init__(self, name: str):
        self._name, self._found, self._twice = name, [], []

    def add(self, place: str, problem: str) -> None:
        self._found.append(f"{place}: {problem}")

    def repeat(self, place: str) -> None:
        self._twice.append(place)

    def told(self) -> None:
        """
        Raises:
            ValueError: there are problems.
        """
        if self._found:
            more = f"; and {len(self._found) - TOLD} more" if len(self._found) > TOLD else ""
            raise ValueError(f"{self._name} cannot be read: {'; '.join(self._found[:TOLD])}{more}.")
        if self._twice:
            more = f" and {len(self._twice) - TOLD} more" if len(self._twice) > TOLD else ""
            warnings.warn(
                f"{self._name} has captions twice for the same image, which are left out: "
                f"{', '.join(self._twice[:TOLD])}{more}.",
                stacklevel=3,
            )


class _Collected:
    """Pairs by image, put together from where they stand."""

    def __init__(self, problems: _Problems):
        self._problems = problems
        self._of: dict[Path, tuple[dict[str, str], dict[str, str], str]] = {}

    def add(self, image: Path, captions: Iterable[str], negatives: Iterable[str], place: str, source: str) -> None:
        """
        Args:
            place: for problems, such as "line 7".
            source: for the pair, such as "pairs.jsonl, line 7".
        """
        own, against, _ = self._of.setdefault(image, ({}, {}, source))
        for texts, known in ((captions, own), (negatives, against)):
            for text in texts:
                if text in known:
                    self._problems.repeat(f"{place} ({known[text]} has {shown(text)} already)")
                known.setdefault(text, place)
        if both := next((text for text in against if text in own), None):
            self._problems.add(place, f"{shown(both)} is both a caption and a negative of the image")

    def pairs(self) -> list[Pair]:
        """In the order in which the images come first."""
        return [Pair(image, tuple(own), tuple(against), source) for image, (own, against, source) in self._of.items()]


# JSON lines


def _of_lines(file: Path) -> list[Pair]:
    problems = _Problems(shown(str(file)))
    collected = _Collected(problems)
    for number, data in _lines(file, problems):
        place = f"line {number}"
        try:
            image = _image_in(file.parent, _only(data, IMAGE_KEYS, "the path of an image"))
            captions = _texts(_only(data, CAPTION_KEYS, "a caption"), "caption")
            negatives = _texts(data.get(NEGATIVES_KEY) or [], "negative")
            if not captions:
                raise ValueError("it has no caption")
        except ValueError as error:
            problems.add(place, str(error))
        else:
            collected.add(image, captions, negatives, place, f"{file.name}, {place}")
    problems.told()
    pairs = collected.pairs()
    if not pairs:
        raise ValueError(f"{shown(str(file))} holds no images with captions.")
    return pairs


def _lines(file: Path, problems: _Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number from 1 and object of every line that is not blank."""
    with open(file, "rb") as stream:
        for count, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                problems.add(f"line {count}", f"it is longer than {MAX_LINE} bytes")
                return
            if not line.strip():
                continue
            try:
                data = json.loads(line.decode("utf-8-sig" if count == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                problems.add(f"line {count}", f"it is no JSON ({reason})")
                continue
            if isinstance(data, dict):
                yield count, data
            else:
                problems.add(f"line {count}", f"it must be a JSON object, but is {shown(data)}")


def _only(data: dict[str, Any], keys: tuple[str, ...], what: str) -> Any:
    """The value of the one key of several that is there."""
    found = [key for key in keys if key in data]
    if len(found) != 1:
        named = f"both {found[0]} and {found[1]}" if found else f"none of {', '.join(keys)}"
        raise ValueError(f"{what} must stand under one of {', '.join(keys)}, but it has {named}")
    return data[found[0]]


def _image_in(folder: Path, name: Any) -> Path:
    """The image that a line names below the folder."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the path of the image must be a text, but is {shown(name)}")
    image = path_below(folder, name)
    if not image.is_file():
        raise ValueError(f"there is no image {shown(name)}")
    return image


def _texts(value: Any, what: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a {what} must be a text or a list of texts, but is {shown(value)}")
    if any(not text.strip() for text in texts):
        raise ValueError(f"a {what} is blank")
    if bad := next((text for text in texts if not is_unicode(text)), None):
        raise ValueError(f"a {what} is no text that UTF-8 can hold: {shown(bad)}")
    return [text.strip() for text in texts]


# text files


def _of_text_files(folder: Path, texts: list[Path]) -> list[Pair]:
    """Pairs of images and the files of text beside them."""
    images: dict[Path, list[Path]] = {}
    for image in find_images(folder):
        images.setdefault(image.with_suffix(""), []).append(image)
    problems = _Problems(shown(str(folder)))
    collected, told = _Collected(problems), set()
    for file in sorted(texts):
        name, mine = str(file.relative_to(folder)), images.get(file.with_suffix(""), [])
        told |= set(mine)
        if len(mine) != 1:
            found = f"{len(mine)} images are beside it" if mine else "there is no image beside it"
            problems.add(shown(name), found)
            continue
        for number, line in _text_lines(file, shown(name), problems):
            collected.add(mine[0], [line], [], f"{shown(name)} line {number}", f"{name}, line {number}")
    _warn_left_out(folder, sorted({image for each in images.values() for image in each} - told), "a .txt file")
    problems.told()
    return collected.pairs()


def _text_lines(file: Path, name: str, problems: _Problems) -> list[tuple[int, str]]:
    """Number from 1 and text of every line that is not blank."""
    if (size := file.stat().st_size) > MAX_TEXT_FILE:
        problems.add(name, f"it has {size} bytes, but at most {MAX_TEXT_FILE} are read")
        return []
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        problems.add(name, f"it is no UTF-8 ({error.reason} at byte {error.start})")
        return []
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        problems.add(name, "it is blank")
    return found
