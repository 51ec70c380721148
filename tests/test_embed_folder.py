"""`examples/embed_folder.py`: shards of embeddings, by two processes, resumed after a kill."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from bundled import shallow_clip
from fresh import usual
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from small_clip import perturb
from transformers import AutoImageProcessor, CLIPModel

from sep_peft import ImageEmbedder, SEPConfig
from sep_peft.classifier.images import ENDINGS


SCRIPT = Path(__file__).parents[1] / "examples" / "embed_folder.py"
COUNT, SHARD_SIZE = 240, 2


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """`COUNT` small images in folders of folders, three of which cannot be read, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"{i % 3}" / "ünder" / f"{i:03d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    for name in ("0/ünder/000.PNG", "1/ünder/001.PNG", "broken.jpg"):
        (folder / name).write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(shallow_clip(2)), SEPConfig.published(fusion_rank=1))
    perturb(model, scale=0.02)
    model.save_pretrained(folder)
    return folder


def make_arguments(images: Path, adapter: Path, output: Path, *options: str) -> list[str]:
    arguments = ["--model", str(shallow_clip(2)), "--adapter", str(adapter), "--output", str(output)]
    sizes = ["--shard-size", str(SHARD_SIZE), "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    return [str(images), *arguments, *sizes, *options]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the script in this process, which need not import everything anew: what ended it, and what it printed."""

    def main(arguments: list[str]) -> tuple[int | str | None, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            return error.code, capsys.readouterr().out
        finally:
            PartialState._reset_state()
        return None, capsys.readouterr().out

    return main


def shards(output: Path) -> list[Path]:
    return sorted(output.glob("shard-*.safetensors"))


def read(output: Path) -> tuple[list[str], list[str], torch.Tensor]:
    """Names, unreadable names and embeddings of all shards."""
    names, unreadable, embeddings = [], [], []
    for path in shards(output):
        with safe_open(path, "pt") as file:
            names += json.loads(file.metadata()["names"])
            unreadable += json.loads(file.metadata()["unreadable"])
            embeddings.append(file.get_tensor("embeddings"))
    return names, unreadable, torch.cat([part for part in embeddings if part.numel()])


def kill_after_shards(arguments: list[str], output: Path, count: int) -> None:
    """Start it, and kill it when it has written some shards."""
    process = usual().start(SCRIPT, *arguments)
    end = time.monotonic() + 300
    while len(shards(output)) < count and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()


@torch.no_grad()
def test_killed_and_resumed_by_two_processes(images, adapter, run_here, tmp_path):
    output, unbroken = tmp_path / "embeds", tmp_path / "unbroken"
    kill_after_shards(make_arguments(images, adapter, output), output, 3)
    written = {path: path.stat().st_mtime_ns for path in shards(output)}
    assert 3 <= len(written) < COUNT // SHARD_SIZE
    assert not (output / "summary.json").exists()
    read(output)  # every shard that is there is whole
    (output / "shard-000100.part").write_bytes(b"half a shard")

    first, second = (p.result() for p in usual().start_group(2, SCRIPT, *make_arguments(images, adapter, output)))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written
    names, unreadable, embeddings = read(output)
    found = sorted(path.relative_to(images).as_posix() for path in images.rglob("*") if path.suffix in (".PNG", ".jpg"))
    assert unreadable == ["0/ünder/000.PNG", "1/ünder/001.PNG", "broken.jpg"]
    assert names == [name for name in found if name not in unreadable]
    assert len(embeddings) == COUNT - 2
    summary = {"embedded": COUNT - 2, "unreadable": unreadable, "shards": -(-(COUNT + 1) // SHARD_SIZE)}
    assert json.loads((output / "summary.json").read_text(encoding="utf-8")) == summary
    assert "done by 2 processes\n" in first.stdout and second.stdout == ""
    assert f"{COUNT - 2} images embedded in {summary['shards']} shards, 3 could not be read" in first.stdout
    assert sorted({path.suffix for path in output.iterdir()}) == [".json", ".safetensors"]

    assert run_here(make_arguments(images, adapter, unbroken))[0] is None
    assert read(unbroken)[:2] == (names, unreadable) and torch.equal(read(unbroken)[2], embeddings)
    assert [path.name for path in shards(unbroken)] == [path.name for path in shards(output)]
    for name in ("settings.json", "summary.json"):
        assert (unbroken / name).read_bytes() == (output / name).read_bytes()

    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(shallow_clip(2)), adapter).eval()
    processor = AutoImageProcessor.from_pretrained(shallow_clip(2))
    some = range(0, len(names), 20)
    images = [Image.open(images / names[i]) for i in some]
    expected = ImageEmbedder(model)(processor(images, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(embeddings[list(some)], expected, rtol=1e-4, atol=1e-5)


def test_a_folder_made_from_something_else_is_left_alone(images, adapter, run_here, tmp_path):
    output, few = tmp_path / "embeds", tmp_path / "few"
    shutil.copytree(images / "2", few)
    assert run_here(make_arguments(few, adapter, output, "--shard-size", "200"))[0] is None
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sorted(before) == ["settings.json", "shard-000000.safetensors", "summary.json"]
    (few / "new.png").write_bytes((few / "ünder" / "002.PNG").read_bytes())
    message = f"{output} was made from other shard_size, images. Choose another --output, or empty it.\n"
    assert run_here(make_arguments(few, adapter, output, "--shard-size", "100")) == (1, message)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_folder_without_images(adapter, run_here, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    message = f"{folder} holds no images ({', '.join(sorted(ENDINGS))})."
    assert run_here(make_arguments(folder, adapter, tmp_path / "embeds")) == (message, "")
    assert not (tmp_path / "embeds").exists()


def test_names_that_are_no_utf8_and_endings_that_are_left_out(images, adapter, run_here, tmp_path):
    """Such names are embedded, noted so that they can be opened again, and shown as escapes."""
    folder, output = tmp_path / "odd", tmp_path / "embeds"
    folder.mkdir()
    good, bad = (Path(os.fsdecode(os.fsencode(folder) + name)) for name in (b"/good-\xff.png", b"/bad-\xff\x1b.png"))
    try:
        good.write_bytes((images / "2" / "ünder" / "002.PNG").read_bytes())
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    bad.write_bytes(b"no image")
    (folder / "photo.xyz").write_bytes(b"")
    code, printed = run_here(make_arguments(folder, adapter, output))
    assert code is None
    assert "left out, by their endings: 1 file: 1 .xyz\n" in printed
    assert "1 images embedded in 1 shards, 1 could not be read\n  bad-\\udcff\\x1b.png\n" in printed
    names, unreadable, _ = read(output)
    assert (names, unreadable) == ([good.name], [bad.name]) and (folder / names[0]).is_file()
    summary = json.loads((output / "summary.json").read_bytes())  # valid UTF-8
    assert summary == {"embedded": 1, "unreadable": [bad.name], "shards": 1}
    assert run_here(make_arguments(folder, adapter, output))[0] is None  # again, with nothing to do
