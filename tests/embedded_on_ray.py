"""`examples/embed_folder.py --engine ray`: two local actors, killed and resumed, against the other engine.

It needs Ray, so the usual tests leave it out; `.ci/run` calls it by name.

python -m pytest tests/embedded_on_ray.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import shallow_clip
from peft import get_peft_model
from PIL import Image
from small_clip import perturb
from transformers import CLIPModel

from sep_peft import SEPConfig


pytest.importorskip("ray", reason="the engine ray needs the package ray")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the package pyarrow")

SCRIPT = Path(__file__).parents[1] / "examples" / "embed_folder.py"
COUNT, SHARD_SIZE = 60, 4


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Small images, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"ünder-{i:03d}.png")
    for name in ("ünder-005.png", "aaa.png"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[str]:
    """One that starts at the first layer, and one that starts at the second."""
    folder, paths = tmp_path_factory.mktemp("adapters"), []
    for index in range(2):
        torch.manual_seed(index)
        model = get_peft_model(CLIPModel.from_pretrained(shallow_clip(2)), SEPConfig(start_layer=index))
        perturb(model, scale=0.02)
        model.save_pretrained(folder / f"{index}")
        paths.append(str(folder / f"{index}"))
    return paths


def start(images: Path, adapters: list[str], output: Path, *options: str) -> subprocess.Popen:
    parts = ["--model", str(shallow_clip(2)), "--adapter", *adapters, "--output", str(output), "--format", "parquet"]
    sizes = ["--shard-size", str(SHARD_SIZE), "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    command = [sys.executable, str(SCRIPT), str(images), *parts, *sizes, *options]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # sessions of Ray have sockets, whose paths must be short
    return subprocess.Popen(
        command, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def shards(output: Path) -> list[Path]:
    return sorted(output.glob("shard-*.parquet"))


def test_killed_and_resumed_it_equals_the_other_engine(images, adapters, tmp_path):
    output, other = tmp_path / "ray", tmp_path / "accelerate"
    on_ray = ["--engine", "ray", "--actors", "2"]
    process = start(images, adapters, output, *on_ray)
    end = time.monotonic() + 600
    while len(shards(output)) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in shards(output)}
    assert 2 <= len(written) < 16 and not (output / "summary.json").exists()

    assert "done by 2 actors\n" in finish(start(images, adapters, output, *on_ray))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "done by 1 processes\n" in finish(start(images, adapters, other))
    assert [path.name for path in shards(output)] == [path.name for path in shards(other)]
    assert len(shards(output)) == 16
    for name in ("settings.json", "summary.json"):
        assert (output / name).read_bytes() == (other / name).read_bytes()
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary == {"embedded": COUNT - 1, "unreadable": ["aaa.png", "ünder-005.png"], "shards": 16}
    columns = ["name", *(f"embeddings/{adapter}" for adapter in adapters)]
    for path in shards(output):
        found, expected = parquet.read_table(path), parquet.read_table(other / path.name)
        assert found.schema.equals(expected.schema, check_metadata=True)
        assert found.column_names == columns
        assert found["name"].equals(expected["name"])
        for column in columns[1:]:
            a, b = (np.array(table[column].to_pylist()) for table in (found, expected))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    first, second = (np.array(parquet.read_table(shards(output)[0])[column].to_pylist()) for column in columns[1:])
    assert np.abs(first - second).max() > 1e-3  # each adapter has its own
