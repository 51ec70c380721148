"""transformers' pipelines give SEP's predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import IMAGE_FILES, NAMES, scores_of, shallow_clip
from peft import get_peft_model
from PIL import Image
from small_classifier import raises
from small_clip import perturb
from transformers import (
    AutoProcessor,
    CLIPModel,
    ImageClassificationPipeline,
    ZeroShotImageClassificationPipeline,
    pipeline,
)

from sep_peft import ImageClassifier, SEPClassifier, SEPConfig
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.files import MissingClassesError
from sep_peft.classifier.images import read_image


LABELS = [name.replace("_", " ") for name in NAMES]


def assert_close(found: list[list[dict]], expected: list[list[dict]], labels: list[str]) -> None:
    for prediction, other in zip(found, expected, strict=True):
        assert scores_of(prediction, labels) == pytest.approx(scores_of(other, labels), abs=1e-5)
        assert [entry["label"] for entry in prediction] == [entry["label"] for entry in other]


@pytest.mark.parametrize("template", ["{}.", "a photo of a {}."])
def test_zero_shot_image_classification(template, small_model, processor):
    """Both branches read the same text: so does a classifier whose class names are these texts, and has no template."""
    tokens = processor.tokenizer([template.format(label) for label in LABELS], padding=True, return_tensors="pt")
    classifier = SEPClassifier(small_model, dict(tokens), processor=processor).eval()
    expected = classifier.predict(IMAGE_FILES)
    for prediction in expected:
        for entry in prediction:
            entry["label"] = LABELS[int(entry["label"].removeprefix("class "))]
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    for model in (small_model, small_model.get_base_model()):
        classify = pipeline("zero-shot-image-classification", model=model, device="cpu", **parts)
        images = [str(path) for path in IMAGE_FILES]
        found = classify(images, candidate_labels=LABELS, hypothesis_template=template)
        assert_close(found, expected, LABELS)


def test_zero_shot_with_the_bare_name_is_the_classifier_whose_template_is_the_bare_name(small_model, processor):
    classifier = SEPClassifier.from_class_names(small_model, processor, LABELS, template="{}.").eval()
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    classify = pipeline("zero-shot-image-classification", model=small_model, device="cpu", **parts)
    found = classify([str(path) for path in IMAGE_FILES], candidate_labels=LABELS, hypothesis_template="{}.")
    assert_close(found, classifier.predict(IMAGE_FILES), LABELS)


@pytest.mark.parametrize("training", [True, False])
def test_image_classification(training, small_model, processor):
    """The classifier itself, with a text for each branch."""
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES).train(training)
    expected = classifier.predict(IMAGE_FILES)
    model = ImageClassifier(classifier)
    classify = pipeline("image-classification", model=model, image_processor=processor.image_processor, device="cpu")
    images = [str(path) for path in IMAGE_FILES]
    assert_close(classify(images), expected, NAMES)
    assert_close(classify(images, batch_size=3), expected, NAMES)
    (best,) = classify(images[0], top_k=1)
    assert best["label"] == expected[0][0]["label"]


def test_labels_follow_the_classifier(small_model, processor):
    """A pipeline that is there when other classes are set, more of them, fewer and the first ones again."""
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES).eval()
    model = ImageClassifier(classifier)
    classify = pipeline("image-classification", model=model, image_processor=processor.image_processor, device="cpu")
    images = [str(path) for path in IMAGE_FILES]
    for names in (NAMES, ["zebra", "okapi", *NAMES], ["ant", "bee"], NAMES):
        classifier.set_classes(names)
        found, expected = classify(images, top_k=len(names)), classifier.predict(IMAGE_FILES)
        assert_close(found, expected, names)
        assert model.config.num_labels == len(names) and sorted(model.config.label2id) == sorted(names)


def test_images_that_the_pipeline_would_read_otherwise(small_model, processor, tmp_path):
    """Gray of 16 bits and transparency, by their names or opened by SEP's reader, give what `predict` gives."""
    gray = np.asarray(Image.open(IMAGE_FILES[0]).convert("L"), dtype=np.uint16) * 257
    Image.fromarray(gray).save(tmp_path / "gray.png")
    clear = Image.open(IMAGE_FILES[1]).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    files = [tmp_path / "gray.png", tmp_path / "clear.png"]
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES).eval()
    expected = classifier.predict(files)
    classify = pipeline(
        "image-classification",
        model=ImageClassifier(classifier),
        image_processor=processor.image_processor,
        device="cpu",
    )
    assert_close(classify([read_image(file) for file in files]), expected, NAMES)
    assert_close(classify([str(file) for file in files]), expected, NAMES)


def test_what_the_pipeline_reads(small_model, processor):
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES).train()
    model = ImageClassifier(classifier)
    assert all(module.training for module in classifier.modules())
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.num_labels == 4
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


# an adapter by its name


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Of a classifier with prototypes and a calibration, over the first layer of the small CLIP."""
    folder, clip = tmp_path_factory.mktemp("named"), shallow_clip(1)
    model = get_peft_model(CLIPModel.from_pretrained(clip), SEPConfig())
    perturb(model)
    classifier = SEPClassifier.from_class_names(model, AutoProcessor.from_pretrained(clip), NAMES)
    classifier.prototypes.data.normal_(generator=torch.Generator().manual_seed(1))
    classifier.finish_training().calibrate(Calibration(2.5, images=8)).save_pretrained(folder / "task")
    return folder / "task"


def test_image_classification_by_name(adapter):
    classify = pipeline("image-classification", model=str(adapter), device="cpu")
    assert isinstance(classify, ImageClassificationPipeline)
    classifier = SEPClassifier.from_pretrained(adapter)
    images = [str(path) for path in IMAGE_FILES]
    assert_close(classify(images), classifier.predict(images), NAMES)
    assert_close(classify(images, batch_size=3), classifier.predict(images), NAMES)
    clear = Image.open(IMAGE_FILES[1]).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    assert_close([classify(clear)], [classifier.predict(clear)], NAMES)


def test_zero_shot_by_name(adapter):
    """The trained classes, in any order, have what training left them; others have what `set_classes` gives them."""
    classify = pipeline("zero-shot-image-classification", model=str(adapter), device="cpu")
    classifier = SEPClassifier.from_pretrained(adapter)
    images = [str(path) for path in IMAGE_FILES]
    assert_close(classify(images, candidate_labels=NAMES[::-1]), classifier.predict(images), NAMES)
    others = ["zebra", "crab", NAMES[0]]
    expected = classifier.set_classes(others).predict(images)
    assert_close(classify(images, candidate_labels=others, batch_size=3), expected, others)
    expected = classifier.set_classes(others, "a drawing of a {}.").predict(images)
    found = classify(images, candidate_labels=others, hypothesis_template="a drawing of a {}.")
    assert_close(found, expected, others)
    assert_close(
        classify(images, candidate_labels=NAMES), SEPClassifier.from_pretrained(adapter).predict(images), NAMES
    )


def test_zero_shot_answers_what_is_asked_each_time(adapter, processor):
    """Whatever was asked before, the classifier was told meanwhile, or is named twice."""
    model, image = SEPClassifier.from_pretrained(adapter), IMAGE_FILES[0]
    texts = {name: [f"something like {name}."] for name in NAMES}
    classifier = SEPClassifier.from_class_names(model.model, processor, NAMES, template=[], descriptions=texts)
    classifier.finish_training()
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor, "device": "cpu"}
    classify = pipeline("zero-shot-image-classification", model=ImageClassifier(classifier), **parts)
    own, others = classifier.predict(image), ["zebra", NAMES[1]]
    expected = classify(image, candidate_labels=others)
    drawn = classify(image, candidate_labels=others, hypothesis_template="a drawing of a {}.")
    assert scores_of(drawn, others) != pytest.approx(scores_of(expected, others), abs=1e-5)
    assert_close([classify(image, candidate_labels=others)], [expected], others)
    assert_close([classify(image, candidate_labels=[NAMES[1], *others])], [expected], others)
    classifier.set_classes(NAMES[2:])
    assert_close([classify(image, candidate_labels=others)], [expected], others)
    assert_close([classify(image, candidate_labels=NAMES)], [own], NAMES)
    with raises("Class names must be a list of names, but got the single string 'zebra'."):
        classify(image, candidate_labels="zebra")


def test_other_models_have_transformers_own_pipeline(processor):
    found = pipeline("zero-shot-image-classification", model=str(shallow_clip(1)), device="cpu")
    assert type(found) is ZeroShotImageClassificationPipeline and type(found.model) is CLIPModel


def test_an_adapter_that_cannot_be_loaded_is_no_guesswork(adapter, tmp_path):
    """transformers would go on to the base model with a head that nobody has trained."""
    folder = tmp_path / "task"
    shutil.copytree(adapter, folder)
    with raises("A pipeline of a SEP adapter takes device, but no device_map."):
        pipeline("image-classification", model=str(folder), device_map="cpu")
    (folder / "sep_prototypes.safetensors").unlink()
    for task in ("image-classification", "zero-shot-image-classification"):
        with raises(
            f"{folder / 'sep_prototypes.safetensors'} does not exist, but sep_classes.json says that it should. Copy "
            "or download it again."
        ):
            pipeline(task, model=str(folder), device="cpu")
    (folder / "sep_classes.json").unlink()
    with pytest.raises(MissingClassesError, match=r"so there are no classes to load"):
        pipeline("image-classification", model=str(folder), device="cpu")
    plain = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    assert type(plain.model) is CLIPModel and list(plain.model.peft_config) == ["default"]


def test_a_type_of_numbers_is_the_base_models(adapter):
    found = pipeline("image-classification", model=str(adapter), device="cpu", dtype=torch.bfloat16)
    assert found.model.dtype == torch.bfloat16 and found(str(IMAGE_FILES[0]))[0]["label"] in NAMES
