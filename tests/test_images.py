"""Images mean what they show, whatever they are handed over as, and what is refused is named."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from bundled import IMAGE_FILES, scores_of
from fresh import usual
from PIL import Image
from small_classifier import raises
from transformers.image_utils import httpx

from sep_peft.classifier import images as reading
from sep_peft.classifier.images import as_images, find_images, listed_endings, other_endings, read_image


WHITE, BLACK, GREEN = (255, 255, 255), (0, 0, 0), (0, 128, 0)
#: Gray of 8 bits, (4, 6), from black to white.
RAMP = np.linspace(0, 255, 24).round().astype(np.uint8).reshape(4, 6)  # (24,) -> (H, W)
COLORS = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)


def pixels(image) -> np.ndarray:
    """(H, W, 3)."""
    found = read_image(image)
    assert found.mode == "RGB"
    return np.asarray(found)


def shows(image, gray: np.ndarray) -> bool:
    """Whether it shows gray of 8 bits (H, W)."""
    return bool((np.abs(pixels(image).astype(int) - gray[..., None]) <= 1).all())


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def no_image(path: Path) -> Path:
    path.write_bytes(b"no image")
    return path


# gray of more than 8 bits


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize(
    "gray",
    [
        RAMP,
        RAMP.astype(np.uint16) * 257,
        RAMP.astype(np.int32),
        RAMP.astype(np.int32) * 257,
        (RAMP.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32),
        RAMP.astype(np.float32) / 255,
        RAMP.astype(np.float32),
        RAMP.astype(np.float32) * 257,
        RAMP.astype(np.float32) * 1e6,
    ],
    ids=["8", "16", "32 as 8", "32 as 16", "32", "float to 1", "float to 255", "float to 65535", "float to 2.55e8"],
)
def test_gray(gray, ending, tmp_path):
    image = Image.fromarray(gray)
    assert shows(image, RAMP)
    if ending == "tif" or image.mode in ("L", "I;16"):  # PNG has no more than 16 bits
        assert shows(save(image, tmp_path / f"gray.{ending}"), RAMP)


def test_gray_of_16_bits_in_big_endian():
    image = Image.frombytes("I;16B", (6, 4), (RAMP.astype(np.uint16) * 257).astype(">u2").tobytes())
    assert shows(image, RAMP)


def test_dark_gray_of_16_bits_stays_dark():
    assert pixels(Image.fromarray(RAMP.astype(np.uint16))).max() == 1


def test_below_zero_is_black():
    gray = RAMP.astype(np.float32)
    gray[0] = -50
    assert shows(Image.fromarray(gray), np.where(gray < 0, 0, RAMP))


def test_one_gray_of_16_bits_that_is_transparent(tmp_path):
    gray = RAMP.astype(np.uint16) * 257
    path = save(Image.fromarray(gray), tmp_path / "gray.png", transparency=int(gray[0, 0]))
    assert shows(path, np.where(gray == gray[0, 0], 255, RAMP))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gray_that_is_not_finite(value, tmp_path):
    gray = RAMP.astype(np.float32)
    gray[1, 1] = value
    path = save(Image.fromarray(gray), tmp_path / "gray.tif")
    with raises(f"The image {str(path)!r} cannot be read: it has pixels that are no finite numbers."):
        read_image(path)


# transparency, palettes, colours


def half_transparent(mode: str) -> Image.Image:
    """(2 x 1) pixels: green or its gray, and a transparent one with black below."""
    image = Image.new("RGBA", (2, 1), (*GREEN, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image.convert("LA" if mode == "La" else "RGBA" if mode == "RGBa" else mode).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparent_is_white(mode):
    if mode == "PA":
        image = Image.new("PA", (2, 1), (0, 255))
        image.putpalette(bytes(GREEN) + bytes(3 * 255))
        image.putpixel((1, 0), (1, 0))
    else:
        image = half_transparent(mode)
    green = (75,) * 3 if mode in ("LA", "La") else GREEN
    assert pixels(image).tolist() == [[list(green), list(WHITE)]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_transparent_files(mode, ending, tmp_path):
    options = {"lossless": True} if ending == "webp" else {}
    found = pixels(save(half_transparent(mode), tmp_path / f"image.{ending}", **options))
    assert found[0, 1].tolist() == list(WHITE) and found[0, 0].tolist() != list(WHITE)


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_transparent_entry_of_a_palette(ending, tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*GREEN, *BLACK])
    image.putpixel((1, 0), 1)
    path = tmp_path / f"image.{ending}"
    assert pixels(save(image, path)).tolist() == [[list(GREEN), list(BLACK)]]
    assert pixels(save(image, path, transparency=1)).tolist() == [[list(GREEN), list(WHITE)]]


@pytest.mark.parametrize(("mode", "transparent"), [("RGB", (0, 0, 0)), ("L", 0), ("1", 0)])
def test_one_colour_that_is_transparent(mode, transparent, tmp_path):
    image = Image.new(mode, (2, 1), 255 if mode != "RGB" else GREEN)
    image.putpixel((1, 0), transparent)
    first = GREEN if mode == "RGB" else WHITE
    assert pixels(image).tolist() == [[list(first), list(BLACK)]]
    path = save(image, tmp_path / "image.png", transparency=transparent)
    assert pixels(path).tolist() == [[list(first), list(WHITE)]]


def test_partly_transparent_is_mixed_with_white():
    assert pixels(Image.new("RGBA", (1, 1), (*BLACK, 128))).tolist() == [[[127] * 3]]


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P", "1", "L"])
def test_other_modes_are_as_pillow_shows_them(mode):
    image = Image.open(IMAGE_FILES[0]).convert("RGB").convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))
    assert pixels(image).std() > 10


def test_cmyk_file(tmp_path):
    color = Image.new("RGB", (8, 8), (200, 30, 60))
    found = pixels(save(color.convert("CMYK"), tmp_path / "image.jpg", quality=95))
    assert np.abs(found.astype(int) - [200, 30, 60]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_rotation_is_done(orientation, ending, tmp_path):
    image = Image.fromarray(COLORS)
    image.getexif()[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    path = save(image, tmp_path / f"image.{ending}", exif=image.getexif(), **options)
    steps = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
    steps |= {7: "TRANSVERSE", 8: "ROTATE_90"}
    upright = Image.fromarray(COLORS)
    if orientation > 1:
        upright = upright.transpose(Image.Transpose[steps[orientation]])
    np.testing.assert_array_equal(pixels(path), np.asarray(upright))


def test_rotation_of_gray_of_16_bits(tmp_path):
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    image.getexif()[0x0112] = 6
    path = save(image, tmp_path / "image.png", exif=image.getexif())
    assert shows(path, np.asarray(Image.fromarray(RAMP).transpose(Image.Transpose.ROTATE_270)))


def test_what_was_handed_over_stays_as_it_is():
    image = half_transparent("RGBA")
    before = image.tobytes()
    read_image(image).putpixel((0, 0), BLACK)
    assert (image.mode, image.tobytes()) == ("RGBA", before)
    plain = Image.fromarray(COLORS)
    read_image(plain).putpixel((0, 0), WHITE)
    np.testing.assert_array_equal(np.asarray(plain), COLORS)


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (3, 3), color) for color in (GREEN, BLACK)]
    path = save(frames[0], tmp_path / "image.tif", save_all=True, append_images=frames[1:])
    assert pixels(path)[0, 0].tolist() == list(GREEN)


def test_heic(tmp_path):
    pytest.importorskip("pillow_heif")
    path = save(Image.new("RGB", (64, 64), GREEN), tmp_path / "image.HEIC", format="HEIF")
    assert find_images(tmp_path) == [path]
    assert np.abs(pixels(path).astype(int) - GREEN).max() <= 6


def test_heic_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "HEIF_ENDINGS", frozenset())
    path = no_image(tmp_path / "image.HEIC")
    with raises(
        f"The image {str(path)!r} cannot be read: HEIC needs the package pillow-heif: pip install pillow-heif.",
    ):
        read_image(path)


# what an image may be


FLOATS = torch.from_numpy(COLORS).permute(2, 0, 1) / 255  # (3, H, W)
ROW = {"bytes": IMAGE_FILES[0].read_bytes(), "path": None}
KINDS = {
    "array": COLORS,
    "array, channels first": COLORS.transpose(2, 0, 1),
    "array of floats": COLORS / 255,
    "array of int64": COLORS.astype(np.int64),
    "array of uint16": COLORS.astype(np.uint16) * 257,
    "array with transparency": np.concatenate([COLORS, np.full((5, 6, 1), 255, np.uint8)], axis=2),
    "array, not contiguous": COLORS[:, ::-1][:, ::-1],
    "tensor": torch.from_numpy(COLORS).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy(COLORS),
    "tensor of floats": FLOATS,
    "tensor of float64": FLOATS.double(),
    "tensor with gradient": FLOATS.clone().requires_grad_(),
}


@pytest.mark.parametrize("image", KINDS.values(), ids=KINDS)
def test_arrays_and_tensors(image):
    np.testing.assert_array_equal(pixels(image), COLORS)


def test_tensor_of_bfloat16():
    assert np.abs(pixels(FLOATS.bfloat16()).astype(int) - COLORS).max() <= 1


@pytest.mark.parametrize(
    ("image", "white"),
    [
        (RAMP, None),
        (RAMP[..., None], None),
        (RAMP[None], None),
        (torch.from_numpy(RAMP)[None] / 255, None),
        (RAMP.astype(np.float16) / 255, None),
        (RAMP > 127, RAMP > 127),
        ((RAMP > 127).astype(np.float32), RAMP > 127),
    ],
    ids=["(H, W)", "(H, W, 1)", "(1, H, W)", "tensor", "float16", "bool", "floats of 0 and 1"],
)
def test_gray_arrays(image, white):
    assert shows(image, RAMP if white is None else np.where(white, 255, 0))


def test_both_ends_may_be_channels():
    array = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(array), array)
    np.testing.assert_array_equal(pixels(torch.from_numpy(array)), array.transpose(1, 2, 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: path.open("rb"),
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}",
        lambda path: np.asarray(Image.open(path).convert("RGB")),
    ],
    ids=["bytes", "bytearray", "BytesIO", "file", "row of bytes", "row with path", "data URL", "array"],
)
def test_one_image_and_many_of_a_kind(make, imaged):
    expected = imaged.predict(IMAGE_FILES[:2])
    assert scores_of(imaged.predict(make(IMAGE_FILES[0]))) == pytest.approx(scores_of(expected[0]), abs=1e-5)
    found = imaged.predict([make(path) for path in IMAGE_FILES[:2]])
    assert [scores_of(one) for one in found] == [pytest.approx(scores_of(one), abs=1e-5) for one in expected]


def test_a_file_of_the_user_stays_open():
    with IMAGE_FILES[0].open("rb") as file:
        first = pixels(file)
        np.testing.assert_array_equal(pixels(file), first)


@pytest.mark.parametrize(
    "several",
    [
        lambda: (path for path in IMAGE_FILES),
        lambda: iter(IMAGE_FILES),
        lambda: map(str, IMAGE_FILES),
        lambda: dict(enumerate(IMAGE_FILES)).values(),
        lambda: np.array([str(path) for path in IMAGE_FILES]),
        lambda: column(decode=True),
        lambda: column(decode=False),
    ],
    ids=["generator", "iterator", "map", "values", "array of paths", "column", "column of bytes"],
)
def test_what_several_images_may_be(several, imaged):
    assert imaged.predict(several()) == imaged.predict(IMAGE_FILES)


def column(decode: bool) -> datasets.Column:
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in IMAGE_FILES], "label": [0, 1, 2, 3]})
    return rows.cast_column("image", datasets.Image(decode=decode))["image"]


def test_batches_of_arrays():
    assert as_images(np.zeros((2, 4, 6, 3)))[1] is False and len(as_images(torch.zeros(5, 3, 4, 6))[0]) == 5
    assert as_images(torch.zeros(3, 4, 6))[1] is True and as_images(torch.zeros(4, 6))[1] is True


def test_address(monkeypatch):
    def get(address, **options):
        status = 200 if address.endswith(".jpg") else 404
        content = IMAGE_FILES[0].read_bytes() if status == 200 else b"<html>"
        return httpx.Response(status, content=content, request=httpx.Request("GET", address))

    monkeypatch.setattr(httpx, "get", get)
    np.testing.assert_array_equal(pixels("https://example.com/a.jpg"), pixels(IMAGE_FILES[0]))
    with pytest.raises(
        ValueError,
        match=r"^The image 'https://example.com/a' cannot be read: Client error '404 Not Found' for url '.+$",
    ):
        read_image("https://example.com/a")


# what is refused


def wide(path: Path) -> Path:
    return save(Image.new("L", (100_000, 1)), path)


def bomb(path: Path) -> Path:
    """A header that promises 60000 x 60000 pixels."""
    content = bytearray(save(Image.new("L", (1, 1)), path, format="bmp").read_bytes())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    return path


UNKNOWN = "it is empty, damaged or of no format that Pillow reads."
KINDS_OF_IMAGE = " is no image. An image is a path, an address, a PIL.Image, bytes, an open file, an array or a tensor."
SIDES = "but one side may be at most 200 times as long as the other. Cut it into parts."
SHAPES = "but it must be (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 channels."
MADE = " What an image processor has made is for classifier(pixel_values=...)."
REFUSED = {
    "no path": (lambda _: "nowhere.jpg", "'nowhere.jpg'", "there is no such file."),
    "blank": (lambda _: "", "''", "there is no such file."),
    "NUL": (lambda _: "a\0.jpg", r"'a\x00.jpg'", "there is no such file."),
    "long": (lambda _: "a" * 5000, f"'{'a' * 199}... (5002 characters)", "there is no such file."),
    "base64 alone": (lambda _: "aGVsbG8", "'aGVsbG8'", "there is no such file."),
    "folder": (
        lambda path: path.parent,
        "{parent!r}",
        "it is a folder. Pass the images in it: sep_peft.folders.find_images(folder).",
    ),
    "text file": (no_image, "{path!r}", UNKNOWN),
    "bytes": (lambda _: b"no image", "<8 bytes>", UNKNOWN),
    "no bytes": (lambda _: b"", "<0 bytes>", UNKNOWN),
    "file": (lambda _: io.BytesIO(b"no image"), "<BytesIO>", UNKNOWN),
    "named file": (lambda path: no_image(path).open("rb"), "<file {name!r}>", UNKNOWN),
    "wide": (wide, "{path!r}", f"its size is 100000 x 1, {SIDES}"),
    "wide array": (
        lambda _: np.zeros((1, 201), np.uint8),
        "<ndarray (1, 201), uint8>",
        f"its size is 201 x 1, {SIDES}",
    ),
    "0 x 0": (lambda _: Image.new("RGB", (0, 0)), "<Image, RGB, 0 x 0>", "it has no pixels, its size is 0 x 0."),
    "0 wide": (lambda _: np.zeros((4, 0, 3)), "<ndarray (4, 0, 3), float64>", "it has no pixels, its size is 0 x 4."),
    "bomb": (
        bomb,
        "{path!r}",
        "Image size (3600000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack.",
    ),
    "None": (lambda _: None, "<NoneType>", f"NoneType{KINDS_OF_IMAGE}"),
    "number": (lambda _: 3, "<int>", f"int{KINDS_OF_IMAGE}"),
    "list in a list": (lambda _: ["a.jpg"], "<list>", f"list{KINDS_OF_IMAGE}"),
    "row": (
        lambda _: {"image": "a.jpg", "label": 1},
        "<dict>",
        "it is a mapping of image, label. Pass the image in it alone, such as row['image'].",
    ),
    "vector": (lambda _: np.zeros(7), "<ndarray (7,), float64>", f"its shape is (7,), {SHAPES}"),
    "channels": (
        lambda _: torch.zeros(2, 8, 8),
        "<Tensor (2, 8, 8), torch.float32>",
        f"its shape is (2, 8, 8), {SHAPES}",
    ),
    "normalized": (
        lambda _: torch.linspace(-1.8, 2.1, 12).view(3, 2, 2),
        "<Tensor (3, 2, 2), torch.float32>",
        "its values of type float32 reach from -1.8 to 2.1, but must lie between 0 and 1." + MADE,
    ),
    "NaN": (
        lambda _: np.array([[0.5, np.nan]]),
        "<ndarray (1, 2), float64>",
        "its values of type float64 reach from nan to nan, but must lie between 0 and 1." + MADE,
    ),
    "integers": (
        lambda _: np.array([[0, 300]]),
        "<ndarray (1, 2), int64>",
        "its values of type int64 reach from 0 to 300, but must lie between 0 and 255.",
    ),
    "objects": (
        lambda _: np.array([["a", "b"]]),
        "<ndarray (1, 2), <U1>",
        "it holds <U1, but it must hold integers, bool or floats.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path, imaged):
    make, described, reason = REFUSED[name]
    path = tmp_path / "image.png"
    image = make(path)
    described = described.format(path=str(path), parent=str(tmp_path), name=str(path))
    message = f"The image {described} cannot be read: {reason}"
    with raises(message):
        read_image(image)
    with raises(message):
        imaged.predict([IMAGE_FILES[0], image])


def test_data_url_is_not_printed():
    address = f"data:image/png;base64,{'A' * 4000}"
    with pytest.raises(ValueError, match=r"^The image 'data:image/png;base64,A+\.\.\. \(4024 characters\) cannot be"):
        read_image(address)


def test_truncated_image_is_refused_in_one_line(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(IMAGE_FILES[0].read_bytes()[:1500])
    with pytest.raises(
        ValueError, match=rf"^The image {re.escape(repr(str(path)))} cannot be read: image file is truncated.*$"
    ):
        read_image(path)


def test_a_long_image_takes_no_memory(tmp_path):
    """Reading and preparing it fits into what Python with torch takes, and 300 MB; resized it would be 4 GB."""
    wide(tmp_path / "image.png")
    code = """
import resource, sys
from sep_peft.classifier.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1])
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = usual().run(code, tmp_path / "image.png")
    assert int(result.stdout) < 300_000, result.stderr  # KiB


# damaged files


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged TIFF files
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_damaged_files_are_read_or_refused(ending, tmp_path):
    """Flipped, lost and inserted bytes: an RGB image or a ValueError that names the file, never anything else."""
    path = tmp_path / f"image.{ending}"
    whole = save(Image.open(IMAGE_FILES[0]).convert("RGB").resize((40, 30)), path).read_bytes()
    source, outcomes = np.random.default_rng(5), Counter()
    for _ in range(60):
        content, place = bytearray(whole), int(source.integers(len(whole)))
        kind = int(source.integers(3))
        if kind == 0:
            for index in source.integers(len(whole), size=8):
                content[index] ^= int(source.integers(1, 256))
        elif kind == 1:
            del content[place:]
        else:
            content[place:place] = source.bytes(16)
        path.write_bytes(content)
        try:
            outcomes[read_image(path).mode] += 1
        except ValueError as error:
            assert re.match(rf"The image {re.escape(repr(str(path)))} cannot be read: .+", str(error))
            outcomes["refused"] += 1
    assert outcomes["refused"] >= 5 and set(outcomes) <= {"RGB", "refused"}


# endings


def test_endings_that_are_not_read(tmp_path):
    (tmp_path / "below" / ".hidden").mkdir(parents=True)
    (tmp_path / "__MACOSX").mkdir()
    for name in ("a.PNG", "b.xyz", "below/c.XYZ", "below/notes", ".d.png", "below/.hidden/e.png", "__MACOSX/f.png"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_images(tmp_path)] == ["a.PNG"]
    found = other_endings(tmp_path)
    assert found == {".xyz": 2, "": 1}
    assert listed_endings(found) == "3 files: 2 .xyz, 1 without an ending"
    assert listed_endings({".heic": 1}) == "1 file: 1 .heic"


def test_every_ending_is_one_that_pillow_reads():
    Image.init()
    assert {Image.EXTENSION.get(ending) for ending in reading.ENDINGS} <= set(Image.OPEN)
