"""`sep-peft train` that is interrupted, killed or limited: what is saved, what is said, and going on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from bundled import ASSETS, save_shallow_clip
from fresh import usual
from huggingface_hub import ModelCard
from small_classifier import contents as all_contents

from sep_peft import SEPClassifier
from sep_peft.cli.app import main
from sep_peft.cli.options import read_time
from sep_peft.training.checkpoint import CHECKPOINT_FILE, history_in
from sep_peft.training.run_log import RUN_FOLDER


NAMES = ("cup", "lamp")
MISSING = "there is no {}, which comes after the last epoch\n"


def contents(folder: Path) -> dict[str, bytes]:
    """Of an adapter's files; the run beside it has times in it."""
    return {path: content for path, content in all_contents(folder).items() if not path.startswith(RUN_FOLDER)}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """What every command is given: two classes with two images to train, validate and test on, and a shallow CLIP."""
    folder = tmp_path_factory.mktemp("data")
    for part, source, first in (("train", "train", 0), ("val", "test", 0), ("test", "test", 2)):
        for name in NAMES:
            (folder / "images" / part / name).mkdir(parents=True)
            for path in sorted((ASSETS / "caltech101" / source / name).iterdir())[first : first + 2]:
                shutil.copy(path, folder / "images" / part / name)
    base = save_shallow_clip(folder / "clip", layers=2)
    options = [
        "--fusion-rank",
        "2",
        "--share-fusion",
        "--epochs",
        "3",
        "--batch-size",
        "2",
        "--learning-rate",
        "0.02",
        "--no-report",
    ]
    return ["train", str(folder / "images"), "--base-model", str(base), *options]


@pytest.fixture(scope="module")
def unbroken(given, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "adapter"
    assert main([*given, "--output", str(output), "--quiet"]) == 0
    return output


@pytest.fixture
def run(given, capsys):
    def command(output: Path, *options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main([*given, "--output", str(output), *options]), *capsys.readouterr()

    return command


def interrupt_after(steps: int, number: int, monkeypatch):
    """Sends this process a signal after so many steps of training."""
    forward, taken = SEPClassifier.forward, []

    def watched(classifier, *args, **kwargs):
        if classifier.training:
            taken.append(1)
            if len(taken) == steps:
                os.kill(os.getpid(), number)
        return forward(classifier, *args, **kwargs)

    monkeypatch.setattr(SEPClassifier, "forward", watched)


@pytest.mark.parametrize(
    ("number", "name", "expected", "option", "missing"),
    [
        (signal.SIGINT, "Ctrl-C", 130, "--report", ("calibration", "report")),
        (signal.SIGTERM, "SIGTERM", 143, "--no-report", ("calibration",)),
    ],
)
def test_a_signal_saves_what_there_is_and_resume_goes_on(
    number, name, expected, option, missing, run, unbroken, tmp_path, monkeypatch
):
    output = tmp_path / "adapter"
    with monkeypatch.context() as patch:
        interrupt_after(6, number, patch)  # in the third epoch of two steps
        code, printed, err = run(output, "--quiet", option)
    told = "".join(MISSING.format(part) for part in missing)
    assert code == expected and printed.endswith(
        f"\n{told}stopped by {name} after 2 of 3 epochs; --resume goes on\n"
    ), err
    assert printed.startswith(f"saved {output} (")
    assert SEPClassifier.from_pretrained(output).class_names == list(NAMES)
    assert f"stopped by {name} after 2 of 3 epochs" in ModelCard.load(output / "README.md").text
    before = contents(output)
    code, _, err = run(output, "--quiet")
    message = f"{output} has a training that ended after 2 of 3 epochs. Pass --resume to go on with it, or --overwrite "
    assert (code, err) == (1, f"sep-peft: error: {message}to begin anew.\n") and contents(output) == before
    assert run(output, "--resume", "--quiet")[0] == 0
    assert contents(output) == contents(unbroken)
    code, _, err = run(output, "--resume", "--quiet")
    assert (code, err) == (1, f"sep-peft: error: {output} has an adapter already. Pass --overwrite to replace it.\n")


def test_a_signal_in_the_first_epoch_leaves_nothing(run, tmp_path, monkeypatch):
    interrupt_after(1, signal.SIGTERM, monkeypatch)
    code, printed, _ = run(tmp_path / "adapter", "--quiet")
    assert (code, printed) == (143, "stopped by SIGTERM after 0 of 3 epochs, so there is nothing to save\n")
    assert not (tmp_path / "adapter").exists()


def test_a_killed_command_goes_on(given, run, unbroken, tmp_path):
    output = tmp_path / "adapter"
    code = "import sys; from sep_peft.cli import main; sys.exit(main(sys.argv[1:]))"
    process = usual().start(code, *given, "--output", str(output), "--quiet")
    deadline = time.monotonic() + 300
    while not (output / CHECKPOINT_FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert 1 <= len(history_in(output)) <= 3
    code, printed, err = run(output, "--resume", "--json")
    assert code == 0, err
    assert "epoch 1/3" not in err and len(json.loads(printed)["history"]["rows"]) == 3
    assert contents(output) == contents(unbroken)


def test_overwrite_begins_anew(run, unbroken, tmp_path):
    output = shutil.copytree(unbroken, tmp_path / "adapter")
    (output / CHECKPOINT_FILE).write_bytes(b"of something else")
    code, _, err = run(output, "--resume", "--quiet")
    assert code == 1 and "cut short or no safetensors file" in err
    assert run(output, "--overwrite", "--quiet")[0] == 0
    assert contents(output) == contents(unbroken)


def test_what_is_shown_while_it_trains(run, unbroken, tmp_path):
    """A line for every epoch, no warnings of others, no dictionaries; nothing at all with --quiet."""
    code, printed, err = run(tmp_path / "loud", "--json")
    history = json.loads(printed)["history"]
    for row in history["rows"]:
        val = f"val {row['val_accuracy']:.1f} % (zero-shot {history['zero_shot']:.1f})"
        assert f"epoch {row['epoch']}/3 loss {row['loss']:.2f} {val}\n" in err
    assert code == 0 and "warning" not in err and "{" not in err
    assert run(tmp_path / "quiet", "--quiet")[2] == ""


def test_time_and_patience(given, run, tmp_path, capsys):
    code, printed, _ = run(tmp_path / "time", "--time", "1s", "--epochs", "1000", "--json", "--quiet")
    data = json.loads(printed)
    assert code == 0 and data["history"]["stopped"] == "time" and data["history"]["epochs"] == 1000
    assert len(history_in(tmp_path / "time")) == len(data["history"]["rows"]) < 1000
    code, printed, _ = run(tmp_path / "patience", "--patience", "1", "--epochs", "9", "--quiet")
    assert code == 0 and "stopped by patience after " in printed and history_in(tmp_path / "patience") is None
    (images := tmp_path / "images").mkdir()
    shutil.copytree(Path(given[1]) / "train", images / "train")
    arguments = ["train", str(images), *given[2:], "--output", str(tmp_path / "none"), "--patience", "1", "--quiet"]
    capsys.readouterr()
    assert main(arguments) == 1
    message = f"--patience needs images to validate on, but {images} has no val/ with any."
    assert capsys.readouterr().err == f"sep-peft: error: {message}\n"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("2H", 7200), ("1h1m1s", 3661)]
)
def test_times(text, seconds):
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "-1", "1.5h", "10 min", "1m1h"])
def test_times_that_cannot_be_read(text, run, tmp_path):
    code, _, err = run(tmp_path, f"--time={text}")
    message = f"must be a time such as 90s, 10m or 1h30m, but got '{text}'"
    assert code == 2 and message in err, err
