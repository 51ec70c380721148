"""The command line, on real images and the small CLIP, for a few steps."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from bundled import ASSETS, shallow_clip
from fresh import usual
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from reference_files import CHECKPOINT, LAYERS, REFERENCE
from small_clip import perturb
from transformers import AutoProcessor, CLIPModel

from sep_peft import SEPClassifier, SEPConfig, __version__, convert_reference_checkpoint
from sep_peft.classifier.classes import TEMPLATE
from sep_peft.classifier.images import ENDINGS
from sep_peft.cli.app import main
from sep_peft.cli.measured import between
from sep_peft.cli.text import json_text, one_line, printable
from sep_peft.training import Recipe, evaluate
from sep_peft.tuner.convert import FUSION_RENAMES, PACKED, TOWERS


NAMES = ["cup", "lamp", "umbrella"]
SMALL = [
    "--shots",
    "2",
    "--max-steps",
    "2",
    "--fusion-rank",
    "2",
    "--share-fusion",
    "--fusion-hidden-size",
    "8",
    "--no-report",
]
BETWEEN = r"\(\d+\.\d to \d+\.\d\)"
COMMANDS = "train train-pairs predict search duplicates embed export evaluate import-reference info push".split()


def base() -> str:
    """A CLIP of three layers, so that prompts may enter at the third."""
    return str(shallow_clip(3))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes of Caltech 101: 3 training and 4 test images each, and a training image that is none."""
    folder = tmp_path_factory.mktemp("data") / "kitchen"
    for part, count in (("train", 3), ("test", 4)):
        for name in NAMES:
            (folder / part / name).mkdir(parents=True)
            for path in sorted((ASSETS / "caltech101" / part / name).iterdir())[:count]:
                shutil.copy(path, folder / part / name)
    return folder


@pytest.fixture(scope="module")
def adapter(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    assert main(["train", str(images), "--base-model", base(), "--output", str(folder), *SMALL, "--quiet"]) == 0
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command: exit code, standard output, standard error."""

    def command(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


def error_of(run, *arguments) -> str:
    """The one line of an error, after the program's name."""
    code, out, err = run(*arguments, "--quiet")
    last = err.splitlines()[-1]
    assert (code, out) == (1, "") and "Traceback" not in err, err
    assert last.startswith("sep-peft: error: "), err
    return last.removeprefix("sep-peft: error: ")


# train


def test_train(run, images, tmp_path):
    """What is reported is what the saved adapter does, beside the base model alone."""
    out = tmp_path / "adapter"
    code, printed, err = run(
        "train", images, "--base-model", base(), "--output", out, *SMALL, "--license", "mit", "--json"
    )
    assert code == 0, err
    assert "reading images" in err and "zero-shot, test" in err and "SEP, test" in err
    data = json.loads(printed)
    score = data["scores"][0]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "run",
        "sep_classes.json",
        "sep_prototypes.safetensors",
    ]
    assert (data["adapter"], data["classes"], data["training_images"]) == (str(out), NAMES, 6)
    assert data["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert data["unreadable"] == []
    assert (score["dataset"], score["split"], score["images"]) == ("kitchen", "test", 12)

    classifier = SEPClassifier.from_pretrained(out)
    samples = [(path, name) for name in NAMES for path in sorted((images / "test" / name).iterdir())]
    assert score["accuracy"] == accuracy(classifier, samples)
    with classifier.model.disable_adapter():
        assert score["zero_shot"] == accuracy(classifier, samples)

    card = ModelCard.load(out / "README.md")
    found = f"{score['accuracy']:.1f}{between(score['interval'])} | {score['zero_shot']:.1f}"
    row = f"| kitchen, test | 12 | {found} |"
    assert row in card.text and "- Shots: 2\n- Seeds: 1\n- Protocol: 2 steps of batches of 32, Adam" in card.text
    assert (card.data.license, card.data.model_name) == ("mit", "adapter")


def accuracy(classifier, samples) -> float:
    predictions = classifier.predict([path for path, _ in samples], top_k=1)
    right = [top[0]["label"] == name for top, (_, name) in zip(predictions, samples, strict=True)]
    return 100 * sum(right) / len(right)


def test_training_changes_the_predictions_and_repeats(run, images, adapter, tmp_path):
    """The same arguments give the same adapter; another seed another."""
    outputs = [tmp_path / "same", tmp_path / "other"]
    for out, seed in zip(outputs, (1, 2), strict=True):
        code, printed, _ = run(
            "train", images, "--base-model", base(), "--output", out, *SMALL, "--seed", seed, "--quiet"
        )
        assert code == 0
        saved = rf"saved {re.escape(str(out))} \(0\.\d MB\), 3 classes\n"
        test = rf"test: \d+\.\d % {BETWEEN} with SEP, \d+\.\d % zero-shot, 12 images\n"
        assert re.fullmatch(saved + test, printed), printed
    image = next((images / "test" / "cup").iterdir())
    first, same, other = (SEPClassifier.from_pretrained(path).predict(image) for path in (adapter, *outputs))
    assert first == same != other


def test_train_without_images_to_test_on(run, images, tmp_path):
    out = tmp_path / "adapter"
    code, printed, _ = run(
        "train", images / "train", "--base-model", base(), "--output", out, *SMALL, "--shots", 3, "--json", "--quiet"
    )
    data = json.loads(printed)
    assert (code, data["scores"], data["not_tested"]) == (0, [], NAMES)
    calibration = SEPClassifier.from_pretrained(out).classes.calibration
    assert data["calibration"] == json.loads(json.dumps(asdict(calibration))) and calibration.source == "cross-fitting"
    options = [*SMALL, "--shots", 3, "--overwrite", "--quiet"]
    printed = run("train", images / "train", "--base-model", base(), "--output", out, *options)[1]
    assert printed.splitlines()[1:] == [
        f"cross-fitting, no test: {calibration.accuracy:.1f} % with SEP, 9 training images, each told after a shorter "
        "training on others",
        *(f"not tested: {name}: 3 images, all used for training" for name in NAMES),
    ]
    assert "## Results" not in (out / "README.md").read_text()


def test_unreadable_images_are_named_counted_and_left_out(run, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    broken = [data / "train" / "cup" / "0.jpg", data / "test" / "lamp" / "0.jpg"]
    for path in broken:
        path.write_bytes(b"no image")
    out = tmp_path / "adapter"
    options = [*SMALL, "--shots", 9, "--json", "--quiet"]
    code, printed, err = run("train", data, "--base-model", base(), "--output", out, *options)
    result = json.loads(printed)
    assert (code, result["training_images"], result["scores"][0]["images"]) == (0, 9, 12)
    assert [entry["image"] for entry in result["unreadable"]] == [str(path) for path in broken]
    for path in broken:
        assert f"sep-peft: warning: The image {str(path)!r} cannot be read: " in err
    assert err.count("sep-peft: warning: 1 image cannot be read and is left out\n") == 2


def test_a_class_whose_images_are_all_unreadable(run, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    for path in (data / "train" / "lamp").iterdir():
        path.write_bytes(b"no image")
    message = error_of(run, "train", data, "--base-model", base(), "--output", tmp_path / "new", *SMALL)
    assert message == "No training image can be read of lamp."
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_not_replaced_unless_asked(run, images, adapter, tmp_path):
    out = shutil.copytree(adapter, tmp_path / "adapter")
    before = (out / "adapter_model.safetensors").read_bytes()
    arguments = ["train", images, "--base-model", base(), "--output", out, *SMALL, "--seed", 5]
    assert error_of(run, *arguments) == f"{out} has an adapter already. Pass --overwrite to replace it."
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert run(*arguments, "--overwrite", "--quiet")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_errors_of_train(run, images, tmp_path):
    out = ["--base-model", base(), "--output", tmp_path / "new"]
    assert error_of(run, "train", tmp_path / "none", *out) == f"There is no folder {tmp_path / 'none'}."
    file = tmp_path / "file"
    file.write_text("mine")
    message = error_of(run, "train", images, "--base-model", base(), "--output", file)
    assert message == f"{file} is a file; a folder is needed to save into."
    message = error_of(run, "train", images, *out, "--template", "a photo")
    assert message == "A template must contain {} once, in place of the class name, but got 'a photo'."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_train_on_a_cached_trunk(run, images, kept, tmp_path):
    """Trained twice it is the same adapter, whether the trunk is computed or found on disk."""
    cache = "memory" if kept == "memory" else tmp_path / "cache"
    options = [
        "--base-model",
        base(),
        *SMALL,
        "--start-layer",
        "text=1,vision=2",
        "--cache",
        cache,
        "--views",
        2,
        "--json",
    ]
    results = []
    for name in ("one", "two"):
        code, _, err = run("train", images, *options, "--output", tmp_path / name)
        assert code == 0, err
        results.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
        if kept == "folder":
            assert len(list(cache.glob("*.safetensors"))) == 1
    assert results[0] == results[1]
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["start_layer"] == {"text": 1, "vision": 2}


# predict


def test_predict(run, images, adapter):
    """Files and folders, in order, as the classifier predicts them."""
    image = sorted((images / "test" / "cup").iterdir())[0]
    code, printed, _ = run("predict", adapter, image, images / "test" / "lamp", "--batch-size", 2, "--json")
    paths = [image, *sorted((images / "test" / "lamp").iterdir())]
    data = json.loads(printed)
    assert code == 0 and [entry["image"] for entry in data] == [str(path) for path in paths]
    expected = SEPClassifier.from_pretrained(adapter).predict(paths)
    for entry, prediction in zip(data, expected, strict=True):
        assert [top["label"] for top in entry["prediction"]] == [top["label"] for top in prediction]
        scores = [top["score"] for top in entry["prediction"]]
        assert scores == pytest.approx([top["score"] for top in prediction], abs=1e-5)


def test_predict_for_people(run, images, adapter):
    image = sorted((images / "test" / "cup").iterdir())[0]
    best = SEPClassifier.from_pretrained(adapter).predict(image, top_k=1)[0]
    code, printed, _ = run("predict", adapter, image, "--top-k", 1, "--quiet")
    assert (code, printed) == (0, f"{image}: {best['label']} {best['score']:.1%}\n")


def test_predict_says_none_of_these_and_names_sets(run, images, adapter):
    paths = sorted((images / "test" / "cup").iterdir())
    classifier = SEPClassifier.from_pretrained(adapter)
    for options, asked in (
        (["--unknown"], {"unknown": True, "top_k": 3}),
        (["--min-score", 0.45, "--top-k", 2], {"min_score": 0.45, "top_k": 2}),
        (["--coverage", 0.5], {"coverage": 0.5}),
    ):
        code, printed, _ = run("predict", adapter, *paths, *options, "--json", "--quiet")
        expected = classifier.predict(paths, **asked)
        found = [entry["prediction"] for entry in json.loads(printed)]
        assert code == 0 and [[top["label"] for top in each] for each in found] == [
            [top["label"] for top in each] for each in expected
        ]
    code, printed, _ = run("predict", adapter, paths[0], "--min-score", 1, "--quiet")
    assert (code, printed) == (0, f"{paths[0]}: none of these\n")
    message = error_of(run, "predict", adapter, paths[0], "--coverage", 0.9, "--top-k", 1)
    assert message == "coverage chooses how many classes to name. Leave out top_k, which is 1."
    message = error_of(run, "predict", adapter, paths[0], "--class", "zebra", "--class", "okapi", "--unknown")
    assert message.startswith("unknown=True needs held-out images of these classes, but their calibration has none.")


def test_predict_with_another_base_model_and_classes(run, images, adapter):
    image = sorted((images / "test" / "cup").iterdir())[0]
    options = ["--base-model", base(), "--class", "pizza", "--class", "cup", "--json", "--quiet"]
    data = json.loads(run("predict", adapter, image, *options)[1])
    assert {top["label"] for top in data[0]["prediction"]} == {"pizza", "cup"}


def test_predict_of_other_classes_asks_zero_shot_as_well(run, images, adapter):
    image = sorted((images / "test" / "cup").iterdir())[0]
    options = ["--base-model", base(), "--class", "pizza", "--class", "cup", "--json", "--quiet"]
    found = [
        json.loads(run("predict", adapter, image, *options, *margin)[1])[0]["prediction"][0]["score"]
        for margin in ([], ["--zero-shot-margin", "1"], ["--zero-shot-margin", "0"])
    ]
    assert found[0] == found[1] != found[2]
    message = error_of(run, "predict", adapter, image, *options, "--zero-shot-margin", "-2")
    assert message == "zero_shot_margin must be at least 0 and finite, but got -2.0."


def test_predict_goes_on_after_an_unreadable_image(run, images, adapter, tmp_path):
    good, bad = sorted((images / "test" / "cup").iterdir())[0], tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    code, printed, err = run("predict", adapter, good, bad, "--json", "--quiet")
    first, second = json.loads(printed)
    assert code == 1 and len(first["prediction"]) == 3
    assert set(second) == {"image", "error"} and second["error"].startswith(f"The image '{bad}' cannot be read: ")
    assert f"sep-peft: warning: The image '{bad}' cannot be read: " in err


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_endings_that_are_not_read_are_counted_and_named(command, run, images, adapter, tmp_path):
    data = shutil.copytree(images / "test", tmp_path / "data")
    for name in ("cup/a.xyz", "cup/b.XYZ", "lamp/c\x1b.dcm"):
        (data / name).write_bytes(b"")
    code, printed, err = run(command, adapter, data, "--json", "--quiet")
    assert code == 0 and json.loads(printed)
    read = ", ".join(sorted(ENDINGS))
    assert f"sep-peft: warning: Left out below {data} are 3 files: 2 .xyz, 1 .dcm. Read are {read}.\n" in err


def test_errors_of_predict(run, images, adapter, tmp_path):
    image = sorted((images / "test" / "cup").iterdir())[0]
    assert error_of(run, "predict", tmp_path / "none", image) == f"There is no adapter folder {tmp_path / 'none'}."
    message = error_of(run, "predict", adapter, image, "--top-k", 4)
    assert message == "top_k must be between 1 and 3, the number of classes, but got 4."
    assert error_of(run, "predict", adapter, tmp_path) == f"There are no images in {tmp_path}."
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / "adapter_model.safetensors").write_bytes(b"cut short")
    assert "cut short or no safetensors file" in error_of(run, "predict", copy, image)


# evaluate


def test_evaluate(run, images, adapter):
    code, printed, _ = run("evaluate", adapter, images, "--json", "--quiet")
    data = json.loads(printed)
    score = ModelCard.load(adapter / "README.md").data.eval_results[0]
    assert (code, data["images"], data["classes"], data["unreadable"]) == (0, 12, 3, [])
    assert round(data["accuracy"], 2) == score.metric_value
    assert data["accuracy"] == pytest.approx(sum(data["per_class"].values()) / 3)
    row = rf"\| {data['accuracy']:.1f} {BETWEEN} \| {data['zero_shot']:.1f} \|"
    assert re.search(row, (adapter / "README.md").read_text())
    code, printed, _ = run("evaluate", adapter, images, "--quiet")
    sets = data["sets"][1]
    assert [round(each["promise"]) for each in data["sets"]] == [80, 90, 95]
    assert printed.splitlines()[:6] == [
        f"{data['accuracy']:.1f} %{between(data['interval'])} with SEP, {data['zero_shot']:.1f} %"
        f"{between(data['zero_shot_interval'])} zero-shot, 12 images of 3 classes",
        f"{data['class_mean']:.1f} %{between(data['class_mean_interval'])} mean over classes; calibration error "
        f"{data['calibration_error']:.1f} %, NLL {data['nll']:.3f}",
        f"sets for 90 % hold the class of {sets['held']:.1f} %, with {sets['classes']:.1f} classes on average",
        *(f"{accuracy:6.1f} % of 4  {name}" for name, accuracy in data["per_class"].items()),
    ]


def test_all_that_evaluate_tells(run, images, adapter, tmp_path):
    """Also of classes without an image, and drawn."""
    data = shutil.copytree(images / "test", tmp_path / "data", ignore=lambda *_: ["umbrella"])
    (data / "lamp").rename(data / "umbrella")  # labels that are wrong
    code, printed, _ = run("evaluate", adapter, data, "--json", "--quiet", "--plots", tmp_path / "plots")
    found = json.loads(printed)
    samples = [(path, name) for name in ("cup", "umbrella") for path in sorted((data / name).iterdir())]
    expected = evaluate(SEPClassifier.from_pretrained(adapter), samples)
    assert (code, found["not_tested"], found["count"]) == (0, ["lamp"], {"cup": 4, "umbrella": 4})
    assert found["names"] == NAMES and found["confusion"] == expected.confusion.tolist()
    for key in ("nll", "calibration_error", "error_by_chance", "class_mean"):
        assert found[key] == pytest.approx(getattr(expected, key), rel=1e-4)
    for key in ("wrong", "mislabelled"):
        assert [entry["image"] for entry in found[key]] == [str(mistake.image) for mistake in getattr(expected, key)]
    first, mistake = found["wrong"][0], expected.wrong[0]
    assert (first["label"], first["said"]) == (mistake.label, mistake.said)
    assert {"confusion.png", "reliability.png", "wrong.png"} == {path.name for path in (tmp_path / "plots").iterdir()}
    lines = run("evaluate", adapter, data, "--quiet")[1].splitlines()
    assert "not tested: lamp" in lines
    place = lines.index(f"surest mistakes, {min(5, len(expected.wrong))} of {len(expected.wrong)}:")
    assert lines[place + 1] == (
        f"  {mistake.image}: {mistake.said} {mistake.score:.1%}, is {mistake.label} {mistake.label_score:.1%}"
    )


def test_evaluate_on_new_classes(run, adapter, tmp_path):
    for name in ("pizza", "chair"):
        shutil.copytree(ASSETS / "caltech101" / "test" / name, tmp_path / name)
    message = error_of(run, "evaluate", adapter, tmp_path)
    assert message == "The classifier has no classes chair, pizza; it has cup, lamp, umbrella."
    code, printed, _ = run("evaluate", adapter, tmp_path, "--new-classes", "--no-zero-shot", "--json", "--quiet")
    data = json.loads(printed)
    assert (code, data["zero_shot"], sorted(data["per_class"])) == (0, None, ["chair", "pizza"])


# import-reference


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint as the authors' code writes it, for the small CLIP, that holds a random adapter."""
    model = get_peft_model(
        CLIPModel.from_pretrained(base()), SEPConfig.published(num_text_prompts=3, num_vision_prompts=2)
    )
    perturb(model)
    state = {"VPT_fc.weight": torch.zeros(3, 4)}
    for name, tower in model.base_model.towers.items():
        prompts, fusions = TOWERS[name]
        state[prompts] = tower.sep_prompts["default"]
        for position, fusion in enumerate(tower.sep_fusion["default"].values()):
            for theirs, ours in FUSION_RENAMES.items():
                state[f"{fusions}.{position}.{theirs}"] = fusion.get_parameter(ours)
            for theirs, kind in PACKED.items():
                parts = [fusion.get_parameter(f"attention.{part}.{kind}") for part in ("query", "key", "value")]
                state[f"{fusions}.{position}.{theirs}"] = torch.cat(parts)
    path = folder / "model.pth.tar-7"
    torch.save({"state_dict": {key: value.detach().clone() for key, value in state.items()}, "epoch": 7}, path)
    return path


def test_import_reference_with_classes(run, images, tmp_path):
    """What comes out predicts, by itself, what the converted adapter does with these classes."""
    checkpoint, out = make_checkpoint(tmp_path), tmp_path / "adapter"
    names = tmp_path / "names.txt"
    names.write_text("cup\n\n lamp \numbrella\n")
    arguments = ["--base-model", base(), "--output", out, "--classes", names, "--template", "one {}."]
    code, printed, err = run("import-reference", checkpoint, *arguments, "--json", "--quiet")
    assert code == 0, err
    assert json.loads(printed) == {
        "adapter": str(out),
        "epoch": 7,
        "text_prompts": 3,
        "vision_prompts": 2,
        "classes": NAMES,
        "unused": ["VPT_fc.weight"],
    }
    convert_reference_checkpoint(checkpoint, CLIPModel.from_pretrained(base()), tmp_path / "plain")
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base()), tmp_path / "plain")
    expected = SEPClassifier.from_class_names(model, AutoProcessor.from_pretrained(base()), NAMES, template="one {}.")
    image = next((images / "test" / "cup").iterdir())
    assert SEPClassifier.from_pretrained(out).predict(image) == expected.predict(image)


def test_import_reference_without_classes(run, tmp_path):
    """The fixture's CLIP has no tokenizer; none is needed."""
    layers = ",".join(map(str, LAYERS))
    base, out = str(REFERENCE / "clip"), tmp_path / "adapter"
    options = ["--base-model", base, "--output", out, "--text-layers", layers, "--vision-layers", layers]
    code, printed, err = run("import-reference", CHECKPOINT, *options, "--quiet")
    assert code == 0, err
    assert re.fullmatch(rf"saved {out}, no class list; \d+ entries of the checkpoint were not needed\n", printed)
    config = SEPConfig.from_pretrained(out)
    assert (config.text_layers, config.vision_layers, config.batch_coupled) == (LAYERS, LAYERS, True)


def test_errors_of_import_reference(run, tmp_path):
    names, out = tmp_path / "names.txt", tmp_path / "adapter"
    names.write_text("cup\ncup\n")
    options = ["--base-model", base(), "--output", out]
    message = error_of(run, "import-reference", tmp_path / "none", *options)
    assert message == f"There is no checkpoint {tmp_path / 'none'}."
    message = error_of(run, "import-reference", make_checkpoint(tmp_path), *options, "--classes", names)
    assert message == "Class names must differ, but these occur more than once: 'cup'."
    assert not out.exists()


# info


def test_info(run, adapter):
    code, printed, _ = run("info", adapter, "--json")
    data = json.loads(printed)
    score = ModelCard.load(adapter / "README.md").data.eval_results[0]
    assert code == 0
    assert data == {
        "adapter": str(adapter),
        "base_model": base(),
        "model_type": "clip",
        "text_prompts": 6,
        "vision_prompts": 16,
        "fusion": "attention",
        "frozen_weight": 0.5,
        "batch_coupled": False,
        "parameters": sum(
            p.numel() for n, p in SEPClassifier.from_pretrained(adapter).named_parameters() if ".sep_" in n
        ),
        "bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "classes": NAMES,
        "multi_label": False,
        "templates": ["a photo of a {}."],
        "scores": [{"dataset": "kitchen", "split": "test", "accuracy": score.metric_value}],
    }
    printed = run("info", adapter)[1].splitlines()
    assert f"parameters     {data['parameters']:,}" in printed and "classes        cup; lamp; umbrella" in printed


def test_info_of_an_adapter_without_classes_and_card(run, adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path)
    data = json.loads(run("info", tmp_path, "--json")[1])
    assert (data["classes"], data["templates"], data["scores"]) == ([], [], [])


def test_info_of_an_adapter_of_another_method(run, tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert error_of(run, "info", tmp_path) == f"{tmp_path} holds an adapter of the method LORA, but SEP is needed."


# the program


SHARED = ["--json", "--quiet", "--debug", "--device", "--token", "--help"]
FROM_HUB = ["ADAPTER", "--revision", "--subfolder"]
OPTIONS = {
    "train": [
        *("FOLDER", "--base-model", "--output", "--overwrite", "--name", "--license", "--template", "--shots"),
        *(
            "--epochs",
            "--max-steps",
            "--batch-size",
            "--learning-rate",
            "--resume",
            "--time",
            "--patience",
            "--keep-last",
            "--cache",
            "--views",
            "--seed",
        ),
        *("--text-prompts", "--vision-prompts", "--start-layer", "--fusion-rank", "--fusion-hidden-size"),
        *("--share-fusion / --no-share-fusion", "--save-dtype", "--save-processor", "--compact", "--published"),
        *("--report / --no-report", "--retrieval"),
    ],
    "train-pairs": [
        *("PAIRS", "--base-model", "--output", "--val", "--held-out", "--cut", "--chunk-size", "--loss", "--overwrite"),
        *("--resume", "--name", "--license", "--epochs", "--max-steps", "--batch-size", "--learning-rate", "--mirror"),
        *("--time", "--patience", "--keep-last", "--seed", "--text-prompts", "--vision-prompts", "--start-layer"),
        *("--fusion-rank", "--fusion-hidden-size", "--share-fusion / --no-share-fusion", "--save-dtype"),
        *("--save-processor", "--mine-negatives", "--report / --no-report"),
    ],
    "predict": [
        *(*FROM_HUB, "IMAGE", "--base-model", "--top-k", "--class", "--zero-shot-margin", "--unknown"),
        *("--min-score", "--coverage", "--batch-size"),
    ],
    "search": [
        *(*FROM_HUB, "FOLDER", "QUERY", "--base-model", "--top-k", "--index", "--batch-size", "--compare-base"),
        "--page",
    ],
    "duplicates": [*FROM_HUB, "FOLDER", "--base-model", "--threshold", "--index", "--batch-size", "--page"],
    "embed": [*FROM_HUB, "FOLDER", "FILE", "--base-model", "--index", "--whiten", "--cut", "--batch-size"],
    "export": [*FROM_HUB, "FILE", "--base-model", "--embed", "--whiten", "--quantize", "--images"],
    "evaluate": [
        *(*FROM_HUB, "FOLDER", "--base-model", "--new-classes", "--zero-shot-margin", "--no-zero-shot", "--plots"),
        *("--report", "--batch-size"),
    ],
    "import-reference": [
        *("CHECKPOINT", "--base-model", "--output", "--overwrite", "--text-layers", "--vision-layers", "--classes"),
        "--template",
    ],
    "info": FROM_HUB,
    "push": ["FOLDER", "NAME", "--private", "--base-model", "--save-processor"],
}


def help_of(run, *command) -> str:
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(['sep-peft', *command])} [OPTIONS] ")
    return out


def test_help(run):
    out = help_of(run)
    assert re.findall(r"^  ([a-z-]+) {2,}[A-Z]", out.split("Commands:")[1], re.MULTILINE) == COMMANDS
    assert "..." not in out.split("Commands:")[1], "a summary is cut off"
    assert "Exit codes: 0 done, 1 an error, 2 a mistake in the arguments, 130" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run, command):
    """It lists every argument and option, each with a word on it, and no other."""
    out = help_of(run, command)
    listed = re.findall(r"^  (--[a-z-]+(?: / --[a-z-]+)?|[A-Z]+)(?: \S+)?(?:  |$)", out, re.MULTILINE)
    assert sorted(listed) == sorted([*OPTIONS[command], *SHARED])


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_name_every_option(command):
    text = (ASSETS.parents[1] / "docs" / "command-line.md").read_text()
    shared, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    section = next(section for section in sections if section.startswith(f"{command}\n"))
    options = {option for each in OPTIONS[command] for option in each.split(" / ") if option.startswith("--")}
    own = set(re.findall(r"--[a-z][a-z-]+", section))
    assert options - own <= {"--revision", "--subfolder", "--base-model"} and own <= options | {"--resume", "--json"}
    assert set(SHARED) <= set(re.findall(r"--[a-z][a-z-]+", shared))


def test_defaults_in_help(run):
    """They are those of the settings, and the template's is the package's."""
    out = " ".join(help_of(run, "train").split())
    recipe, published, compact, retrieval = Recipe(), Recipe.published(), Recipe.compact(), Recipe.retrieval()
    epochs = f"{recipe.epochs}, published {published.epochs}, retrieval {retrieval.epochs}"
    assert f"Passes over the images ({epochs})." in out
    rates = f"{recipe.learning_rate}, compact {compact.learning_rate}, published {published.learning_rate}"
    assert f"Of AdamW ({rates}, retrieval {retrieval.learning_rate})." in out
    assert f"Rank of the fusion's projections ({SEPConfig().fusion_rank}, published none)." in out
    assert "One fusion for all layers (no, compact yes)." in out
    assert f"repeat to average; default: {TEMPLATE}" in out


MUST_BE = "must be a whole number of at least 1, but got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command. See `sep-peft --help`."),
        (["fly"], "No such command 'fly'. See `sep-peft --help`."),
        (["train", "x"], "Missing option '--base-model'. See `sep-peft train --help`."),
        (["train", "x", "--base-model", "y"], "Missing option '--output'. See `sep-peft train --help`."),
        (["predict", "x"], "Missing argument 'IMAGE'. See `sep-peft predict --help`."),
        (["train", "x", "--shots", "0"], f"Invalid value for '--shots': {MUST_BE} '0'. See `sep-peft train --help`."),
        (
            ["train", "x", "--epochs", "few"],
            f"Invalid value for '--epochs': {MUST_BE} 'few'. See `sep-peft train --help`.",
        ),
        (
            ["train", "x", "--seed", "1.5"],
            "Invalid value for '--seed': must be a whole number, but got '1.5'. See `sep-peft train --help`.",
        ),
        (
            ["train", "x", "--learning-rate", "high"],
            "Invalid value for '--learning-rate': must be a number, but got 'high'. See `sep-peft train --help`.",
        ),
        (
            ["train", "x", "--save-dtype", "int8"],
            "Invalid value for '--save-dtype': must be one of fp32, bf16, fp16, but got 'int8'. "
            "See `sep-peft train --help`.",
        ),
        (
            ["train", "x", "--base-model", "y", "--output", "z", "--compact", "--published"],
            "Invalid value: --compact and --published exclude each other, but both were given. Pass one of them. "
            "See `sep-peft train --help`.",
        ),
        (
            ["import-reference", "x", "--text-layers", "1,two"],
            "Invalid value for '--text-layers': must be layers counted from 0, such as 1,2,3, but got '1,two'. "
            "See `sep-peft import-reference --help`.",
        ),
        (["info", "x", "--what"], "No such option: --what. See `sep-peft info --help`."),
        (
            ["info", "x", "\x1b[2J\n"],
            r"Got unexpected extra argument(s) (\x1b[2J\x0a). See `sep-peft info --help`.",
        ),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_mistakes_in_the_arguments(run, arguments, message):
    assert run(*arguments) == (2, "", f"sep-peft: error: {message}\n")


# what is imported


#: What only some commands, drawings or training need.
HEAVY = {"transformers.trainer", "accelerate", "datasets", "matplotlib", "rich", "sep_peft.classifier"}
HEAVY |= {"sep_peft.training", "sep_peft.cli.session"}


LIGHT = [["--help"], ["train", "--help"], ["--version"], ["train", "x"], ["train", "x", "--shots", "0"], ["fly"]]


def modules_of(arguments: list[str], codes: set[int]) -> set[str]:
    """Modules that a command adds to those of PEFT, in a process of its own."""
    result = usual().run(f"""
import sys
before = set(sys.modules)
from sep_peft.cli import main
assert main({arguments}) in {codes}
print(*sorted(set(sys.modules) - before))
""")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_and_mistakes_do_not_wait_for_what_commands_need(arguments):
    modules = modules_of(arguments, {0, 2})
    assert "sep_peft.cli.app" in modules
    assert HEAVY & modules == set()


def test_a_command_imports_what_it_needs(adapter):
    assert {"sep_peft.classifier", "sep_peft.cli.info"} <= modules_of(["info", str(adapter)], {0})


# text from outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cup", "cup"),
        ("Ünï ☕ 猫 {}", "Ünï ☕ 猫 {}"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("\x7f\x9b31m", r"\x7f\x9b31m"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("line\u2028end", r"line\u2028end"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("no utf-8 \udcff", r"no utf-8 \udcff"),
        ("\U0001f469\u200d\U0001f373 می\u200cخواهم", "\U0001f469\u200d\U0001f373 می\u200cخواهم"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    written = json_text({text: [text, 1.5]})
    assert json.loads(written) == {text: [text, 1.5]}
    assert printable(written.replace("\n", "")) == written.replace("\n", "")


def test_one_line():
    assert one_line(" a\n  b\x1b[0m\r\nc ") == r"a b\x1b[0m c"


EVIL = "cup\x1b[2J\n\u202elamp"


@pytest.fixture
def evil(adapter, tmp_path) -> tuple[Path, Path]:
    """An adapter with a label that acts on a terminal, and class folders, one of them of that name."""
    folder = shutil.copytree(adapter, tmp_path / "evil")
    classes = folder / "sep_classes.json"
    data = json.loads(classes.read_text())
    data["names"][0] = EVIL
    classes.write_text(json.dumps(data))
    for name, label in zip([EVIL, *NAMES[1:]], NAMES, strict=True):
        shutil.copytree(ASSETS / "caltech101" / "test" / label, tmp_path / "images" / name)
    return folder, tmp_path / "images"


def assert_tame(text: str) -> None:
    assert text and all(printable(line) == line for line in text.split("\n"))


def test_labels_and_file_names_do_not_act_on_the_terminal(run, evil):
    folder, images = evil
    shown = r"cup\x1b[2J\n\u202elamp"
    for path in (images / "lamp").iterdir():
        path.rename(path.with_name(f"\x1b[31m{path.name}"))
    (images / "lamp" / "b\x1b]0;title\x07ad.jpg").write_bytes(b"no image")
    outputs = [
        run("info", folder),
        run("predict", folder, images, "--quiet"),
        run("evaluate", folder, images, "--quiet"),
    ]
    assert [code for code, *_ in outputs] == [0, 1, 0]
    for _, out, err in outputs:
        assert shown in out
        assert_tame(out)
        if err:
            assert_tame(err)
    assert r"/lamp/\x1b[31m" in outputs[1][1] and r"\x1b]0;title\x07ad.jpg" in outputs[1][2]
    assert len(outputs[2][1].splitlines()) == 18  # no line break of a name makes a line


def test_json_of_labels_that_act(run, evil):
    folder, images = evil
    printed = run("predict", folder, images, "--json", "--quiet")[1]
    assert_tame(printed)
    data = json.loads(printed)
    assert {entry["image"] for entry in data} >= {str(path) for path in (images / EVIL).iterdir()}
    assert EVIL in {top["label"] for top in data[0]["prediction"]}


def test_errors_that_act(run, adapter):
    message = error_of(run, "info", "/none/\x1b[2J\nsep-peft: all is well")
    assert message == r"There is no adapter folder /none/\x1b[2J sep-peft: all is well."


# the process


#: Runs commands where standard output takes ASCII alone and raises at anything else; a line with "next" ends each.
STRICT = """
import io, sys
from sep_peft.cli.app import main
sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="ascii", errors="strict", line_buffering=True)
for arguments in {!r}:
    code = main(arguments)
    assert code == 0, code
    print("next")
"""


def test_output_that_takes_ascii_alone(adapter, images, tmp_path):
    folder = tmp_path / "ünder"
    shutil.copytree(adapter, folder)
    data = json.loads((folder / "sep_classes.json").read_text())
    data["names"][0] = "Tässe ☕"
    (folder / "sep_classes.json").write_text(json.dumps(data))
    shutil.copy(next((images / "test" / "cup").iterdir()), folder / "ïmage.jpg")
    predict = ["predict", str(folder), str(folder / "ïmage.jpg"), "--quiet"]
    result = usual().run(STRICT.format([["info", str(folder)], predict, [*predict, "--json"]]))
    assert result.returncode == 0, result.stderr
    info, predicted, printed, _ = result.stdout.split("next\n")
    assert r"T\xe4sse \u2615" in info
    assert r"/\xefmage.jpg: " in predicted and r"T\xe4sse \u2615" in predicted
    (entry,) = json.loads(printed)
    assert entry["image"].endswith("/ïmage.jpg") and "Tässe ☕" in {top["label"] for top in entry["prediction"]}


def test_debug_shows_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^There is no adapter folder "):
        main(["info", str(tmp_path / "none"), "--debug"])


def test_interrupted(run, adapter, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sep_peft.cli.info.read_shapes", interrupt)
    assert run("info", adapter) == (130, "", "sep-peft: interrupted\n")


def test_program_is_installed_under_its_name():
    (script,) = entry_points(group="console_scripts", name="sep-peft")
    assert script.load() is main


def test_as_a_module():
    code = "import runpy; runpy.run_module('sep_peft', run_name='__main__', alter_sys=True)"
    result = usual().run(code, "--version")
    assert (result.returncode, result.stdout) == (0, f"sep-peft {__version__}\n"), result.stderr


def test_reader_that_has_seen_enough(adapter):
    """The pipe is closed before the result is printed."""
    code = f"""
import os, runpy, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
sys.argv = ["sep_peft", "info", {str(adapter)!r}]
runpy.run_module("sep_peft", run_name="__main__", alter_sys=True)
"""
    result = usual().run(code)
    assert (result.returncode, result.stderr) == (0, "")
