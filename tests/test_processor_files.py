"""The processor in an adapter's folder: who reads it, when it goes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bundled import IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from small_classifier import raises
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, pipeline

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.adapter import Adapter
from sep_peft.classifier.processor_files import LOCAL_KEYS, PROCESSOR_FILES, write_processor


NONE = (
    "There is no processor of transformers to save with the adapter, with a tokenizer and an image processor. Pass "
    "processor=AutoProcessor.from_pretrained(...), or leave out save_processor (--save-processor)."
)


@pytest.fixture(scope="module")
def classifier() -> SEPClassifier:
    """With a processor whose images are normalized as nobody else's are."""
    clip = shallow_clip(1)
    model = get_peft_model(CLIPModel.from_pretrained(clip), SEPConfig.compact())
    processor = AutoProcessor.from_pretrained(clip)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return SEPClassifier.from_class_names(model, processor, NAMES).eval()


@pytest.fixture
def saved(classifier, tmp_path) -> Path:
    classifier.save_pretrained(tmp_path / "task", save_processor=True)
    return tmp_path / "task"


def processors_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} & set(PROCESSOR_FILES)


def test_the_folder_is_all_that_others_need(classifier, saved):
    """transformers' own loaders and ours, with the answers of what was saved; nothing tells of this machine."""
    assert processors_in(saved) == {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not set(LOCAL_KEYS) & set(json.loads((saved / "tokenizer_config.json").read_text()))
    assert str(shallow_clip(1)) not in (saved / "tokenizer_config.json").read_text()
    processor = AutoProcessor.from_pretrained(saved)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    texts = ["a slice of pizza", "a lamp, which is off"]
    assert (
        AutoTokenizer.from_pretrained(saved)(texts)["input_ids"] == classifier.processor.tokenizer(texts)["input_ids"]
    )
    expected = {entry["label"]: entry["score"] for entry in classifier.predict(IMAGE_FILES[0])}
    again = SEPClassifier.from_pretrained(saved)
    assert {entry["label"]: entry["score"] for entry in again.predict(IMAGE_FILES[0])} == pytest.approx(
        expected, abs=1e-5
    )
    for options in ({}, {"image_processor": str(saved)}):  # else that of the base model, which has other means
        found = pipeline("image-classification", model=str(saved), **options)(str(IMAGE_FILES[0]))
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)
    zero_shot = pipeline("zero-shot-image-classification", model=str(saved))
    found = zero_shot(str(IMAGE_FILES[0]), candidate_labels=NAMES)
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)
    adapter = Adapter.from_pretrained(saved)
    assert list(adapter.processor.image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_it_stays_unless_it_belongs_to_another_model(classifier, saved, tmp_path):
    (saved / "vocab.txt").touch()
    Adapter(classifier.model, classifier.processor).save_pretrained(saved, save_processor=True)
    assert "vocab.txt" not in processors_in(saved)
    files = processors_in(saved)
    classifier.save_pretrained(saved)
    assert processors_in(saved) == files
    config = json.loads((saved / "adapter_config.json").read_text())
    for text in (json.dumps(config | {"base_model_name_or_path": "another/model"}), "{"):
        classifier.processor.save_pretrained(saved)
        (saved / "adapter_config.json").write_text(text)
        classifier.save_pretrained(saved)
        assert processors_in(saved) == set()


def test_what_is_refused(classifier, saved, tmp_path, monkeypatch):
    without = SEPClassifier(classifier.model, classifier.classes)
    images = SEPClassifier(classifier.model, classifier.classes, processor=classifier.processor.image_processor)
    for each in (without, images):
        with raises(NONE):
            each.save_pretrained(tmp_path / "new", save_processor=True)
        with raises(NONE):
            each.push_to_hub("me/task", save_processor=True)
    (tmp_path / "copy").mkdir()

    def with_code(folder, **_):
        Path(folder, "code.py").touch()

    monkeypatch.setattr(classifier.processor, "save_pretrained", with_code)
    with raises(
        "CLIPProcessor writes 'code.py', which is no file of a processor that SEP knows. Save it yourself: "
        "processor.save_pretrained(folder)."
    ):
        write_processor(classifier.processor, tmp_path / "copy")
    before = sorted(path.name for path in saved.iterdir())
    with pytest.raises(ValueError, match=r"^CLIPProcessor writes 'code.py'"):
        classifier.save_pretrained(saved, save_processor=True)
    assert sorted(path.name for path in saved.iterdir()) == before and not (tmp_path / "new").exists()


def test_a_damaged_one_is_named(saved, tmp_path):
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError) as error:
        SEPClassifier.from_pretrained(damaged)
    message = str(error.value)
    assert message.startswith(f"The processor beside the adapter {damaged} cannot be loaded (")
    assert message.endswith("). Pass processor=AutoProcessor.from_pretrained(...), or remove its files.")


def test_a_pipeline_takes_the_adapters_image_processor_unless_it_is_given_another(saved, caplog):
    """With a warning where that is not the base model's, which `pipeline` takes of itself."""

    def mean(**options) -> list[float]:
        return list(pipeline("image-classification", model=str(saved), **options).image_processor.image_mean)

    warning = (
        "The adapter's own image processor is used, which differs from that of its base model. Pass "
        "image_processor=... to use another one than both."
    )

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.endswith("pipelines")]

    assert mean() == [0.1, 0.2, 0.3] and said() == [warning]
    caplog.clear()
    other = AutoProcessor.from_pretrained(saved).image_processor
    other.image_mean = [0.4, 0.5, 0.6]
    assert mean(image_processor=other) == [0.4, 0.5, 0.6] and mean(image_processor=str(saved)) == [0.1, 0.2, 0.3]
    AutoProcessor.from_pretrained(shallow_clip(1)).save_pretrained(saved)  # the base model's, beside the adapter
    assert mean() == list(AutoProcessor.from_pretrained(shallow_clip(1)).image_processor.image_mean)
    assert said() == []
