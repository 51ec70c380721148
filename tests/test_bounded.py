"""Files that claim to be huge are refused before memory is taken for what they claim."""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fresh import usual
from safetensors.torch import load_file
from small_classifier import make_classifier


CONFIG, CLASS_FILE, CARD = "adapter_config.json", "sep_classes.json", "README.md"
WEIGHTS, PROTOTYPES, PICKLED = "adapter_model.safetensors", "sep_prototypes.safetensors", "adapter_model.bin"
#: MiB and seconds of the CPU that a refusal may take; other tests may run beside it.
MEMORY, SECONDS = 20, 2


class Case(NamedTuple):
    """
    Args:
        change: what is done to the folder of a good adapter.
        message: how the error begins.
        memory: MiB that the refusal may take.
        tells: whether `sep-peft info`, which knows no model, refuses it too.
    """

    change: Callable[[Path], object]
    message: str
    memory: float = MEMORY
    tells: bool = True


def options(**values) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def classes(make: Callable[[dict], dict]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / CLASS_FILE
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | make(data)))

    return change


def header(name: str, make: Callable[[dict], bytes], length: int | None = None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        text = make(json.loads(data[8:end]))
        (folder / name).write_bytes(struct.pack("<Q", length or len(text)) + text + data[end:])

    return change


def many_entries(found: dict) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps(found | {f"k{i}": empty for i in range(100_000)}).encode()


def wide_prompts(found: dict) -> bytes:
    key = next(key for key in found if key.endswith("text_model.sep_prompts"))
    found[key]["shape"] = [2**40, 32]
    return json.dumps(found).encode()


def compressed(folder: Path) -> None:
    """Weights by pickle in an archive whose first tensor unpacks to 40 MB of zeros."""
    source = io.BytesIO()
    torch.save(load_file(folder / WEIGHTS), source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(folder / PICKLED, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, b"\0" * 40_000_000 if entry.filename.endswith("/data/0") else old.read(entry))
    (folder / WEIGHTS).unlink()


def names(count: int, length: int = 1) -> list[str]:
    return [f"{i}".rjust(length, "a") for i in range(count)]


UNREADABLE = "SafetensorError: {folder}/{name} cannot be read ("
CASES = {
    "a wide fusion": Case(
        options(fusion_hidden_size=200_000), "ValueError: fusion_hidden_size must be at most 1024", tells=False
    ),
    "a high rank": Case(options(fusion_rank=100_000), "ValueError: fusion_rank must be at most 32", tells=False),
    "many prompts": Case(
        options(num_text_prompts=2_000_000, num_vision_prompts=2_000_000, start_layer=1),
        "ValueError: num_text_prompts must be at most 4096",
        tells=False,
    ),
    "many prompts without fusions": Case(
        options(num_text_prompts=2_000_000, num_vision_prompts=2_000_000, start_layer=1, fusion="none"),
        "ValueError: num_text_prompts must be at most 4096",
        tells=False,
    ),
    "a late start": Case(options(start_layer=10**12), "ValueError: start_layer must be below 3", tells=False),
    "many layers": Case(
        options(text_layers=list(range(1, 100_000))), "ValueError: text_layers must be below 3", memory=60, tells=False
    ),
    "a large configuration": Case(
        options(auto_mapping={"x": "y" * 2_000_000}),
        f"JSONFileError: {{folder}}/{CONFIG} has 2000",
    ),
    "a million classes": Case(
        classes(lambda data: {"names": names(1_000_000), "class_inputs": {"input_ids": [[61, 5, 62]] * 1_000_000}}),
        f"JSONFileError: {{folder}}/{CLASS_FILE} holds 1000",
        memory=50,
    ),
    "a million names": Case(
        classes(lambda data: {"names": names(1_000_000)}),
        f"ValueError: {{folder}}/{PROTOTYPES} must hold prototypes alone, one for each name in {CLASS_FILE}, but ",
        memory=100,
    ),
    "a label of 80 MB": Case(
        classes(lambda data: {"names": names(4, 20_000_000)}),
        f"JSONFileError: {{folder}}/{CLASS_FILE} has 8000",
    ),
    "a label of 20 MB": Case(
        classes(lambda data: {"names": [*data["names"][1:], "a" * 20_000_000]}),
        f"ValueError: {{folder}}/{CLASS_FILE}: A class name must have at most 10000 characters, but got 20000000: 'aaa",
        memory=80,
    ),
    "many ids": Case(
        classes(lambda data: {"class_inputs": {"input_ids": [[5] * 500_000] * 4}}),
        "ValueError: A text of 500000 tokens does not fit",
        memory=150,
        tells=False,
    ),
    "lists in lists": Case(
        lambda folder: (folder / CLASS_FILE).write_text('{"names": ' + "[" * 10_000_000),
        f"JSONFileError: {{folder}}/{CLASS_FILE} holds 10000001 lists and objects, but at most 524288 are read.",
        memory=40,
    ),
    "a header that is longer than its file": Case(
        header(WEIGHTS, lambda found: json.dumps(found).encode(), 2**40), UNREADABLE.replace("{name}", WEIGHTS)
    ),
    "a header of many entries": Case(
        header(WEIGHTS, many_entries), f"SafetensorError: {{folder}}/{WEIGHTS} has a header of "
    ),
    "prototypes of many entries": Case(
        header(PROTOTYPES, many_entries), f"SafetensorError: {{folder}}/{PROTOTYPES} has a header of "
    ),
    "metadata of 9 MB": Case(
        header(WEIGHTS, lambda found: json.dumps(found | {"__metadata__": {"x": "y" * 9_000_000}}).encode()),
        f"SafetensorError: {{folder}}/{WEIGHTS} has a header of 90",
    ),
    "a shape that is larger than its file": Case(header(WEIGHTS, wide_prompts), UNREADABLE.replace("{name}", WEIGHTS)),
    "a compressed archive": Case(
        compressed, f"ValueError: {{folder}}/{PICKLED} cannot be read: it is cut short or damaged, or holds more than"
    ),
}
RUNS = [(name, way) for name, case in CASES.items() for way in ("load", "tell") if way == "load" or case.tells]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str], tuple[list, Path]]:
    """Name and way -> what `bounded` prints, and the folder."""
    good, asked = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("asked") / "runs.json"
    make_classifier().keep_prototypes(1.5).save_pretrained(good)
    folders = {}
    for name, case in CASES.items():
        folder = folders[name] = tmp_path_factory.mktemp("bad")
        for file in good.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        case.change(folder)
    asked.write_text(json.dumps([[way, str(folders[name])] for name, way in RUNS]))
    result = usual().run(Path(__file__).with_name("bounded.py"), asked)
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, result.stdout.splitlines())
    return {run: (line, folders[run[0]]) for run, line in zip(RUNS, lines, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in other units elsewhere")
@pytest.mark.parametrize(("name", "way"), RUNS)
def test_refused_before_memory_is_taken(name, way, outcomes):
    case = CASES[name]
    (memory, seconds, message), folder = outcomes[name, way]
    assert message is not None and message.startswith(case.message.replace("{folder}", str(folder))), message
    assert memory < case.memory and seconds < SECONDS, (memory, seconds)
