"""Tables and plots of finished runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tables import average_tables, make_tables, read_runs


def write_run(folder, protocol, dataset, method, shots, seed, **accuracies):
    path = folder / protocol / dataset / method / f"shots_{shots}" / f"seed_{seed}"
    path.mkdir(parents=True)
    settings = {"protocol": protocol, "dataset": dataset, "method": {"name": method}, "shots": shots, "seed": seed}
    outcome = {name: None if value is None else {"accuracy": value} for name, value in accuracies.items()}
    (path / "settings.json").write_text(json.dumps(settings))
    results = {"results": outcome, "trained_parameters": 1234, "training_seconds": 2.0 * seed}
    (path / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
    for dataset, more in (("birds", 0), ("cars", 10)):
        write_run(tmp_path, "base-to-new", dataset, "zero-shot", 16, 1, base=40.0 + more, new=60.0)
        for seed, base, new in ((1, 60.0, 50.0), (2, 70.0, 70.0), (3, 80.0, 60.0)):
            write_run(tmp_path, "base-to-new", dataset, "sep", 16, seed, base=base, new=new)
        write_run(tmp_path, "base-to-new", dataset, "linear-probe", 16, 1, base=75.0, new=None)
    write_run(tmp_path, "few-shot", "birds", "zero-shot", 16, 1, all=30.0)
    for shots, value in ((1, 35.0), (16, 70.0)):
        write_run(tmp_path, "few-shot", "birds", "sep", shots, 1, all=value)
    write_run(tmp_path, "domain-generalization", "birds", "sep", 16, 1, source=90.0, grey=50.0, blur=40.0)
    return tmp_path


def test_mean_spread_and_harmonic_mean_of_the_averages(runs):
    row = make_tables(read_runs(runs))["base-to-new", "birds", 16]["sep"]
    assert row["columns"] == {"base": {"mean": 70.0, "std": 10.0}, "new": {"mean": 60.0, "std": 10.0}}
    assert row["harmonic"] == pytest.approx(2 * 70 * 60 / 130)
    assert (row["seeds"], row["parameters"], row["seconds"]) == ([1, 2, 3], 1234, 4.0)


def test_zero_shot_first_then_by_harmonic_mean_and_undefined_last(runs):
    assert list(make_tables(read_runs(runs))["base-to-new", "birds", 16]) == ["zero-shot", "sep", "linear-probe"]


def test_average_over_data_sets(runs):
    rows = average_tables(make_tables(read_runs(runs)))["base-to-new", "average of 2 data sets", 16]
    assert rows["zero-shot"]["columns"]["base"]["mean"] == 45.0
    assert rows["zero-shot"]["harmonic"] == pytest.approx(2 * 45 * 60 / 105)
    assert rows["linear-probe"]["columns"]["new"] is None and rows["linear-probe"]["harmonic"] is None


def test_zero_shot_stands_beside_every_number_of_shots(runs):
    tables = make_tables(read_runs(runs))
    assert tables["few-shot", "birds", 1]["zero-shot"] == tables["few-shot", "birds", 16]["zero-shot"]


def test_score_of_shifted_inputs_leaves_the_source_out(runs):
    assert make_tables(read_runs(runs))["domain-generalization", "birds", 16]["sep"]["score"] == 45.0


def test_files(runs, scripts, tmp_path):
    output = tmp_path / "summary"
    command = [sys.executable, str(scripts / "summarize.py"), str(runs), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    text = (output / "summary.md").read_text()
    assert text.strip() == result.stdout.strip()
    birds = text.split("### base-to-new, birds, 16 shots")[1].split("###")[0].strip().splitlines()
    assert birds == [
        "| method | base | new | H | trained parameters | seconds | seeds |",
        "|---|---|---|---|---|---|---|",
        "| zero-shot | 40.0 | **60.0** | 48.0 | 1,234 | 2 | 1 |",
        "| sep | 70.0 ± 10.0 | **60.0 ± 10.0** | **64.6** | 1,234 | 4 | 3 |",
        "| linear-probe | **75.0** | – | – | 1,234 | 2 | 1 |",
    ]
    assert "Zero-shot is missing here" in text.split("### domain-generalization")[1]
    names = [entry["dataset"] for entry in json.loads((output / "summary.json").read_text())]
    assert names == ["average of 2 data sets", "birds", "cars", "birds", "birds", "birds"]
    for name in ("base_new.png", "shots.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_rows_of_an_earlier_summary(runs, scripts, tmp_path):
    """What was run anew replaces them, what was not stays, and averages are of what stands there now."""
    first, later, output = tmp_path / "first", tmp_path / "later", tmp_path / "second"
    script = [sys.executable, str(scripts / "summarize.py")]
    subprocess.run([*script, str(runs), "--output", str(first)], check=True, capture_output=True, timeout=120)
    write_run(later, "base-to-new", "birds", "sep", 16, 1, base=90.0, new=80.0)
    command = [*script, str(later), "--earlier", str(first / "summary.json"), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    before, after = (
        {(e["protocol"], e["dataset"], e["shots"]): e["methods"] for e in json.loads((f / "summary.json").read_text())}
        for f in (first, output)
    )
    assert list(after) == list(before)
    birds, average = ("base-to-new", "birds", 16), ("base-to-new", "average of 2 data sets", 16)
    assert after[birds]["sep"]["columns"]["base"] == {"mean": 90.0, "std": None}
    assert after[birds]["zero-shot"] == before[birds]["zero-shot"]
    assert after[average]["sep"]["columns"]["base"]["mean"] == (90.0 + 70.0) / 2
    rest = set(before) - {birds, average}
    assert {key: after[key] for key in rest} == {key: before[key] for key in rest}


def test_nothing_to_summarize(scripts, tmp_path):
    command = [sys.executable, str(scripts / "summarize.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and f"{tmp_path} holds no finished run" in result.stderr
