"""``sep-peft train-pairs``: from a folder of images with captions to an adapter that searches, and its card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from bundled import ASSETS, shallow_clip
from peft import PeftModel
from transformers import AutoModel

from sep_peft.classifier.adapter import Adapter
from sep_peft.classifier.files import CLASSES_FILE
from sep_peft.cli.app import main
from sep_peft.training import evaluate_pairs, read_pairs
from sep_peft.training.checkpoint import CHECKPOINT_FILE


SMALL = ["--max-steps", "2", "--batch-size", "4", "--fusion-rank", "2", "--share-fusion", "--fusion-hidden-size", "8"]


def base() -> str:
    return str(shallow_clip(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six images to train on and four to test on, one of each part with two captions; and one that is none."""
    folder = tmp_path_factory.mktemp("pairs") / "things"
    for part, count in (("train", 3), ("test", 2)):
        (folder / part).mkdir(parents=True)
        for name in ("lamp", "pizza"):
            for index, path in enumerate(sorted((ASSETS / "caltech101" / part / name).iterdir())[:count]):
                shutil.copy(path, folder / part / f"{name}{index}.jpg")
                captions = [f"a {name} with number {index}", *(["a thing"] if index == 0 else [])]
                (folder / part / f"{name}{index}.txt").write_text("\n".join(captions))
    (folder / "train/broken.jpg").write_text("none")
    (folder / "train/broken.txt").write_text("a broken image")
    return folder


def command(folder: Path, output: Path, *options: str) -> list[str]:
    given = ["--base-model", base(), "--output", str(output), *SMALL, "--no-report"]
    return ["train-pairs", str(folder), *given, *options]


@pytest.fixture(scope="module")
def output(folder, tmp_path_factory) -> Path:
    """In the place of an adapter with classes."""
    output = tmp_path_factory.mktemp("output") / "adapter"
    output.mkdir()
    for name in (CLASSES_FILE, "adapter_config.json"):
        (output / name).write_text("{}")
    options = ("--overwrite", "--held-out", "2", "--license", "mit", "--quiet")
    assert main(command(folder, output, *options)) == 0
    return output


def test_what_is_saved_and_told(folder, tmp_path, capsys):
    options = ("--json", "--held-out", "2", "--chunk-size", "2", "--report", "--mine-negatives", "2")
    assert main(command(folder, tmp_path / "adapter", *options)) == 0
    printed, err = capsys.readouterr()
    data = json.loads(printed)
    assert "1 image cannot be read and is left out" in err and "val recall" in err
    assert (data["training_images"], data["layout"]) == (4, ".txt beside each image")
    assert [(score["split"], score["images"], score["captions"]) for score in data["scores"]] == [
        ("val", 2, data["scores"][0]["captions"]),
        ("test", 4, 5),
    ]
    loaded = Adapter.from_pretrained(tmp_path / "adapter")
    found = evaluate_pairs(loaded.model, read_pairs(folder / "test"), loaded.processor)
    assert data["scores"][1]["adapted"] == found.adapted.named()
    assert data["scores"][1]["frozen"] == found.frozen.named()
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "run")
    ]
    settings = json.loads((tmp_path / "adapter/run/settings.json").read_text())
    page = Path(data["report"]).read_text()
    assert settings["recipe"]["mined_negatives"] == 2 and "2 mined negatives an image" in page
    assert all(f"{share:.1f}" in page for score in data["scores"] for share in score["adapted"].values())
    assert settings["command"].startswith("sep-peft train-pairs") and settings["chunk_size"] == 2


def test_the_adapter_without_classes_loads_and_searches(output, folder, tmp_path, capsys):
    assert not (output / CLASSES_FILE).exists() and not (output / CHECKPOINT_FILE).exists()
    adapter = Adapter.from_pretrained(output)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base()), output)
    again = Adapter(model, adapter.processor)
    assert torch.allclose(again.embed_texts("a lamp"), adapter.embed_texts(["a lamp"])[0], atol=1e-6)
    images = sorted((folder / "test").glob("*.jpg"))
    similarity = adapter.embed(images) @ adapter.embed_texts("a lamp")
    capsys.readouterr()
    search = ["search", str(output), str(folder / "test"), "a lamp", "--index", str(tmp_path / "index"), "--json"]
    assert main([*search, "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert [entry["image"] for entry in found] == [str(images[index]) for index in similarity.argsort(descending=True)]
    assert main(["info", str(output), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)["scores"][-1]
    ranks = [f"recall_{way}_{rank}" for way in ("image_to_text", "text_to_image") for rank in (1, 5, 10)]
    assert list(score) == ["dataset", "split", *ranks]
    assert main(["info", str(output)]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("scores ")
    assert f"; things test recall image to text 1 {score[ranks[0]]}, recall image to text 5 {score[ranks[1]]}," in line


@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_command_that_needs_classes_says_which_do_not(command, output, tmp_path, capsys):
    given = {"predict": ASSETS / "caltech101", "export": tmp_path / "a.pt2"}[command]
    assert main([command, str(output), str(given)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"sep-peft: error: {output} has no classes to tell, as an adapter of `sep-peft train-pairs` has none. Use "
        "`sep-peft embed`, `sep-peft search` or `sep-peft export --embed`, or train with `sep-peft train`."
    )


def test_the_card(output):
    text = (output / "README.md").read_text()
    assert "It finds images by texts and texts by images: an adapter of a CLIP" in text
    row = r"\| things, test \| 4 \| 5 \| (SEP|base)( \| \d+\.\d){6} \|"
    assert re.findall(row, text) and len(re.findall(row, text)) == 2
    assert "Recall with SEP, image to text 1" in text and "metric" in text.lower() and "license: mit" in text
    assert "classes apart" not in text and CLASSES_FILE not in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 2
    for block in code:
        compile(block, "card", "exec")


def test_ctrl_c_saves_what_was_trained(folder, tmp_path, capsys, monkeypatch):
    from sep_peft.cli import train_pairs as module
    from sep_peft.training import History, TrainingInterrupted

    def stopped(rows):
        def fit_pairs(*args, **kwargs):
            raise TrainingInterrupted(History(3, rows, stopped="SIGTERM", seconds=[1.0] * len(rows)))

        return fit_pairs

    monkeypatch.setattr(module, "fit_pairs", stopped([{"epoch": 1, "loss": 1.0, "accuracy": 10.0, "lr": 0.1}]))
    assert main(command(folder, tmp_path / "a")) == 143
    assert "stopped by SIGTERM after 1 of 3 epochs; --resume goes on" in capsys.readouterr().out
    assert Adapter.from_pretrained(tmp_path / "a").embed_texts("a lamp").shape == (128,)
    monkeypatch.setattr(module, "fit_pairs", stopped([]))
    assert main(command(folder, tmp_path / "b")) == 143
    assert "so there is nothing to save" in capsys.readouterr().out and not (tmp_path / "b/README.md").exists()


MISTAKES = {
    "no file": (["x.jsonl"], "There is no file or folder 'x.jsonl'."),
    "both": (
        ["{folder}", "--val", "{folder}", "--held-out", "1"],
        "--val and --held-out exclude each other, but both were given. Pass one of them.",
    ),
    "too many": (["{folder}", "--held-out", "9"], "--held-out must be from 0 to 6, but got 9."),
    "patience": (
        ["{folder}", "--patience", "2"],
        "--patience needs pairs to validate on. Pass --val, or a --held-out above 0.",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, message, folder, tmp_path, capsys):
    given = [argument.format(folder=folder) for argument in arguments]
    assert main(command(Path(given[0]), tmp_path / "a", *given[1:], "--quiet")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"sep-peft: error: {message}"
    assert not (tmp_path / "a/README.md").exists()


def test_an_adapter_is_not_replaced(folder, output, capsys):
    assert main(command(folder, output, "--quiet")) == 1
    assert f"{output} has an adapter already. Pass --overwrite to replace it." in capsys.readouterr().err
    assert main(command(folder, output, "--loss", "hinge")) == 2
    assert "must be one of softmax, sigmoid, but got 'hinge'" in capsys.readouterr().err
