"""One file that strangers use without this package; files of ONNX are in tests/exported_files.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import ASSETS, IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from PIL import Image
from small_classifier import contents, raises
from small_clip import perturb
from transformers import AutoProcessor, CLIPImageProcessor, CLIPModel, SiglipImageProcessor, ViTImageProcessor

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier import export_file as files
from sep_peft.classifier.adapter import Adapter
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.export_file import export_file
from sep_peft.classifier.images import read_image
from sep_peft.classifier.preprocessing import Preprocessing, made_images
from sep_peft.cli.app import main


@pytest.fixture(scope="module")
def classifier() -> SEPClassifier:
    """With prototypes and a calibration, over the first layer of the small CLIP."""
    model = get_peft_model(CLIPModel.from_pretrained(shallow_clip(1)), SEPConfig())
    perturb(model)
    classifier = SEPClassifier.from_class_names(model, AutoProcessor.from_pretrained(shallow_clip(1)), NAMES)
    classifier.prototypes.data.normal_(generator=torch.Generator().manual_seed(1))
    return classifier.finish_training().calibrate(Calibration(2.5, images=8))


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "task.pt2"
    found = export_file(path, classifier, IMAGE_FILES)
    assert (found.images, found.bytes, found.quantized_difference) == (4, path.stat().st_size, None)
    assert found.difference < 1e-6 and found.agreement == {"scores": 100.0}
    return path


def test_a_stranger_gets_the_classifiers_scores(classifier, exported):
    """From the file alone, with Pillow, numpy and torch."""
    extra = {"sep_peft.json": ""}
    program = torch.export.load(exported, extra_files=extra).module()
    said = json.loads(extra["sep_peft.json"])
    assert said == json.loads((exported.parent / "task.pt2.json").read_text())
    (output,) = said["outputs"]
    assert output["labels"] == NAMES and not output["multi_label"] and output["templates"] == ["a photo of a {}."]
    assert output["calibration"]["temperature"] == 2.5 and said["weights"] == "fp32"
    assert said["input"] == {"name": "pixel_values", "shape": ["batch", 3, 64, 64], "dtype": "float32"}
    steps = said["preprocessing"]
    assert (steps["resize"], steps["resample"]) == ({"shortest_edge": 64}, "bicubic")
    for path, expected in zip(IMAGE_FILES, classifier.predict(IMAGE_FILES), strict=True):
        image = Image.open(path).convert("RGB")
        scale = 64 / min(image.size)
        image = image.resize([int(side * scale + 1e-9) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - 64) // 2, (image.height - 64) // 2
        levels = np.asarray(image.crop((left, top, left + 64, top + 64)), dtype=np.float32)
        pixels = (levels * steps["rescale"] - np.array(steps["mean"])) / np.array(steps["std"])
        (scores,) = program(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float())
        found = dict(zip(output["labels"], scores.tolist(), strict=True))
        assert found == {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in expected}


def test_a_file_holds_no_more_than_it_needs(classifier, exported):
    content = exported.read_bytes()
    assert str(ASSETS.parents[1]).encode() not in content  # no place on this machine
    tower = sum(p.nbytes for name, p in classifier.model.named_parameters() if "text_model" not in name)
    assert len(content) < tower + 600_000


def test_tasks_may_share_an_adapter(classifier):
    """Each is an output by its name, in the order that was asked for."""
    own = SEPClassifier(classifier.model, classifier.classes, processor=classifier.processor).eval()
    for name, names, adapter in [("own", NAMES, "default"), ("zero", NAMES[:2], "__base__"), ("two", NAMES[:2], None)]:
        own.add_task(name, names, adapter=adapter or "default")
    pixels = own.processor.image_processor([read_image(path) for path in IMAGE_FILES], return_tensors="pt").pixel_values
    module, outputs = files._module(own, ["two", "zero", "own"], False, None)
    assert list(outputs) == ["two", "zero", "own"]
    for name, scores in zip(outputs, module(pixels), strict=True):
        for row, expected in zip(scores.tolist(), own.predict(IMAGE_FILES, task=name), strict=True):
            assert sorted(row, reverse=True) == pytest.approx([entry["score"] for entry in expected], abs=1e-5)
    module, outputs = files._module(own, ["two", "zero", "own"], True, None)
    two, zero, same = module(pixels)
    assert torch.equal(two, same) and two.data_ptr() != same.data_ptr() and not torch.allclose(two, zero)


def test_what_is_refused_leaves_what_was_there(classifier, exported, monkeypatch):
    before = contents(exported.parent)
    for name, options, message in [
        ("task.zip", {}, "An exported file must end in .onnx or .pt2, but got 'task.zip'."),
        ("task.pt2", {"quantize": "int8"}, "Weights of 8 bits are for files of ONNX. Write a .onnx."),
        ("task.onnx", {"quantize": "int4"}, "quantize must be None or 'int8', but got 'int4'."),
        ("task.pt2", {"images": []}, "There are no images to check the file with."),
        ("task.pt2", {"tasks": ["birds", "pixel_values"]}, "The input is called pixel_values, so no output can be. "
         "Rename the task."),
        ("task.pt2", {"tasks": []}, "tasks must be None or a list of at least one task, but got []."),
        ("task.pt2", {"tasks": "birds"}, "tasks must be None or a list of at least one task, but got 'birds'."),
        ("task.pt2", {"tasks": ["birds"]}, "There is no task 'birds'; the tasks are []."),
    ]:  # fmt: skip
        with raises(message):
            export_file(exported.parent / name, classifier, **({"images": IMAGE_FILES} | options))
    with raises("An adapter without classes has no scores. Pass embed=True, or a classifier."):
        export_file(exported, Adapter(classifier.model, classifier.processor), IMAGE_FILES)
    program = torch.export.load(exported)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_program", lambda *_: program)
        patch.setattr(torch.export, "load", lambda _: _Wrong(program))
        with pytest.raises(RuntimeError, match=r"^The file differs from the model by 0\.5, more than 0\.001, on 4 "):
            export_file(exported, classifier, IMAGE_FILES)
    assert contents(exported.parent) == before


class _Wrong:
    def __init__(self, program):
        self.program = program.module()

    def module(self):
        return lambda pixels: self.program(pixels) + 0.5


# images


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 50}, crop_size={"height": 48, "width": 40}),
        SiglipImageProcessor(size={"height": 40, "width": 56}),
        ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False, resample=2),
        CLIPImageProcessor(do_center_crop=False, do_rescale=False, size={"height": 32, "width": 32}),
    ],
    ids=["clip", "siglip", "vit", "levels"],
)
def test_preprocessing_is_the_processors(processor):
    found = Preprocessing.of(processor)
    for image in made_images():
        (expected,) = processor([image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(found(image), expected, rtol=1e-4, atol=1e-4)


def test_preprocessing_that_no_file_could_tell():
    end = "Only resizing to one size or by the shorter side, cropping, rescaling and normalizing can."
    with raises(
        "What _Odd does with images cannot be told by a file, because it makes "
        f"(3, 40, 60) of an image of 301 x 200, not (3, 40, 40). {end}"
    ):
        Preprocessing.of(_Odd())


class _Odd(CLIPImageProcessor):
    """Says that it crops, and does not."""

    def to_dict(self):
        return super().to_dict() | {
            "do_center_crop": True,
            "crop_size": {"height": 40, "width": 40},
        }

    def __init__(self):
        super().__init__(size={"shortest_edge": 40}, do_center_crop=False)


# the command line


def test_mistakes_of_export(tmp_path, capsys):
    none = tmp_path / "none"
    for arguments, message in [
        (["a", tmp_path / "a.onnx", "--quantize", "int8"], "--quantize needs --images FOLDER, on which it is measured "
         "what it costs."),
        (["a", tmp_path / "a.onnx", "--images", none], f"There is no folder {str(none)!r}."),
        (["me/a", "you/a", tmp_path / "a.onnx"], "Outputs are named after adapters, but two have one name: a, a. "
         "Rename one."),
        ([none, tmp_path / "a.onnx"], f"There is no adapter folder {none}."),
        ([none, tmp_path / "a"], "An exported file must end in .onnx or .pt2, but got 'a'."),
        ([none, "/proc/a.pt2"], "/proc cannot be written (No such file or directory). Choose another folder, or change "
         "its permissions."),
    ]:  # fmt: skip
        assert main(["export", *map(str, arguments), "--quiet"]) == 1
        assert capsys.readouterr() == ("", f"sep-peft: error: {message}\n")
    assert main(["export", "a", str(tmp_path / "a.onnx"), "--quantize", "int4"]) == 2
    assert "must be int8, but got 'int4'." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adapters_of_two_base_models(classifier, tmp_path, capsys):
    for name in ("a", "b"):
        classifier.save_pretrained(tmp_path / name)
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "other"}))
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a.pt2"), "--quiet"]) == 1
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'b'} 'other'. Where these are the same, pass --base-model.\n")
