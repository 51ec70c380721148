"""`examples/benchmark.py --device` runs to its end; what its figures are depends on the card."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.gpu
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def modules():
    """`benchmark` and `benchmark_device`, which stand beside each other."""
    sys.path.insert(0, str(EXAMPLES))
    found = []
    for name in ("benchmark", "benchmark_device"):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    yield found
    sys.path.remove(str(EXAMPLES))


def test_every_figure_is_written(device, modules, tmp_path, monkeypatch):
    benchmark, _ = modules
    output = tmp_path / "benchmark.json"
    options = ["--device", str(device), "--fast", "--no-compile", "--batches", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options, "--output", str(output)])
    assert benchmark.main() == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["left_out"] == [] and report["stopped"] is None
    assert report["card"] == (torch.cuda.get_device_name() if device.type == "cuda" else None)
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    for kind, names in (("encoding", ("plain CLIP", "SEP", "SEP late start")), ("training step", ("LoRA", "SEP"))):
        for name in names:
            title = f"tiny, batch 1, {kind}: {name}"
            assert {title, f"{title}, {'launches' if device.type == 'cuda' else 'operators'}"} <= rows.keys()
            assert (f"{title}, peak memory" in rows) == (device.type == "cuda")
    assert {
        "tiny, batch 1, encoding: SEP / plain CLIP",
        "tiny, batch 1, training step: SEP, LoRA's loss / LoRA",
    } <= rows.keys()
    assert all(math.isfinite(row["median"]) and row["median"] > 0 for row in rows.values())


def test_an_estimate_by_hand(device, modules):
    """Steps of 10 ms, whatever the number of classes, and 256 images in 100 ms."""
    _, on_device = modules
    found = {f"ViT-B/16, batch 32, training step: {name}": 10.0 for name in (on_device.SEP, on_device.SEP_MORE)}
    found["ViT-B/16, batch 256, encoding: SEP"] = 100.0
    row = on_device.estimate("ViT-B/16", (1, 32, 256), found)
    base = [500, 50, 19, 98, 51, 51, 50, 199, 24, 5, 51]
    steps = 30 * sum(math.ceil(16 * classes / 32) for classes in base)
    images = 50_000 + 2_465 + 3_669 + 8_041 + 2_463 + 30_300 + 3_333 + 19_850 + 1_692 + 8_100 + 3_783
    assert row.name == on_device.ESTIMATE and row.unit == "minutes"
    assert row.values == [pytest.approx((10 * steps + 100 * images / 256) / 60_000)]
    assert on_device.estimate("ViT-B/16", (1, 32), found) is None
    assert on_device.estimate("ViT-L/14-336", (1, 32, 256), found) is None


def test_stopped_in_a_compiler(modules, capsys):
    """Compilers make an error of their own of what is raised in them; other errors stay errors."""
    benchmark, _ = modules
    stop = benchmark.Stop()
    stop.end()
    assert not stop.stopped(RuntimeError("InductorError: Stopped:"))  # no signal has come
    stop.received = "SIGALRM"
    assert stop.stopped(RuntimeError("InductorError: Stopped:")) and stop.stopped(benchmark.Stopped())
    assert not stop.stopped(RuntimeError("CUDA error"))
    assert capsys.readouterr().err == "SIGALRM came; this is what was measured until then.\n" * 2
