"""Random damage to the files of an adapter and to images: loaded with a finite answer, or refused by a clear error.

Every round has a seed of its own, so one that fails can be run alone. `SEP_FUZZ_ROUNDS` runs more of them than CI does.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_classifier import CLASSES, IMAGES, TEMPLATES, make_model

from sep_peft import SEPClassifier, hotswap_adapter
from sep_peft.classifier.images import read_image
from sep_peft.classifier.prediction import predict_batch
from sep_peft.cli.info import info
from sep_peft.cli.session import AdapterSource, Session
from sep_peft.tuner.current import chosen_adapters
from sep_peft.tuner.messages import acts


#: Rounds of each kind of file.
ROUNDS = int(os.environ.get("SEP_FUZZ_ROUNDS", "40"))
FIRST = int(os.environ.get("SEP_FUZZ_FIRST", "0"))
CONFIG, CLASS_FILE = "adapter_config.json", "sep_classes.json"
PICKLED = "adapter_model.bin"
WEIGHTS, PROTOTYPES = "adapter_model.safetensors", "sep_prototypes.safetensors"
#: Errors that say something to users; all others are mistakes of the package.
CLEAR = (ValueError, SafetensorError, FileNotFoundError, NotADirectoryError)
#: What Python says where nothing was checked.
INTERNAL = re.compile(
    "object is not|object has no|has no attribute|unhashable|argument|must be (str|real|int)\\b|NoneType|indices must|"
    "not supported between|index out of range|invalid literal|unpack|be broadcast|traceback|RuntimeError|size of tensor"
)
SECONDS = 5


# damage to JSON


NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, 1e-9]
NUMBERS += [math.nan, math.inf, -math.inf, True, False]
TEXTS = ["", " ", "\0", "a", "text_model", "..", "/etc/passwd", "\u202e", "\x1b[2J", "\ud800", "\U0001f600", "x" * 5000]
TEXTS += ["none", "SEP", "LORA", "{}", "<script>", "__class__", "\n---\n", "cls", "nan", "é" * 50]
#: Stands for lists in lists, so many deep.
DEEP = [f"<deep {depth}>" for depth in (10, 100, 900, 5000)]
KEYS = [*TEXTS, "self", "cls", "kwargs", "runtime_config", "peft_type", "names", "path", "layers", "input_ids"]


def any_value(rng: random.Random, depth: int = 0):
    """A value of JSON of any kind."""
    kind = rng.randrange(4 if depth > 3 else 7)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return None
    if kind == 3:
        return rng.choice([[], {}, [[]], [None], [0], [""], {"": 0}])
    if kind == 4:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(KEYS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(DEEP)


def places(data, path=()) -> list[tuple]:
    """Paths of all values in it."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return found + [place for key, value in items for place in places(value, (*path, key))]


def changed_json(rng: random.Random, data: dict) -> bytes:
    """With one to three values changed, removed, added or of another type, then perhaps the text damaged."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.randrange(1, 4)):
        *way, last = rng.choice(places(data))
        holder = data
        for key in way:
            holder = holder[key] if isinstance(holder, (dict, list)) else {}
        kind = rng.randrange(5)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = any_value(rng, 1)
        elif kind == 2 and isinstance(holder[last], (int, float)):
            holder[last] = rng.choice(NUMBERS)
        elif kind == 3 and isinstance(holder[last], (list, str)):
            holder[last] = holder[last] * rng.choice([0, 2, 50])
        else:
            holder[last] = any_value(rng, 1)
        if not data:
            break
    return damaged_text(rng, dumped(data))


def dumped(data) -> bytes:
    text = json.dumps(data, indent=1)
    return re.sub(r'"<deep (\d+)>"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text).encode()


def damaged_text(rng: random.Random, text: bytes) -> bytes:
    kind = rng.randrange(20)
    place = rng.randrange(len(text) + 1)
    if kind == 0:
        return text[:place]
    if kind == 1:
        return text[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5))) + text[place:]
    if kind == 2:
        return text.decode(errors="replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"]))
    if kind == 3:
        return text[:place] + rng.choice([b"[", b"{", b'{"a":']) * rng.choice([10, 3000, 200_000]) + text[place:]
    if kind == 4:
        return text.replace(b"{", b'{"names": [], "peft_type": "SEP",', 1)  # a key twice
    if kind == 5:
        return rng.choice(
            [b"", b"null", b"[]", b"0", b'"SEP"', b"\0" * 100, text * 2, b"NaN", b" " * 1000, b"9" * 9999]
        )
    return text


# damage to safetensors


def changed_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, length or end."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        length = rng.choice([0, 1, 7, size - 1, size + 1, 2**20, 2**31, 2**32, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + data[8:]
    if kind == 2:
        place = rng.randrange(min(len(data), 8 + size))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 3:
        changed = damaged_text(rng, changed_json(rng, header))
        return struct.pack("<Q", len(changed)) + changed + body
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    if kind == 4:
        entry["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", "", 5, None]
        )
    elif kind == 5:
        entry["shape"] = rng.choice(
            [[], [0], [2**40, 2**40], [-1], entry["shape"][::-1], [*entry["shape"], 1], "x", [1.5]]
        )
    elif kind == 6:
        low, high = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[high, low], [low, high + 4], [low, 2**63], [0, 0], [-1, high], [low], "x"])
    else:
        low, high = entry["data_offsets"]
        count = rng.choice([1, 4, high - low])
        place = rng.randrange(low, max(low + 1, high - count + 1))
        body = body[:place] + bytes(rng.randrange(256) for _ in range(count)) + body[place + count :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed_pickle(rng: random.Random, data: bytes) -> bytes:
    """What torch.save wrote, cut short, with other bytes, or with something else than tensors."""
    kind, place = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes(rng.randrange(256) for _ in range(rng.choice([1, 4, 100]))) + data[place + 1 :]
    state = torch.load(BytesIO(data), weights_only=True)
    if kind == 2:
        key = rng.choice(list(state))
        state[rng.choice([key, 5, None, ("a",), "x" * 5000])] = rng.choice(
            [any_value(rng), torch.zeros(2, 2), torch.full((2,), math.nan), torch.zeros(3, dtype=torch.complex64)]
        )
    else:
        state = rng.choice([any_value(rng), torch.zeros(2), [state], {"state_dict": state}, Path("a"), print])
    changed = BytesIO()
    torch.save(state, changed)
    return changed.getvalue()


# an adapter


#: Of the good adapter and of the model's own.
OPTIONS = {"num_text_prompts": 2, "num_vision_prompts": 2, "fusion_rank": 2, "fusion_hidden_size": 4}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """The files of a good adapter with prototypes: name -> bytes."""
    folder = tmp_path_factory.mktemp("good")
    classifier = SEPClassifier(make_model(seed=4, **OPTIONS), CLASSES, TEMPLATES)
    classifier.keep_prototypes(1.5).save_pretrained(folder)
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def content(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


class Target:
    """A model with an adapter, into which damaged ones are loaded, and what it was before."""

    def __init__(self):
        self.classifier = SEPClassifier(make_model(**OPTIONS), CLASSES, TEMPLATES, prototype_weight=0).eval()
        model = self.model = self.classifier.model
        self.before = {key: value.detach().clone() for key, value in content(model).items()}
        self.described = self.describe()

    def describe(self) -> tuple:
        model = self.model
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        trained = [parameter.requires_grad for parameter in model.parameters()]
        names = self.classifier.class_names, list(self.classifier.tasks)
        return modules, trained, list(model.peft_config), model.active_adapters, names

    def unchanged(self) -> bool:
        now = content(self.model)
        return self.describe() == self.described and all(torch.equal(now[k], v) for k, v in self.before.items())


def load_as_task(folder: Path, target: Target) -> torch.Tensor:
    target.classifier.load_task(folder, "new")
    task = target.classifier.tasks["new"]
    with torch.no_grad():
        ranked = predict_batch(target.classifier.vision_tower, {"pixel_values": IMAGES}, [task] * len(IMAGES), None)
    return torch.tensor([entry["score"] for ranking in ranked for entry in ranking])


def load_as_classifier(folder: Path, target: Target) -> torch.Tensor:
    loaded = SEPClassifier.from_pretrained(folder, model=target.model, adapter_name="new").eval()
    with torch.no_grad():
        return loaded(IMAGES).logits


def load_by_peft(folder: Path, target: Target) -> torch.Tensor:
    target.model.load_adapter(folder, "new")
    with torch.no_grad(), chosen_adapters.set("new"):
        return target.classifier(IMAGES).logits


def swap(folder: Path, target: Target) -> torch.Tensor:
    hotswap_adapter(target.model, folder, "default")
    with torch.no_grad():
        return target.classifier(IMAGES).logits


def tell(folder: Path, target: Target) -> torch.Tensor:
    return torch.tensor(float(info(AdapterSource(str(folder)), Session()).data["bytes"]))


def run(load: Callable, folder: Path, target: Target) -> tuple[Target, str | None]:
    """The target for the next round, and what is wrong, if anything is."""
    start = time.process_time()
    try:
        answer = load(folder, target)
    except CLEAR as error:
        text = str(error)
        if load is not load_by_peft and INTERNAL.search(text):
            return target, f"says what Python says: {type(error).__name__}: {text[:300]}"
        if load is not load_by_peft and any(map(acts, text)):
            return target, f"sends what acts on a terminal: {text!r}"
        if len(text) > 10_000:
            return target, f"is {len(text)} characters long: {text[:200]}"
        if not target.unchanged():
            return Target(), f"leaves the model changed: {text[:200]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        # PEFT's loader reads the method in adapter_config.json before anything of this package is asked
        if load is load_by_peft and isinstance(error, (TypeError, KeyError, RecursionError, AttributeError)):
            return target, None if target.unchanged() else "leaves the model changed"
        return Target(), f"raises {type(error).__name__}: {str(error)[:300]}"
    else:
        target = Target()
        if not answer.isfinite().all():
            return target, "gives numbers that are not finite"
    if (took := time.process_time() - start) > SECONDS:
        return target, f"takes {took:.1f} s"
    return target, None


LOADERS = [load_as_task, load_as_classifier, swap, tell, load_by_peft]
SURFACES = {
    "config": (CONFIG, lambda rng, data: changed_json(rng, json.loads(data))),
    "classes": (CLASS_FILE, lambda rng, data: changed_json(rng, json.loads(data))),
    "weights": (WEIGHTS, changed_tensors),
    "prototypes": (PROTOTYPES, changed_tensors),
    "pickle": (PICKLED, changed_pickle),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surface", SURFACES)
def test_files_of_an_adapter(surface, good, tmp_path):
    name, change = SURFACES[surface]
    target, wrong = Target(), {}
    for file, data in good.items():
        if (file, name) != (WEIGHTS, PICKLED) and (file != PICKLED or name == PICKLED):
            (tmp_path / file).write_bytes(data)
    for seed in range(FIRST, FIRST + ROUNDS):
        rng = random.Random(f"{surface} {seed}")
        (tmp_path / name).write_bytes(change(rng, good[name]))
        load = rng.choice(LOADERS)
        target, problem = run(load, tmp_path, target)
        if problem:
            wrong[seed] = f"{load.__name__} {problem}"
    assert not wrong, "\n".join(f"{seed}: {problem}" for seed, problem in wrong.items())


# images


FORMATS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "GIF": ["L", "P"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"],
    "BMP": ["1", "L", "RGB"],
}
#: Most pixels that Pillow reads without a word.
PIXELS = Image.MAX_IMAGE_PIXELS


def image_file(rng: random.Random, kind: str) -> bytes:
    """A small image with a note of how it is rotated."""
    mode = rng.choice(FORMATS[kind])
    size = rng.randrange(1, 40), rng.randrange(1, 40)
    image = Image.new("L", size)
    image.putdata([rng.randrange(256) for _ in range(size[0] * size[1])])
    image = image.convert("RGB").convert(mode) if mode not in ("I;16", "I", "F", "LAB") else Image.new(mode, size, 7)
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(10)
    file = BytesIO()
    image.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    return file.getvalue()


def changed_image(rng: random.Random, data: bytes) -> bytes:
    """Cut short, with other bytes in its header or anywhere, with other sizes, or joined with another."""
    kind, place = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data + rng.choice([b"", b"\0" * 1000, data, b"x" * 10])
    changed = bytearray(data)
    if kind == 2:  # lengths and sizes are here
        place = rng.randrange(min(len(data), 48))
        value = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0"])
        changed[place : place + 4] = value
        return bytes(changed)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(min(len(data), 64) if kind == 3 else len(data))
        changed[place] = rng.choice([0, 255, 127, 128, changed[place] ^ 1 << rng.randrange(8), rng.randrange(256)])
    return with_checksums(bytes(changed))


def with_checksums(data: bytes) -> bytes:
    """The chunks of a PNG with the sums that fit them, so that what is in them is read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        body = data[place + 4 : place + 8 + length]
        parts += [data[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + length
    return b"".join(parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_images(kind, tmp_path):
    wrong = {}
    for seed in range(FIRST, FIRST + ROUNDS):
        rng = random.Random(f"{kind} {seed}")
        file = tmp_path / f"image.{kind.lower()}"
        file.write_bytes(changed_image(rng, image_file(rng, kind)))
        start = time.process_time()
        try:
            image = read_image(file)
            if image.mode != "RGB" or not 0 < image.width * image.height <= PIXELS:
                wrong[seed] = f"becomes {image.mode}, {image.size}"
        except ValueError as error:
            if not str(error).startswith(f"The image {str(file)!r} cannot be read: ") or "\n" in str(error):
                wrong[seed] = str(error)
        except BaseException as error:
            wrong[seed] = repr(error)
        if (took := time.process_time() - start) > 1:
            wrong[seed] = f"takes {took:.1f} s"
    assert not wrong, "\n".join(f"{seed}: {problem}" for seed, problem in wrong.items())
