"""Files of ONNX that `sep-peft export` writes. It takes a minute, so the usual tests leave it out; `.ci/run` calls it.

python -m pytest tests/exported_files.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import ASSETS, IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from small_clip import perturb
from transformers import AutoProcessor, CLIPModel

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.images import read_image
from sep_peft.cli.app import main


for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install sep_peft[export]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TASKS = {"first": NAMES, "default": ["crab", "cup", "lamp"]}


def save(folder: Path, names: list[str], seed: int, **config) -> Path:
    """An adapter with prototypes over the small CLIP's first two layers."""
    model = get_peft_model(CLIPModel.from_pretrained(shallow_clip(2)), SEPConfig(**config))
    perturb(model, seed=seed)
    processor = AutoProcessor.from_pretrained(shallow_clip(2))
    classifier = SEPClassifier.from_class_names(model, processor, names)
    classifier.prototypes.data.normal_(generator=torch.Generator().manual_seed(seed))
    classifier.finish_training().calibrate(Calibration(1.5 + seed, images=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save(folder / name, names, seed) for seed, (name, names) in enumerate(TASKS.items())}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class folders."""
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        shutil.copytree(ASSETS / "caltech101" / "test" / name, folder / name)
    return folder


def export(capsys, *arguments) -> dict:
    assert main(["export", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def run(file: Path, classifier: SEPClassifier) -> dict[str, np.ndarray]:
    """Output -> what the file gives of the four images."""
    import onnxruntime

    pixels = classifier.processor.image_processor([read_image(path) for path in IMAGE_FILES], return_tensors="np")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {"pixel_values": pixels["pixel_values"].astype(np.float32)})
    return dict(zip(names, found, strict=True))


def expected_scores(adapter: Path) -> np.ndarray:
    """(4, C) as the classifier predicts them."""
    classifier = SEPClassifier.from_pretrained(adapter)
    found = [{entry["label"]: entry["score"] for entry in prediction} for prediction in classifier.predict(IMAGE_FILES)]
    return np.array([[scores[name] for name in classifier.class_names] for scores in found])


@pytest.fixture
def classifier(adapters) -> SEPClassifier:
    return SEPClassifier.from_pretrained(adapters["first"])


def test_eight_bits(adapters, images, classifier, tmp_path, capsys):
    file = tmp_path / "small.onnx"
    data = export(capsys, adapters["first"], file, "--quantize", "int8", "--images", images)
    count = sum(1 for _ in images.glob("*/*"))
    assert data["images"] == count and data["difference"] < 1e-5 < data["quantized_difference"] < 0.2
    assert 90 <= data["agreement"]["scores"] <= 100
    right = data["accuracy"]["scores"]
    predicted = [entry[0]["label"] for entry in classifier.predict(sorted(images.glob("*/*")), top_k=1)]
    names = [path.parent.name for path in sorted(images.glob("*/*"))]
    shares = [name == label for name, label in zip(names, predicted, strict=True)]
    assert right["model"] == pytest.approx(100 * np.mean(shares)) and right["images"] == count
    np.testing.assert_allclose(run(file, classifier)["scores"], expected_scores(adapters["first"]), atol=0.1)
    weights = sum(p.numel() for name, p in classifier.model.named_parameters() if "text_model" not in name)
    assert file.stat().st_size == data["bytes"] < 1.6 * weights  # bytes, where fp32 has 4 for each

    import onnx

    (entry,) = onnx.load(file).metadata_props
    assert entry.key == "sep_peft" and json.loads(entry.value) == data["metadata"]
    assert data["metadata"] == json.loads((tmp_path / "small.onnx.json").read_text())
    assert data["metadata"]["weights"] == "int8" and str(ASSETS.parents[1]).encode() not in file.read_bytes()


def test_several_tasks_share_the_frozen_branch(adapters, classifier, tmp_path, capsys):
    """Each output is that of its adapter alone, and the second one costs less than another file."""
    both, alone = tmp_path / "both.onnx", tmp_path / "alone.onnx"
    data = export(capsys, *adapters.values(), both)
    assert data["difference"] < 1e-5 and data["images"] == 4
    found = run(both, classifier)
    assert {each["name"]: each["labels"] for each in data["metadata"]["outputs"]} == TASKS and list(found) == list(
        TASKS
    )
    for name, adapter in adapters.items():
        np.testing.assert_allclose(found[name], expected_scores(adapter), rtol=1e-4, atol=1e-5)

    assert export(capsys, adapters["first"], alone)["difference"] < 1e-5
    np.testing.assert_allclose(run(alone, classifier)["scores"], found["first"], rtol=1e-4, atol=1e-5)
    import onnx

    products = {file: sum(n.op_type == "MatMul" for n in onnx.load(file).graph.node) for file in (both, alone)}
    assert products[both] < 1.8 * products[alone]
    assert both.stat().st_size < 1.2 * alone.stat().st_size


def test_embeddings(adapters, classifier, tmp_path, capsys):
    adapter = tmp_path / "adapter"  # as train-pairs saves one, without classes
    shutil.copytree(adapters["first"], adapter, ignore=shutil.ignore_patterns("sep_classes*"))
    data = export(capsys, adapter, tmp_path / "embed.onnx", "--embed")
    assert data["metadata"]["outputs"] == [{"name": "embeds", "kind": "embeds"}] and data["accuracy"] == {}
    found = run(tmp_path / "embed.onnx", classifier)["embeds"]
    np.testing.assert_allclose(found, classifier.embed(IMAGE_FILES).numpy(), rtol=1e-4, atol=1e-5)
