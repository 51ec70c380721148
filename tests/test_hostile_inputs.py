"""Damaged and hostile images, folders and arguments: refused by name, and the classifier stays as it was.

Adapters and class lists have a table in test_hostile_adapters, caches one in test_trunk_cache.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from bundled import IMAGE_FILES, NAMES
from PIL import Image
from small_classifier import raises
from small_sep import snapshot

from sep_peft import SEPClassifier, TaskClasses
from sep_peft.classifier.images import find_images, read_image
from sep_peft.evaluation import evaluate
from sep_peft.training.folders import read_folder, read_test


# images


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, each with its sum."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, bits: int = 8, colour: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def saved(kind: str, mode: str = "L", size: tuple[int, int] = (9, 9)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 7).save(file, kind)
    return file.getvalue()


def patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


ROWS = zlib.compress(b"\0" * 90)  # of an image 9 x 9 without any filter
END = (b"IEND", b"")
UNKNOWN = "it is empty, damaged or of no format that Pillow reads."
#: What a file holds, and the reason that is given, or how it begins.
FILES: dict[str, tuple[bytes, str]] = {
    "PNG: a bomb": (png(header(2**16, 2**16), (b"IDAT", ROWS), END), "Image size (4294967296 pixels) exceeds limit of"),
    "PNG: no width": (png(header(0, 9), (b"IDAT", ROWS), END), ""),
    "PNG: a text that unpacks to 200 MB": (
        png(header(9, 9), (b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1)), (b"IDAT", ROWS), END),
        "",
    ),
    "PNG: rows are missing": (png(header(9, 9), (b"IDAT", ROWS[:5]), END), "image file is truncated"),
    "PNG: no rows": (png(header(9, 9), END), ""),
    "PNG: another depth": (png(header(9, 9, bits=3), (b"IDAT", ROWS), END), ""),
    "PNG: a sum that is wrong": (patched(png(header(9, 9), (b"IDAT", ROWS), END), 29, b"\0\0\0\0"), ""),
    "JPEG: cut short": (IMAGE_FILES[0].read_bytes()[:2000], "image file is truncated"),
    "JPEG: the mark alone": (b"\xff\xd8\xff", UNKNOWN),
    "GIF: cut short": (saved("GIF")[:30], ""),
    "TIFF: a page that is not there": (patched(saved("TIFF"), 4, b"\xff\xff\xff\x7f"), ""),
    "BMP: a bomb": (patched(saved("BMP"), 18, struct.pack("<ii", 60000, 60000)), "Image size (3600000000 pixels)"),
    "BMP: less than no pixels": (patched(saved("BMP"), 18, struct.pack("<ii", -9, 9)), ""),
    "WebP: cut short": (saved("WEBP", "RGB")[:-9], ""),
    "a page of HTML": (b"<html><body>404 not found</body></html>", UNKNOWN),
    "a program": (b"\x7fELF\2\1\1" + bytes(100), UNKNOWN),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", UNKNOWN),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", ""),
}


class Other(NamedTuple):
    """Something else than a file, made in a folder: what it is, how a message calls it, and the reason."""

    make: Callable[[Path], Any]
    called: str
    reason: str


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def dangling(folder: Path) -> Path:
    (folder / "link.png").symlink_to(folder / "none.png")
    return folder / "link.png"


def closed(folder: Path) -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


ADDRESSES = "of addresses http, https and data:image/ are read."
OTHERS = {
    "a pipe": Other(pipe, "{folder}/pipe.png", "it is a pipe or a device, no file."),
    "a device": Other(lambda folder: "/dev/zero", "'/dev/zero'", "it is a pipe or a device, no file."),
    "a link to nothing": Other(dangling, "{folder}/link.png", "there is no such file."),
    "half a character": Other(lambda folder: "a\udcff.jpg", r"'a\udcff.jpg'", "there is no such file."),
    "a name that acts": Other(lambda folder: "\x1b[2J.jpg", r"'\x1b[2J.jpg'", "there is no such file."),
    "an address of files": Other(lambda folder: "file:///etc/passwd", "'file:///etc/passwd'", ADDRESSES),
    "an address of FTP": Other(lambda folder: "ftp://a/b.png", "'ftp://a/b.png'", ADDRESSES),
    "no base64": Other(
        lambda folder: "data:image/png;base64,a", "'data:image/png;base64,a'", "what follows the comma is no base64."
    ),
    "a file of text": Other(
        lambda folder: io.StringIO("x"),
        "<StringIO>",
        "it was opened as text. Open it in binary mode: open(path, 'rb').",
    ),
    "a closed file": Other(closed, "<BytesIO>", "I/O operation on closed file."),
    "complex numbers": Other(
        lambda folder: torch.zeros(3, 4, 4, dtype=torch.complex64),
        "<Tensor (3, 4, 4), torch.complex64>",
        "it holds complex64, but it must hold integers, bool or floats.",
    ),
    "numbers above all": Other(
        lambda folder: np.full((2, 2), 1e300),
        "<ndarray (2, 2), float64>",
        "its values of type float64 reach from 1e+300 to 1e+300, but must lie between 0 and 1. What an image processor "
        "has made is for classifier(pixel_values=...).",
    ),
}


def assert_refused(image: Any, message: str, classifier: SEPClassifier) -> None:
    """By reading, prediction and evaluation, among images that can be read."""
    before, expected = snapshot(classifier), classifier.predict(IMAGE_FILES[:1])
    match = f"^{re.escape(message)}" + ("$" if message.endswith(".") else "[^\n]+$")
    for use in (
        lambda: read_image(image),
        lambda: classifier.predict([IMAGE_FILES[0], image]),
        lambda: evaluate(classifier, [(IMAGE_FILES[0], NAMES[0]), (image, NAMES[1])]),
    ):
        with pytest.raises(ValueError, match=match):
            use()
    assert snapshot(classifier) == before and classifier.predict(IMAGE_FILES[:1]) == expected


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_image(name, imaged, tmp_path):
    content, reason = FILES[name]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert_refused(path, f"The image {str(path)!r} cannot be read: {reason}", imaged)
    if name in ("PNG: a bomb", "a page of HTML"):
        assert_refused(content, f"The image <{len(content)} bytes> cannot be read: {reason}", imaged)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_file_of_an_image(name, imaged, tmp_path):
    other = OTHERS[name]
    image = other.make(tmp_path)
    called = repr(str(image)) if isinstance(image, Path) else other.called
    assert_refused(image, f"The image {called} cannot be read: {other.reason}", imaged)


# arguments of predict


ARGUMENTS = {
    "batch_size: true": (
        {"batch_size": True},
        ValueError,
        "batch_size must be a whole number of at least 1, but got True.",
    ),
    "top_k: a part": ({"top_k": 1.0}, TypeError, "top_k must be None or a whole number, but got 1.0."),
    "top_k: true": ({"top_k": True}, TypeError, "top_k must be None or a whole number, but got True."),
    "top_k: a text": ({"top_k": "1"}, TypeError, "top_k must be None or a whole number, but got '1'."),
    "top_k: none": ({"top_k": 0}, ValueError, "top_k must be between 1 and 4, the number of classes, but got 0."),
    "task: a number": ({"task": 5}, TypeError, "task must be a name or a list of names, but got 5."),
    "task: too few": ({"task": []}, ValueError, "task must be one name or one for each of 1 image, but got 0."),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_predict(name, imaged):
    options, error, message = ARGUMENTS[name]
    with raises(message, error):
        imaged.predict(IMAGE_FILES[:1], **options)


@pytest.mark.parametrize("labels", [torch.tensor(0), torch.tensor([[0], [1]])])
def test_labels_of_another_shape(labels, imaged):
    pixels = torch.zeros(2, 3, 64, 64)
    with raises(f"Labels must have the shape (B,), one for each image, but got {tuple(labels.shape)}."):
        imaged(pixels, labels=labels)


# folders


def odd_folder(folder: Path) -> None:
    """Two classes of an image each, and beside the images what must not be read, nor stop anything."""
    for name in ("cup", "lamp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jpg").write_bytes(IMAGE_FILES[0].read_bytes())
    os.mkfifo(folder / "cup" / "pipe.png")
    (folder / "cup" / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "cup" / "again").symlink_to(folder / "cup")
    (folder / "cup" / "folder.png").mkdir()
    (folder / "lamp" / "round.png").symlink_to(folder / "lamp" / "round.png")
    deep = folder / "lamp" / Path(*["d"] * 100)
    deep.mkdir(parents=True)
    (deep / "b.jpg").write_bytes(IMAGE_FILES[1].read_bytes())


def test_a_folder_with_pipes_links_and_folders_called_like_images(tmp_path):
    folder = tmp_path / "data"
    odd_folder(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    found = read_folder(folder, shots=1, seed=0)
    assert found.names == ["cup", "lamp"] and len(found.train) == 2
    assert sorted(path.name for path, _ in read_test(folder)) == ["a.jpg", "a.jpg", "b.jpg"]
    assert [path.name for path in find_images(folder / "cup")] == ["a.jpg"]
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_classes_of_folders_whose_names_are_no_text(tmp_path, processor):
    """A folder name in another encoding is no class name; it says which to rename."""
    name = os.fsdecode(b"caf\xe9")
    try:
        (tmp_path / name).mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    (tmp_path / "tea").mkdir()
    for folder in (name, "tea"):
        (tmp_path / folder / "a.jpg").write_bytes(IMAGE_FILES[0].read_bytes())
    found = read_folder(tmp_path, shots=1, seed=0)
    with raises(r"A class name must be a text that UTF-8 can hold, but got 'caf\udce9'. Rename it."):
        TaskClasses.from_names(found.names, processor)
