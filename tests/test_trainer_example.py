"""`examples/trainer.py`: a data set of the package datasets, metrics, TensorBoard, checkpoints and going on."""

from __future__ import annotations

import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from bundled import ASSETS, save_shallow_clip

from sep_peft import SEPClassifier


SCRIPT = Path(__file__).parents[1] / "examples" / "trainer.py"
NAMES = ["lamp", "pizza"]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("given")
    for part in ("train", "test"):
        for name in NAMES:
            (folder / "images" / part / name).mkdir(parents=True)
            for path in sorted((ASSETS / "caltech101" / part / name).iterdir())[:3]:
                shutil.copy(path, folder / "images" / part / name)
    clip = save_shallow_clip(folder / "clip", layers=2)
    return ["--data", str(folder / "images"), "--model", str(clip), "--cpu"]


@pytest.fixture
def run(given, tmp_path, monkeypatch, capsys):
    def main(*options: str) -> str:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--output", str(tmp_path / "run"), *options])
        capsys.readouterr()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return main


def test_it_trains_measures_saves_and_goes_on(run, tmp_path):
    printed = run("--epochs", "2", "--report-to", "none")
    lines = [line for line in printed.splitlines() if line.startswith(("zero-shot: ", "SEP: ", "saved "))]
    assert [line.split(":")[0] for line in lines] == ["zero-shot", "SEP", f"saved {tmp_path / 'run' / 'adapter'}"]
    assert lines[1].endswith(" % as the mean over classes")
    classifier = SEPClassifier.from_pretrained(tmp_path / "run" / "adapter")
    assert classifier.class_names == NAMES and classifier.classes.calibration is not None
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    run("--epochs", "2", "--report-to", "none", "--resume")  # nothing is left to train
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed; it comes with [test]")
def test_tensorboard_has_the_curves(run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run("--epochs", "1")
    log = EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    assert {"train/loss", "eval/accuracy", "eval/mean_over_classes"} <= set(log.Tags()["scalars"])
