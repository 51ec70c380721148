"""Runs: resumed, shared out among processes, skipped, and refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time

import drift
import frozen
import heads
import pytest
import readers
import run as run_script
import shifts
import torch
from accelerate.state import AcceleratorState
from bundled import ASSETS, save_shallow_clip, shallow_clip
from fresh import usual
from methods import build_classifier, read_method
from readers import read_dataset
from transformers import AutoProcessor

from sep_peft.training.checkpoint import read_entry


LORA = {
    "learner": "lora",
    "config": {"r": 2, "target_modules": ["q_proj"]},
    "recipe": {"epochs": 1, "text_weight": 0, "vision_weight": 0},
}
NAMES = ["butterfly", "lamp", "pizza", "umbrella"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a shallow CLIP, and with few images of each class."""
    folder = tmp_path_factory.mktemp("small")
    save_shallow_clip(folder / "clip")
    for part, count in (("train", 8), ("test", 4)):
        for name in NAMES:
            (folder / "caltech101" / part / name).mkdir(parents=True)
            for path in sorted((ASSETS / "caltech101" / part / name).iterdir())[:count]:
                shutil.copy(path, folder / "caltech101" / part / name)
    return folder


@pytest.fixture
def command(small, scripts, describe, tmp_path):
    """The script of a small run, and its arguments."""
    data = describe("four", reader="folder", root="caltech101", classes=NAMES)

    def make(output, *options, start_layer=0, views=0, **entries):
        cached = {"cached": True} if views else {}
        method = describe(
            "tiny",
            **{
                "learner": "sep",
                "config": {"fusion_rank": 2, "share_fusion": True, "fusion_hidden_size": 4, "start_layer": start_layer},
                "recipe": {"like": "published", "epochs": 3, "batch_size": 5, "learning_rate": 0.01}
                | {"adam_epsilon": 1e-8, "prototype_learning_rate": 0.02, "views": views or 8},
                **cached,
                **entries,
            },
        )
        arguments = ["--protocol", "base-to-new", "--data-root", small, "--dataset", data, "--method", method]
        arguments += ["--model", small / "clip", "--shots", "4", "--seeds", "1", "--output", output, "--cpu"]
        return [scripts / "run.py", *arguments, *options]

    return make


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a command in this process, without the seconds that a new one takes to import all."""

    def main(command):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        try:
            run_script.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return main


def results(output):
    (file,) = output.rglob("results.json")
    found = json.loads(file.read_text())
    return {key: found[key] for key in ("results", "log", "trained_parameters")}


def test_killed_run_goes_on_and_ends_the_same(command, run_here, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(command(whole))
    process = usual().start(*command(killed))
    deadline = time.monotonic() + 300
    while not list(killed.rglob("checkpoint.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    (checkpoint,) = killed.rglob("checkpoint.safetensors")
    assert not list(killed.rglob("results.json"))
    done = len(read_entry(checkpoint)["history"]["rows"])
    assert 1 <= done < 3
    assert "3/3" not in run_here(command(killed))
    assert results(killed) == results(whole)
    took = json.loads(next(killed.rglob("results.json")).read_text())
    assert len(took["epoch_seconds"]) == 3 and took["training_seconds"] > sum(took["epoch_seconds"])
    assert (took["training_steps"], took["training_images"]) == (6, 24)
    assert not list(killed.rglob("checkpoint.safetensors")) and not list(killed.rglob("*.tmp"))

    assert "finished before" in run_here(command(whole))
    folder = next(whole.rglob("settings.json")).parent
    message = (
        f"{folder} holds a run with other settings (precision differ). Choose another --output, or remove that folder."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_here(command(whole, "--precision", "bf16"))


def test_all_methods_share_test_images_and_the_frozen_pass(command, run_here, scripts, tmp_path, monkeypatch):
    alone, together = tmp_path / "alone", tmp_path / "together"
    frozen.frozen_embeddings.cache_clear()
    run_here(command(alone))
    frozen.frozen_embeddings.cache_clear()
    calls, compute = [], frozen.frozen_pass
    monkeypatch.setattr(frozen, "frozen_pass", lambda *args: calls.append(args) or compute(*args))
    opened, read = [], readers.read_image
    monkeypatch.setattr(readers, "read_image", lambda path: opened.append(path) or read(path))
    options = command(together)
    at = options.index("--method") + 1
    others = [scripts / "methods" / f"{name}.json" for name in ("zero-shot", "tip-adapter")]
    run_here([*options[:at], *others, *options[at:]])
    assert len(calls) == 2  # of base and of new classes
    tested = [path for path in opened if path.parent.parent.name == "test"]
    assert len(tested) == len(set(tested)) == 16
    (shared,) = (together / "base-to-new" / "four" / "tiny").rglob("results.json")
    own = results(alone)["results"]
    for name, found in json.loads(shared.read_text())["results"].items():
        assert found["correct"] == own[name]["correct"]
        assert found["ece"] == pytest.approx(own[name]["ece"], abs=1e-3)


def test_a_view_for_each_epoch_in_the_cache_is_training_without_one(command, run_here, tmp_path):
    """With one view less the last epoch shows the first one's images."""
    outputs = []
    for views in (0, 3, 2, 2):
        outputs.append(tmp_path / f"{len(outputs)}")
        cache = ("--cache", tmp_path / "cache") if len(outputs) == 4 else ()
        run_here(command(outputs[-1], *cache, start_layer=3, views=views))
    found = [[entry["loss"] for entry in results(output)["log"]] for output in outputs]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2][:2] == pytest.approx(found[0][:2], rel=1e-4)
    assert found[2][2] != pytest.approx(found[0][2], rel=1e-3)
    assert found[3] == pytest.approx(found[2], rel=1e-4)
    assert list((tmp_path / "cache").glob("*.safetensors"))


def test_rows_of_heads_are_what_runs_find(command, run_here, tmp_path):
    """`heads.py --rows` on the embeddings of a run, and a method with that head, trained anew."""
    run_here(command(tmp_path / "kept", "--save-embeddings"))
    (file,) = tmp_path.rglob("embeddings.safetensors")
    heads.write_row(file.parent, "gda")
    run_here(command(tmp_path / "anew", head="gda"))
    before, written = (
        json.loads((tmp_path / f"kept/base-to-new/four/{name}/shots_4/seed_1/results.json").read_text())
        for name in ("tiny", "tiny-gda")
    )
    anew = json.loads(next((tmp_path / "anew").rglob("results.json")).read_text())
    assert written["chosen"] == anew["chosen"] and 0 < written["chosen"]["logit_weight"] <= 16
    for name in ("base", "new"):
        errors = [found["results"][name].pop("ece") for found in (written, anew)]
        assert written["results"][name] == anew["results"][name] and errors[0] == pytest.approx(errors[1], abs=0.1)
    assert anew["results"]["new"] == {key: before["results"]["new"][key] for key in anew["results"]["new"]}
    assert heads.write_row(file.parent, "gda") is None  # it is there

    assert heads.write_margin(file.parent, 0.0) is None  # it is that of the recipe
    path = heads.write_margin(file.parent, 1.5)
    assert path.parts[-3] == "tiny-margin-1.5" and heads.write_margin(path, 2.0) is None
    recipe = {"like": "published", "epochs": 3, "batch_size": 5, "learning_rate": 0.01, "adam_epsilon": 1e-8}
    recipe |= {"prototype_learning_rate": 0.02, "views": 8, "zero_shot_margin": 1.5}
    run_here(command(tmp_path / "margin", recipe=recipe))
    written, anew = json.loads((path / "results.json").read_text()), results(tmp_path / "margin")
    assert written["results"]["base"] == before["results"]["base"]
    assert written["results"]["new"]["correct"] == anew["results"]["new"]["correct"]
    assert written["results"]["new"]["ece"] == pytest.approx(anew["results"]["new"]["ece"], abs=0.1)


@pytest.mark.parametrize("entries", [{"recipe": {"epochs": 1}}, LORA], ids=["prototypes", "lora"])
def test_shifted_images_of_a_run_that_is_finished(entries, command, run_here, tmp_path, small, monkeypatch):
    """As the training itself would measure them; without a shift they are its own."""
    run_here(command(tmp_path / "kept", "--save-embeddings", "--save-adapters", **entries))
    (run,) = (file.parent for file in tmp_path.rglob("embeddings.safetensors"))
    before = json.loads((run / "results.json").read_text())["results"]["base"]
    monkeypatch.setattr(shifts, "SHIFTS", {"noise": None})
    data = read_dataset(tmp_path / "four.json", small)
    shifts.measure_run(run, data)
    file = tmp_path / "kept/domain-generalization/four (base classes)/tiny/shots_4/seed_1/results.json"
    results = json.loads(file.read_text())["results"]
    assert results["source"] == before | {"ece": pytest.approx(before["ece"], abs=0.1)}
    assert results["noise"]["total"] == before["total"] and results["noise"]["ece"] != before["ece"]


def test_two_stages_share_the_epochs(command, run_here, tmp_path):
    """The adapter takes its share of them, and the head that follows starts at the texts."""
    run_here(command(tmp_path, head="residual", first_stage=0.6))
    found = results(tmp_path)
    assert [row["epoch"] for row in found["log"]] == [1, 2]
    settings = json.loads(next(tmp_path.rglob("settings.json")).read_text())["method"]
    assert (settings["first_stage"], settings["recipe"]["epochs"]) == (0.6, 3) and "coupled" not in settings


def test_drift(small, describe, tmp_path, monkeypatch, capsys):
    """Training moves the prompted embeddings, never the frozen ones, and otherwise without a part of the loss."""
    data = describe("four", reader="folder", root="caltech101", classes=NAMES)
    options = ["--data-root", small, "--dataset", data, "--model", small / "clip", "--shots", "2", "--epochs", "2"]
    options += ["--without", "none", "classification", "--batch-size", "4", "--images", "2", "--cpu"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in ("drift.py", *options, "--output", tmp_path / "out")])
    try:
        drift.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    whole, less = json.loads((tmp_path / "out/drift.json").read_text())
    assert len(whole["epochs"]) == len(less["epochs"]) == 3
    assert "four, sep without classification, seed 1" in capsys.readouterr().out
    assert whole["epochs"][0] == less["epochs"][0] and whole["epochs"][2] != less["epochs"][2]
    assert whole["epochs"][0]["held_out frozen"] == whole["epochs"][2]["held_out frozen"]
    assert whole["epochs"][2]["cosine"] != whole["epochs"][0]["cosine"] < 1 and whole["epochs"][2]["cosine"] < 1
    assert all(0 < layer["prompts"] < 0.9 and layer["cosine"] < 1 for layer in whole["layers"])


def test_image_tower_spared_of_the_cross_entropy(scripts):
    """Its gradients are those without that part, the text tower's those of the whole loss, and the loss is the same."""
    method = read_method(scripts / "methods" / "sep.json")
    model = str(shallow_clip(2))
    pixels, labels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])

    def gradients(change):
        torch.manual_seed(0)
        classifier = build_classifier(method, model, AutoProcessor.from_pretrained(model), NAMES, "a photo of a {}.")
        change(classifier.train())
        output = classifier(pixel_values=pixels, labels=labels)
        output.loss.backward()
        towers = {}
        for tower in ("text", "vision"):
            found = [
                p.grad for name, p in classifier.named_parameters() if p.requires_grad and f"{tower}_model" in name
            ]
            towers[tower] = torch.cat([grad.flatten() for grad in found])
        return output.loss.item(), towers

    loss, whole = gradients(lambda classifier: None)
    _, without = gradients(lambda classifier: classifier.register_forward_hook(drift.without_classification))
    spared_loss, spared = gradients(drift.spare_images)
    assert spared_loss == pytest.approx(loss)
    torch.testing.assert_close(spared["text"], whole["text"])
    torch.testing.assert_close(spared["vision"], without["vision"], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(without["vision"], whole["vision"], atol=1e-3, rtol=1e-2)


def test_two_processes_equal_one(command, run_here, tmp_path):
    """Ten images in batches of five: the processes get three and two of each."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_here(command(one))
    for process in usual().start_group(2, *command(two)):
        assert process.wait() == 0, process.err.read_text()
    single, double = results(one), results(two)
    assert json.loads(next(two.rglob("results.json")).read_text())["processes"] == 2
    for a, b in zip(single["log"], double["log"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["accuracy"] == b["accuracy"]
    for name in ("base", "new"):
        assert single["results"][name]["total"] == double["results"][name]["total"]
        assert abs(single["results"][name]["right"] - double["results"][name]["right"]) <= 1
