"""Reading images: what users hand over as 8-bit RGB, and the images in a folder."""

from __future__ import annotations

import base64
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from io import BytesIO, TextIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

# the one that transformers and huggingface_hub read addresses with: httpx or, with newer ones of these, httpx2
from transformers.image_utils import httpx  # pyright: ignore[reportPrivateImportUsage]

from ..words import counted


try:
    import pillow_heif  # pyright: ignore[reportMissingImports]  # no extra of this package asks for it
except ImportError:
    HEIF_ENDINGS = frozenset()
else:
    pillow_heif.register_heif_opener()
    HEIF_ENDINGS = frozenset({".heic", ".heif"})

#: Endings of images that this machine can read; HEIC where the package pillow-heif is installed.
ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}) | HEIF_ENDINGS
if features.check("avif"):
    ENDINGS |= {".avif"}
#: The longer side over the shorter. A processor that resizes the shorter side to 224 makes 10 million pixels of such an
#: image; without a limit 1 x 100000 pixels, 300 bytes on disk, take 4 GB.
MAX_RATIO = 200
#: Pixels of an image that are converted at a time.
STRIP_PIXELS = 2**20
#: Seconds without an answer after which an address counts as unreadable.
TIMEOUT = 30
#: Mode of Pillow -> values that may stand for white; the smallest that no pixel exceeds is taken.
WHITE = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}


# one image


def read_image(image: Any) -> Image.Image:
    """One image as it is shown, in RGB with 8 bits a channel.

    What the file says of its rotation (EXIF) is done. Transparent parts are composited on white. Gray of 16 bits is
    scaled from 0...65535; of 32 bits from 0 to the first of 255, 65535 and 2^31 - 1 that no pixel exceeds, and in
    floats to the first of 1, 255, 65535 and the largest pixel; below 0 is black. Of several frames the first is read.

    Args:
        image: one of

            - a path, an address (http, https) or a data URL;
            - a `PIL.Image`;
            - the bytes of an image file, or a file opened in binary mode;
            - a numpy array (H, W), (H, W, channels) or (channels, H, W), or a tensor of these shapes, of 1, 3 or 4
              channels: integers from 0 to 255, bool, uint16 from 0 to 65535, or floats from 0 to 1. Where both ends may
              be the channels, they are the last of an array and the first of a tensor;
            - ``{"bytes": ..., "path": ...}``, as the package datasets has images that it did not decode.

    Raises:
        ValueError: it cannot be read, has no pixels, is a decompression bomb by `PIL.Image.MAX_IMAGE_PIXELS`, has one
            side more than 200 times as long as the other, or is no image; the message names it.
    """
    try:
        opened = _open(image)
        with nullcontext() if opened is image else opened:
            _check_size(*opened.size)
            return _as_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise ValueError(f"The image {_described(image)} cannot be read: {_unknown_format(image)}") from error
    except Exception as error:  # Pillow, httpx and codecs raise many kinds; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"The image {_described(image)} cannot be read: {reason}") from error


def as_images(images: Any) -> tuple[list, bool]:
    """What was handed over as a list of images, and whether it is one image alone.

    Args:
        images: one image as `read_image` takes it, or several: a list, another iterable such as a generator or a
            column of the package datasets, or an array or tensor (B, ...) of them.
    """
    return ([images], True) if _is_single(images) else (list(images), False)


def _is_single(images: Any) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim in (0, 2, 3)
    one = (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Image.Image)
    return isinstance(images, one) or hasattr(images, "read") or not isinstance(images, Iterable)


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Mapping):
        if set(image) != {"bytes", "path"}:
            keys = ", ".join(map(str, image))
            raise TypeError(f"it is a mapping of {keys}. Pass the image in it alone, such as row['image'].")
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Image.open(BytesIO(image))
    if hasattr(image, "read"):
        if isinstance(image, TextIOBase):
            raise TypeError("it was opened as text. Open it in binary mode: open(path, 'rb').")
        return Image.open(image)
    if isinstance(image, (str, os.PathLike)):
        return _open_named(os.fspath(image))
    raise TypeError(
        f"{type(image).__name__} is no image. An image is a path, an address, a PIL.Image, bytes, an open file, an "
        "array or a tensor."
    )


def _open_named(name: str) -> Image.Image:
    if name.startswith(("http://", "https://")):
        answer = httpx.get(name, timeout=TIMEOUT, follow_redirects=True).raise_for_status()
        return Image.open(BytesIO(answer.content))
    if name.startswith("data:image/"):
        return Image.open(BytesIO(_from_base64(name.partition(",")[2])))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise ValueError("of addresses http, https and data:image/ are read.")
    if os.path.isdir(name):
        raise IsADirectoryError("it is a folder. Pass the images in it: sep_peft.folders.find_images(folder).")
    if not os.path.exists(name):
        raise FileNotFoundError("there is no such file.")
    if not os.path.isfile(name):  # reading a pipe could wait for ever
        raise ValueError("it is a pipe or a device, no file.")
    return Image.open(name)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("what follows the comma is no base64.") from error


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    allowed, shape = (1, 3, 4), array.shape
    if array.ndim == 3:
        if shape[0] in allowed and (channels_first or shape[2] not in allowed):
            array = array.transpose(1, 2, 0)  # (channels, H, W) -> (H, W, channels)
        if array.shape[2] == 1:
            array = array[..., 0]  # (H, W, 1) -> (H, W)
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in allowed):
        raise ValueError(
            f"its shape is {shape}, but it must be (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 "
            "channels."
        )
    _check_size(array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(array)))


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    kind = array.dtype
    if kind.kind not in "buif":
        raise TypeError(f"it holds {kind}, but it must hold integers, bool or floats.")
    low, high = array.min(), array.max()
    white = 65535 if kind == np.uint16 else 1 if kind.kind in "bf" else 255
    if not (low >= 0 and high <= white):  # NaN fails as well
        hint = " What an image processor has made is for classifier(pixel_values=...)." if kind.kind == "f" else ""
        raise ValueError(
            f"its values of type {kind} reach from {low:.4g} to {high:.4g}, but must lie between 0 and {white}.{hint}"
        )
    return array if kind == np.uint8 else (array.astype(np.float64) * (255 / white)).round().astype(np.uint8)


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise ValueError(f"it has no pixels, its size is {width} x {height}.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"its size is {width} x {height}, but one side may be at most {MAX_RATIO} times as long as the other. Cut "
            "it into parts."
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    mode = "I;16" if image.mode.startswith("I;16") else image.mode  # also in big endian
    if mode in WHITE:
        convert = _gray_to_rgb(image, WHITE[mode])
    elif image.has_transparency_data:
        convert = _on_white
    else:
        return image if image.mode == "RGB" else image.convert("RGB")
    shown = Image.new("RGB", image.size)
    for box, strip in _strips(image):
        shown.paste(convert(strip), box)
    return shown


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Box and content of each strip of some rows, so that no conversion needs memory for the whole image."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _on_white(image: Image.Image) -> Image.Image:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _gray_to_rgb(image: Image.Image, whites: tuple[int, ...]) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of a part of the image, by the first white that no pixel of the whole exceeds."""
    tops = [np.asarray(strip).max() for _, strip in _strips(image)]  # NaN where there is any
    bottoms = [np.asarray(strip).min() for _, strip in _strips(image)]
    if not np.isfinite([*tops, *bottoms]).all():
        raise ValueError("it has pixels that are no finite numbers.")
    top = float(max(tops))
    white = next((white for white in whites if top <= white), top)
    transparent = image.info.get("transparency")

    def convert(part: Image.Image) -> Image.Image:
        values = np.asarray(part).astype(np.float64)  # (H, W)
        if isinstance(transparent, int):  # one gray of a PNG that stands for transparent
            values[values == transparent] = white
        gray = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")

    return convert


def _described(image: Any, longest: int = 200) -> str:
    """What it is, without its data."""
    if isinstance(image, Image.Image):
        return f"<{type(image).__name__}, {image.mode}, {image.width} x {image.height}>"
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return f"<{type(image).__name__} {tuple(image.shape)}, {image.dtype}>"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"<{len(image)} bytes>"
    if isinstance(image, (str, os.PathLike)):
        text = repr(os.fspath(image))
        return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
    if isinstance(getattr(image, "name", None), str):
        return f"<file {image.name!r}>"
    return f"<{type(image).__name__}>"


def _unknown_format(image: Any) -> str:
    if not HEIF_ENDINGS and str(image).lower().endswith((".heic", ".heif")):
        return "HEIC needs the package pillow-heif: pip install pillow-heif."
    return "it is empty, damaged or of no format that Pillow reads."


# folders


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The images in a folder and below, by their endings, sorted.

    What is hidden is left out: files and folders whose name begins with a dot, and ``__MACOSX``.
    """
    return sorted(filter(is_image, visible_files(folder)))


def is_image(path: Path) -> bool:
    """Whether a file is one of the user's images, by its name."""
    return path.suffix.lower() in ENDINGS and not is_hidden(path.name)


def other_endings(folder: str | os.PathLike) -> Counter[str]:
    """How many files in a folder and below, without hidden ones, have an ending that is not read.

    Returns:
        ending in lower case -> files; "" for files without any.
    """
    endings = (path.suffix.lower() for path in visible_files(folder))
    return Counter(sorted(ending for ending in endings if ending not in ENDINGS))


def listed_endings(endings: Mapping[str, int]) -> str:
    """In words, such as "3 files: 2 .heic, 1 without an ending"; the most frequent first."""
    counts = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in Counter(endings).most_common())
    total = sum(endings.values())
    return f"{counted(total, 'file')}: {counts}"


def warn_left_out(folder: str | os.PathLike, endings: Mapping[str, int], more: str = "") -> None:
    """Warn of files that are not read, if there are any.

    Args:
        folder: that they are below.
        endings: as `other_endings` gives them.
        more: a sentence to add, with a space before it.
    """
    if endings:
        read = ", ".join(sorted(ENDINGS))
        message = f"Left out below {os.fspath(folder)} are {listed_endings(endings)}.{more} Read are {read}."
        warnings.warn(message, stacklevel=3)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images: hidden, or what macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def visible_files(folder: str | os.PathLike) -> Iterator[Path]:
    """All files in a folder and below that are not hidden and in no hidden folder."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (path for name in files if not is_hidden(name) and (path := Path(place, name)).is_file())
