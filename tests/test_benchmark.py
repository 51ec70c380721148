"""The benchmark runs to its end and writes every figure; what the figures are depends on the machine."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import usual


BENCHMARK = Path(__file__).parents[1] / "examples" / "benchmark.py"
ADAPTERS = ("SEP adapter", "compact SEP adapter", "published SEP adapter", "LoRA adapter")
CLASSES = ("SEP step, more classes", "SEP step, many classes", "SEP step, many classes, sampled")
MEMORY = ("plain image encoding", "SEP image encoding", "LoRA step", "SEP step", *CLASSES)
ROWS = {
    "plain image encoding",
    "prompted image forward / plain image encoding",
    "SEP image encoding / plain image encoding",
    "SEP image encoding, late start / plain image encoding",
    "plain evaluation",
    "SEP evaluation",
    "SEP evaluation / plain evaluation",
    "LoRA step",
    "SEP step",
    "SEP step, full loss",
    "LoRA step / plain image encoding",
    "SEP step / plain image encoding",
    "SEP step, full loss / plain image encoding",
    "SEP step, full loss, more classes",
    "SEP step, full loss, more classes / plain image encoding",
    "SEP step, full loss, many classes, sampled",
    "SEP step, full loss, many classes, sampled / plain image encoding",
    "SEP step, full loss, many classes, sampled / SEP step, full loss",
    "SEP step, full loss, cached frozen embeddings",
    "SEP step, full loss, cached frozen embeddings / plain image encoding",
    "SEP step, full loss, late start, cached trunk",
    "SEP step, full loss, late start, cached trunk / plain image encoding",
    "SEP step, full loss, late start, cached trunk / SEP step, full loss",
    "SEP classification of one image / SEP encoding of one image",
    "SEP adapter, bf16: size",
    "quickstart: share of time that a step waits for images",
    "resident adapters / their files",
    "SEP adapter: add the first",
    "SEP adapter: add the last",
    "SEP adapter: add the last / SEP adapter: add the first",
    "SEP task: load beside all",
    *(f"SEP image encoding, mixed batch{model}" for model in ("", ", quickstart's model")),
    *(f"SEP image encoding, mixed batch{model} / one adapter" for model in ("", ", quickstart's model")),
    *(f"peak memory: {name} / SEP step" for name in CLASSES),
    "SEP step, full loss / plain image encoding, glibc as it is",
    "SEP step / LoRA step",
    "SEP step, full loss / LoRA step",
    *(f"{adapter}: {quantity}" for adapter in ADAPTERS for quantity in ("size", "load", "switch")),
    *(f"{peak}: {workload}" for peak in ("peak memory", "peak memory above the model") for workload in MEMORY),
}


INFERENCE = (
    "plain evaluation",
    "plain image encoding",
    "prompted image forward",
    "SEP image encoding",
    "SEP evaluation",
    "SEP classification",
)


def test_every_figure_is_written(tmp_path):
    output = tmp_path / "benchmark.json"
    result = usual().run(BENCHMARK, "--fast", "--threads", "1", "--output", output)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]

    report = json.loads(output.read_text(encoding="utf-8"))
    assert set(report["versions"]) == {"python", "torch", "transformers", "peft", "sep_peft"}
    assert set(report["machine"]) == {"system", "cpu", "cores", "threads"}
    assert report["machine"]["threads"] == 1
    assert report["settings"]["text"]["num_hidden_layers"] == 2
    assert report["stopped"] is None

    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    assert set(rows) == ROWS
    for name, row in rows.items():
        assert set(row) == {"name", "unit", "min", "median", "max", "rounds", "goal", "met"}
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("min", "median", "max")), name
        assert row["min"] <= row["median"] <= row["max"]
        assert name in result.stdout


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_what_was_measured_is_written_when_it_is_stopped(number, name, tmp_path):
    output = tmp_path / "benchmark.json"
    options = ("--fast", "--threads", "1", "--rounds", "1000000", "--only", "inference", "extended", "--output", output)
    process = usual().start(BENCHMARK, *options)
    deadline = time.monotonic() + 60
    while max(map(int, re.findall(r"inference:.*?\| (\d+)/", process.err.read_text())), default=0) < 40:
        assert time.monotonic() < deadline, process.err.read_text()  # eight workloads have made five rounds
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait() == 128 + number, process.err.read_text()
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["stopped"] == name
    rows = {row["name"]: row["rounds"] for row in report["rows"]}
    assert set(rows) == {row for row in ROWS if row.startswith(INFERENCE) and "mixed" not in row}
    assert len(set(rows.values())) == 1 and rows.popitem()[1] >= 4


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", BENCHMARK)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where data classes look for themselves
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_an_epoch_with_very_many_classes(benchmark):
    settings = replace(benchmark.TINY, threads=torch.get_num_threads())
    elapsed, peak = benchmark.epoch_cost(settings)
    assert elapsed > 0 and peak > 2**20
    assert benchmark.VIT_B_16.goals[benchmark.EPOCH_MEMORY] == 8 * 1024


def test_imports_are_compared_in_new_interpreters(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "BASE_IMPORT", ("-c", "import json"))
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    monkeypatch.setattr(benchmark, "IMPORTS", {"import sep_peft": ("-c", busy)})
    base, above = benchmark.measure_imports(replace(benchmark.TINY, rounds=1))
    assert base.name == "import json" and 0 < base.values[0] < 0.3
    assert above.name == "import sep_peft, above import peft" and 0.1 < above.values[0] < 0.4
    assert above.to_json(benchmark.VIT_B_16.goals)["goal"] == 0.2


def test_a_check_says_of_every_goal_whether_it_is_met(tmp_path):
    output = tmp_path / "benchmark.json"
    result = usual().run(BENCHMARK, "--fast", "--check", "--threads", "1", "--output", output)
    goals = json.loads(output.read_text(encoding="utf-8"))["settings"]["goals"]
    lines = result.stdout.splitlines()
    assert len(lines) == len(goals) and all(line.startswith(name) for name, line in zip(goals, lines, strict=True))
    assert [line.split()[-1] for line in lines] == ["yes", "no", "no"]
    assert "measured not measured" in lines[2]
    assert result.returncode == 1
