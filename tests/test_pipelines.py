"""transformers' pipelines give SEP's predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundled import IMAGE_FILES, NAMES, scores_of
from PIL import Image
from transformers import pipeline

from sep_peft import ImageClassifier, SEPClassifier
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
    """Gray of 16 bits and transparency: opened by SEP's reader first, they give what `predict` gives."""
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
    for file, prediction in zip(files, expected, strict=True):  # which is why the documentation says so
        (found,) = classify([str(file)])
        assert scores_of(found, NAMES) != pytest.approx(scores_of(prediction, NAMES), abs=1e-3)


def test_what_the_pipeline_reads(small_model, processor):
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES).train()
    model = ImageClassifier(classifier)
    assert all(module.training for module in classifier.modules())
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.num_labels == 4
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
