"""A save that is killed while it replaces an older one leaves the old one, the new one, or a clear refusal."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from fresh import usual
from peft import PeftModel
from safetensors.torch import load_file
from small_classifier import contents, logits_of, with_prototypes
from small_clip import make_clip

from sep_peft import SEPClassifier
from sep_peft.tuner.save_id import MixedSaveError, read_save_id, save_stamped


def make_two() -> tuple[SEPClassifier, SEPClassifier]:
    """Of the same shapes; they differ in weights, prototypes, margin and an option that no shape shows."""
    first = with_prototypes(1.5)
    second = with_prototypes(3.0, config={"seed": 6, "frozen_weight": 0.25})
    second.prototypes.data = second.prototypes.data.flip(0)
    return first, second.keep_prototypes(3.0)


def logits_in(folder: Path) -> torch.Tensor | None:
    """What a folder gives; None where it is refused as a mixture."""
    try:
        return logits_of(SEPClassifier.from_pretrained(folder, model=make_clip()))
    except MixedSaveError as error:
        assert str(error).endswith(
            "belong to two different saves: a save was interrupted while it replaced an older one. Save again, or copy "
            "or download all files of one save."
        )
        return None


def interrupt(folder: Path, at: int, tmp_path: Path, monkeypatch) -> tuple[Path, int]:
    """What is on disk when the `at`-th file is about to take its place, and how many files there are."""
    state, count, replace = tmp_path / f"state {at}", 0, os.replace

    def watched(source, target, **kwargs):
        nonlocal count
        if Path(target).parent == folder:
            if count == at:
                shutil.copytree(folder, state)
            count += 1
        return replace(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        make_two()[1].save_pretrained(folder)
    return state, count


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("old", ["with an id", "without"])
def test_between_every_two_files_no_mixture_is_loaded(old, at, tmp_path, monkeypatch):
    first, second = make_two()
    folder = tmp_path / "saved"
    if old == "without":
        with monkeypatch.context() as patch:
            patch.setattr("sep_peft.classifier.files.stamp_files", lambda folder: None)
            first.save_pretrained(folder)
    else:
        first.save_pretrained(folder)
    assert torch.equal(logits_in(folder), logits_of(first))
    state, count = interrupt(folder, at, tmp_path, monkeypatch)
    assert count == 5
    assert logits_in(state) is None
    if at == 1:  # the two files that PEFT reads belong to two saves
        with pytest.raises(MixedSaveError):
            PeftModel.from_pretrained(make_clip(), state)
    assert torch.equal(logits_in(folder), logits_of(second))
    second.save_pretrained(state)
    assert torch.equal(logits_in(state), logits_of(second))


def test_what_peft_writes_over_a_save_is_loaded(tmp_path):
    first, second = make_two()
    first.save_pretrained(tmp_path)
    second.model.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    assert loaded.class_names == first.class_names


def test_the_same_classifier_has_the_same_id(tmp_path):
    for name in ("a", "b"):
        make_two()[0].save_pretrained(tmp_path / name)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    for name in ("sep_classes.json", "adapter_config.json"):
        assert first[name] == second[name]
    for name in ("adapter_model.safetensors", "sep_prototypes.safetensors"):
        assert read_save_id(tmp_path / "a" / name) == json.loads(first["sep_classes.json"])["sep_save_id"]


LOOP = """
import sys
from test_interrupted_saves import make_two
pair = make_two()
print("ready", flush=True)
while True:
    for classifier in pair:
        classifier.save_pretrained(sys.argv[1])
"""


def test_killed_saves_leave_one_save_or_are_refused(tmp_path):
    first, second = make_two()
    folder = tmp_path / "saved"
    first.save_pretrained(folder)
    expected = logits_of(first), logits_of(second)
    delays = random.Random(0)
    for _ in range(4):
        process = usual().start(LOOP, folder)
        while process.out.read_text() != "ready\n":
            assert process.poll() is None, process.err.read_text()
            time.sleep(0.01)
        time.sleep(delays.uniform(0.05, 0.6))
        process.kill()
        found = logits_in(folder)
        assert found is None or any(torch.equal(found, logits) for logits in expected)
    (folder / f".saving-other_machine-{process.pid}-x").mkdir()
    first.save_pretrained(folder)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == [f".saving-other_machine-{process.pid}-x"]  # of another machine: it may be in use


def test_the_same_save_makes_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    for number in range(8):
        save_stamped(tensors, tmp_path / f"{number}.safetensors", "0" * 32)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read_save_id(tmp_path / "0.safetensors") == "0" * 32
    loaded = load_file(tmp_path / "0.safetensors")
    assert {name for name in tensors if torch.equal(loaded[name], tensors[name])} == {"a", "b"}
