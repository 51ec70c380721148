"""The table of calibration, sets and none of these: its measures, and a cell from end to end."""

from __future__ import annotations

import json
import sys

import calibration
import pytest
import torch
from bundled import ASSETS, save_shallow_clip


def test_areas_and_false_positives():
    generator = torch.Generator().manual_seed(1)
    known, strange = (torch.randint(9, (40,), generator=generator).double() + shift for shift in (2, 0))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in known.tolist() for b in strange.tolist()]
    assert calibration.auroc(known, strange) == pytest.approx(100 * sum(wins) / len(wins))
    limit = sorted(known.tolist())[2]  # 38 of 40 are at least as large
    passing = 100 * sum(value >= limit for value in strange.tolist()) / 40
    assert calibration.false_positives(torch.arange(21.0), torch.tensor([0.5, 1.0, 30.0])) == pytest.approx(200 / 3)
    assert calibration.false_positives(known, strange) == pytest.approx(passing, abs=3)


def test_a_cell(tmp_path, monkeypatch, capsys):
    """It is measured once; the second run shows the row that is kept."""
    model = save_shallow_clip(tmp_path / "clip", layers=2)
    data = tmp_path / "kitchen.json"
    data.write_text(json.dumps({"reader": "folder", "root": "caltech101"}))
    arguments = ["--data-root", ASSETS, "--dataset", data, "--model", model, "--shots", 2, "--epochs", 1, "--folds", 2]
    arguments += ["--classes", 3, "--images", 12, "--unknown", f"{data}={data}"]
    arguments += ["--keep", tmp_path / "logits", "--output", tmp_path / "rows.json"]
    monkeypatch.setattr(sys, "argv", ["calibration.py", *map(str, arguments)])
    calibration.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["classes"], row["images"], row["cell"]["shots"]) == (3, 12, 2)
    assert row["unknown"][0]["auroc"] == pytest.approx(50)  # the same images
    printed = capsys.readouterr().out
    assert printed.count("|") == 3 * 21 and f"| {row['accuracy']:.1f} | {row['error'][0]:.1f} |" in printed
    monkeypatch.setattr(calibration, "measure", None)
    calibration.main()
    assert capsys.readouterr().out == printed
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["calibration.py", *map(str, arguments)])
    monkeypatch.setattr(calibration, "fit", None)
    (tmp_path / "rows.json").unlink()
    calibration.main()  # by the logits that were kept
    assert capsys.readouterr().out == printed
