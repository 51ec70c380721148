"""A temperature makes logits into scores, wherever scores come from, and changes no label."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from bundled import IMAGE_FILES, NAMES, scores_of
from small_classifier import (
    CLASSES,
    IMAGES,
    LABELS,
    TEMPLATES,
    logits_of,
    make_classifier,
    make_model,
    raises,
    with_prototypes,
)
from small_clip import make_clip
from transformers import pipeline

from sep_peft import ImageClassifier, ImageScorer, SEPClassifier, TaskClasses
from sep_peft.classifier.calibration import MAX_TEMPERATURE, Calibration, fit_temperature
from sep_peft.classifier.prediction import predict_batch


CALIBRATION = Calibration(4.0, 2.5, 12, "cross-fitting")


def loss_at(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """What a temperature is to make small, summed image by image: the images and one that shows every class alike."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value / temperature) for value in row))
        total += log_sum - row[label] / temperature
        total += (log_sum - sum(row) / len(row) / temperature) / len(labels)
    return total


def draw_labels(logits: torch.Tensor, temperature: float, seed: int = 1) -> torch.Tensor:
    scores = (logits / temperature).softmax(dim=1)
    return torch.multinomial(scores, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def random_logits(count: int, scale: float, classes: int = 5) -> torch.Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(7))


# the temperature


@pytest.mark.parametrize(("count", "scale", "true"), [(40, 10, 3.0), (7, 3, 0.5), (1, 2, 1.0), (100, 12, 20.0)])
def test_the_temperature_has_the_least_loss(count, scale, true):
    logits = random_logits(count, scale)
    labels = draw_labels(logits, true)
    found = fit_temperature(logits, labels)
    least = loss_at(logits, labels, found)
    for other in torch.logspace(-0.7, 2, 200).tolist():
        assert least <= loss_at(logits, labels, other) + 1e-6
    assert found == pytest.approx(fit_temperature(logits + 100, labels), rel=1e-4)


def test_many_images_give_the_temperature_that_their_labels_were_drawn_with():
    logits = random_logits(20_000, 8.0)
    assert fit_temperature(logits, draw_labels(logits, 3.0)) == pytest.approx(3.0, rel=0.03)


def test_few_images_that_are_all_told_promise_little():
    """Four of them: the fifth, which nobody saw, may be any class."""
    logits = 20 * torch.eye(4)
    scores = (logits / fit_temperature(logits, torch.arange(4))).softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(scores, torch.full((4,), (1 + 1 / 16) / (1 + 1 / 4)))


def test_worse_than_chance_gives_every_class_the_same():
    assert fit_temperature(20 * torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(MAX_TEMPERATURE)
    assert fit_temperature(torch.zeros(3, 2), torch.tensor([1, 0, 0])) == pytest.approx(MAX_TEMPERATURE)


def test_there_is_nothing_to_fit():
    with raises("A temperature needs at least one image, but there is none."):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with raises("A temperature needs finite logits, but some are not. Train with a lower learning rate."):
        fit_temperature(torch.tensor([[1.0, float("inf")]]), torch.tensor([0]))


# wherever scores come from


@pytest.mark.parametrize("make", [make_classifier, with_prototypes])
def test_logits_are_divided(make):
    classifier = make()
    expected = logits_of(classifier) / 4
    torch.testing.assert_close(logits_of(classifier.calibrate(CALIBRATION)), expected)
    assert torch.equal(logits_of(classifier).argmax(dim=1), expected.argmax(dim=1))
    scorer = ImageScorer(classifier).eval()
    torch.testing.assert_close(scorer(IMAGES), expected.softmax(dim=1))


def test_with_the_margin_of_zero_shot():
    classifier = make_classifier()
    classifier.set_classes(classifier.classes, zero_shot_margin=1.5)
    expected = logits_of(classifier) / 4
    torch.testing.assert_close(logits_of(classifier.calibrate(CALIBRATION)), expected)


def test_training_does_not_see_it():
    plain, calibrated = make_classifier().train(), make_classifier().calibrate(CALIBRATION).train()
    before, after = plain(IMAGES, LABELS), calibrated(IMAGES, LABELS)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


def test_zero_shot_was_not_calibrated():
    plain, classifier = make_classifier(), make_classifier().calibrate(CALIBRATION)
    with plain.model.disable_adapter(), classifier.model.disable_adapter():
        assert torch.equal(logits_of(classifier), logits_of(plain))


def test_tasks_have_their_own(tmp_path):
    trained = with_prototypes().calibrate(CALIBRATION)
    expected = logits_of(trained).softmax(dim=1)
    trained.save_pretrained(tmp_path)
    classifier = SEPClassifier(make_model("first", seed=9), CLASSES, TEMPLATES).eval()
    classifier.load_task(tmp_path, "task").add_task("base", classifier.classes, adapter="__base__")
    tasks = classifier.tasks.of_samples(["task"] * 4 + ["base"], len(IMAGES))
    with torch.no_grad():
        found = predict_batch(classifier.vision_tower, {"pixel_values": IMAGES}, tasks, None)
    for prediction, scores in zip(found[:4], expected[:4].tolist(), strict=True):
        assert scores_of(prediction, trained.class_names) == pytest.approx(scores, abs=1e-5)


def test_predict_and_pipelines(imaged, processor):
    plain = imaged.predict(IMAGE_FILES)
    imaged.calibrate(Calibration(3.0))
    classify = pipeline(
        "image-classification", model=ImageClassifier(imaged), image_processor=processor.image_processor, device="cpu"
    )
    found = classify([str(path) for path in IMAGE_FILES], top_k=len(NAMES))
    for before, after, by_pipeline in zip(plain, imaged.predict(IMAGE_FILES), found, strict=True):
        expected = torch.tensor(scores_of(before)).log().div(3).softmax(dim=0)
        assert scores_of(after) == pytest.approx(expected.tolist(), abs=1e-5)
        assert scores_of(by_pipeline) == pytest.approx(expected.tolist(), abs=1e-5)
        assert [entry["label"] for entry in after] == [entry["label"] for entry in before]


# to which classes it belongs


def test_other_names_have_that_of_new_classes(imaged):
    imaged.finish_training().calibrate(CALIBRATION)
    trained = imaged.classes
    for names, margin in ((["lobster", "crab"], None), ([*NAMES, "crab"], None), (NAMES, 2.0)):
        imaged.set_classes(names, zero_shot_margin=margin)
        assert imaged.classes.calibration == Calibration(2.5, 2.5, 12, "cross-fitting")
    assert imaged.set_classes(NAMES).classes is trained
    assert imaged.set_classes(replace(trained, calibration=None)).classes.calibration is None


def test_other_prototypes_need_another():
    classifier = with_prototypes().calibrate(CALIBRATION)
    assert classifier.trained.calibration == CALIBRATION
    assert classifier.keep_prototypes(2.0).classes.calibration is None
    assert classifier.calibrate(CALIBRATION).finish_training().classes.calibration is None


def test_a_calibration_of_new_classes_is_not_that_of_the_trained():
    classifier = with_prototypes()
    trained = classifier.trained
    classifier.set_classes(TaskClasses(CLASSES, (TEMPLATES,), tuple("abcd"))).calibrate(CALIBRATION)
    assert classifier.trained is trained and trained.calibration is None


# files


@pytest.mark.parametrize("make", [make_classifier, with_prototypes])
def test_saved_and_loaded(make, tmp_path):
    classifier = make().calibrate(CALIBRATION)
    classifier.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    assert loaded.classes.calibration == CALIBRATION
    assert torch.equal(logits_of(loaded), logits_of(classifier))


def test_files_from_before_load_as_before(tmp_path):
    make_classifier().save_pretrained(tmp_path)
    file = tmp_path / "sep_classes.json"
    data = json.loads(file.read_text())
    assert data.pop("calibration") is None
    file.write_text(json.dumps(data))
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    assert loaded.classes.calibration is None
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))


LIMITS = "must be a number from 0.01 to 1000, but got"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([4.0], "calibration of the class list must be a dict, but got [4.0]."),
        ({}, "calibration of the class list lacks temperature."),
        ({"temperature": 2, "bias": 1}, "calibration of the class list has unknown entries: ['bias']."),
        ({"temperature": 0}, f"temperature of the calibration {LIMITS} 0."),
        ({"temperature": 1e4}, f"temperature of the calibration {LIMITS} 10000.0."),
        ({"temperature": True}, f"temperature of the calibration {LIMITS} True."),
        ({"temperature": "2"}, f"temperature of the calibration {LIMITS} '2'."),
        (
            {"temperature": 2, "new_class_temperature": -1},
            f"new_class_temperature of the calibration {LIMITS} -1.",
        ),
        (
            {"temperature": 2, "images": 1.5},
            "images of the calibration must be a whole number of at least 0, but got 1.5.",
        ),
        (
            {"temperature": 2, "source": ["val"]},
            "source of the calibration must be one of held-out images, cross-fitting, but got ['val'].",
        ),
    ],
)
def test_what_files_of_strangers_may_not_say(data, message, tmp_path):
    make_classifier().save_pretrained(tmp_path)
    file = tmp_path / "sep_classes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": data}))
    with raises(f"{file}: {message}"):
        SEPClassifier.from_pretrained(tmp_path, model=make_clip())
