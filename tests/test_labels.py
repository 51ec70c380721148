"""Classifiers of which an image may have several classes: trained, saved, asked, and refused what makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from labelled import NAMES, RECIPE, make_classifier, mosaics
from shallow_classifier import same, weights
from small_classifier import contents, raises
from transformers import pipeline

from sep_peft import SEPClassifier
from sep_peft.classifier.export import ImageScorer
from sep_peft.classifier.export_file import export_file
from sep_peft.classifier.label_calibration import LabelCalibration
from sep_peft.classifier.pipelines import ImageClassifier
from sep_peft.training import LabelledImages, calibrate, cross_validate, evaluate, evaluate_labels, fit
from sep_peft.training.label_evaluation import targets_of
from sep_peft.training.trainer import SEPTrainer


TRAIN, VAL = mosaics("train", 8), mosaics("test", 8, seed=1)


@pytest.fixture(scope="module")
def trained() -> SEPClassifier:
    """Held-out images calibrate it."""
    classifier = make_classifier()
    fit(classifier, TRAIN, eval_samples=VAL, quiet=True)
    return classifier


def scores_of(prediction) -> dict[str, float]:
    return {each["label"]: each["score"] for each in prediction}


def test_fit_learns_what_images_have_and_keeps_its_history():
    classifier = make_classifier()
    history = fit(classifier, TRAIN, replace(RECIPE, epochs=2), eval_samples=VAL, quiet=True)
    assert history[-1]["loss"] < history[0]["loss"]
    assert [name for name in history[0] if name.startswith("val")] == ["val_map"]
    assert history.measured[history.best - 1] == max(history.measured)
    found = evaluate_labels(classifier, VAL)
    assert found.mean_average_precision == pytest.approx(max(history.measured), abs=1e-4)
    with classifier.model.disable_adapter():
        assert evaluate_labels(classifier, VAL).mean_average_precision == pytest.approx(history.zero_shot, abs=1e-4)


def test_classes_above_their_thresholds_are_named(trained):
    images = [image for image, _ in VAL]
    every, named = trained.predict(images, min_score=0.0), trained.predict(images)
    thresholds = dict(zip(NAMES, trained.classes.calibration.trained.thresholds, strict=True))
    for all_of_it, own in zip(every, named, strict=True):
        assert [each["score"] for each in all_of_it] == sorted((each["score"] for each in all_of_it), reverse=True)
        assert own == [each for each in all_of_it if each["score"] >= thresholds[each["label"]]]
    assert trained.predict(images, top_k=1) == [own[:1] for own in named]
    middle = every[0][1]["score"]
    assert trained.predict(images, min_score=middle)[0] == every[0][:2]
    assert trained.predict(images[0], min_score=1.0) == []
    logits = trained(trained.processor(images=images, return_tensors="pt")["pixel_values"]).logits
    for row, all_of_it in zip(logits.sigmoid(), every, strict=True):
        assert scores_of(all_of_it) == pytest.approx(dict(zip(NAMES, row.tolist(), strict=True)), abs=1e-5)


def test_exports_pipelines_and_explanations_have_the_same_scores(trained):
    image = VAL[0][0]
    pixels = trained.processor(images=image, return_tensors="pt")["pixel_values"]
    every = scores_of(trained.predict(image, min_score=0.0))
    with torch.no_grad():
        exported = dict(zip(NAMES, ImageScorer(trained).eval()(pixels)[0].tolist(), strict=True))
        piped = ImageClassifier(trained)
        assert piped.config.problem_type == "multi_label_classification"
        logits = piped(pixels).logits[0].sigmoid().tolist()
    assert exported == pytest.approx(every, abs=1e-5) and dict(zip(NAMES, logits, strict=True)) == pytest.approx(every)
    explained = trained.explain(image, "pizza")
    assert explained.score == pytest.approx(every["pizza"], abs=1e-5)


def test_a_saved_classifier_says_that_it_is_of_several_labels(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path)
    assert loaded.classes.multi_label and loaded.classes.calibration == trained.classes.calibration
    every = loaded.predict(VAL[0][0], min_score=0.0)
    zero_shot = pipeline("zero-shot-image-classification", model=str(tmp_path))
    assert scores_of(zero_shot(VAL[0][0], candidate_labels=NAMES)) == pytest.approx(scores_of(every), abs=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters())
    image = VAL[0][0]
    assert loaded.predict(image, min_score=0.0) == trained.predict(image, min_score=0.0)
    data = json.loads((tmp_path / "sep_classes.json").read_text())
    assert data["format_version"] == 4 and data["multi_label"] is True
    for change, message in (
        ({"multi_label": 3}, "multi_label must be True or False, but got 3."),
        ({"zero_shot_margin": 1.5}, "zero_shot_margin compares classes of which an image has one, but these have "
         "multi_label=True. Pass 0."),
        ({"calibration": {"temperature": 1.0}}, "calibration of the class list must have images, new_classes, rare, "
         "source, trained, zero_shot, got {'temperature': 1.0}."),
        ({"format_version": 5}, None),
    ):  # fmt: skip
        file = tmp_path / "sep_classes.json"
        file.write_text(json.dumps(data | change))
        newer = f"{file} has format version 5, but this version of sep_peft reads 1 to 4. Upgrade sep_peft."
        with raises(newer if message is None else f"{file}: {message}"):
            SEPClassifier.from_pretrained(tmp_path)


def test_classes_of_one_label_are_saved_as_before(tmp_path):
    classifier = make_classifier(multi_label=False)
    classifier.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "sep_classes.json").read_text())
    assert data["format_version"] == 1 and "multi_label" not in data


def test_other_classes_have_the_scale_of_new_ones_and_trained_ones_their_own(trained):
    image, own, calibration = VAL[0][0], trained.classes, trained.classes.calibration
    before = scores_of(trained.predict(image, min_score=0.0))
    try:
        trained.set_classes(["sunflower", "lamp"])
        assert scores_of(trained.predict(image, min_score=0.0)) == pytest.approx(
            {name: before[name] for name in ("lamp", "sunflower")}, abs=1e-5
        )
        trained.set_classes(["dog", "sea", "house"])
        assert trained.classes.multi_label and trained.classes.calibration == calibration.for_new_classes()
        assert len(trained.predict(image, min_score=0.0)) == 3
    finally:
        trained.set_classes(own)


def test_cross_fitting_calibrates_without_held_out_images_and_leaves_weights_alone():
    classifier, other = make_classifier(), make_classifier()
    fit(classifier, TRAIN, RECIPE, quiet=True)
    calibration = classifier.classes.calibration
    assert isinstance(calibration, LabelCalibration)
    assert (calibration.source, calibration.images) == ("cross-fitting", len(TRAIN))
    fit(other, TRAIN, RECIPE, eval_samples=VAL, quiet=True)
    assert same(weights(classifier), weights(other))
    calibrate(classifier, LabelledImages(VAL, NAMES, classifier.processor))
    assert classifier.classes.calibration == other.classes.calibration


def test_a_training_goes_on_bit_for_bit(tmp_path):
    recipe = replace(RECIPE, epochs=2)
    whole = make_classifier()
    expected = fit(whole, TRAIN, recipe, eval_samples=VAL, quiet=True)
    stopped = make_classifier()
    fit(stopped, TRAIN, recipe, eval_samples=VAL, folder=tmp_path, callbacks=[lambda h: h.stop("enough")], quiet=True)
    resumed = make_classifier()
    assert fit(resumed, TRAIN, recipe, eval_samples=VAL, folder=tmp_path, resume=True, quiet=True) == expected
    assert same(weights(resumed), weights(whole))
    assert "run/log.csv" in contents(tmp_path)


def test_prototypes_start_at_the_mean_of_all_images_that_have_a_class():
    classifier = make_classifier()
    images = LabelledImages(TRAIN, NAMES, classifier.processor)
    batch = next(iter(torch.utils.data.DataLoader(images, len(images))))
    torch.testing.assert_close(batch["labels"], targets_of(TRAIN, NAMES).float())
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(classifier.vision_tower.embed_frozen(batch["pixel_values"]), dim=1)
    classifier.reset_prototypes([batch])
    expected = torch.stack([embeds[batch["labels"][:, place] == 1].mean(dim=0) for place in range(3)])
    torch.testing.assert_close(classifier.prototypes.data, expected, atol=1e-5, rtol=1e-5)


def test_what_makes_no_sense_with_several_labels_is_refused(trained, tmp_path):
    classifier, image = make_classifier(), VAL[0][0]
    classifier.add_task("own", classifier.classes, adapter="default")
    one = (
        "is for classes of which an image has one. Where it may have several, those are named whose scores reach their "
        "thresholds, or min_score, and an empty list is none of these."
    )
    with raises(f"unknown=True {one}"):
        trained.predict(image, unknown=True)
    with raises(f"coverage {one}"):
        trained.predict(image, coverage=0.9)
    pixels = trained.processor.image_processor([image], return_tensors="pt").pixel_values
    for ask in (
        lambda: classifier.predict(image),
        lambda: ImageScorer(classifier),
        lambda: ImageClassifier(classifier)(pixels),
        lambda: export_file(tmp_path / "task.pt2", classifier, [image]),
        lambda: export_file(tmp_path / "task.pt2", classifier, [image], tasks=["own"]),
    ):
        with raises(
            "Where an image may have several classes, scores need a calibration, and there is none. fit makes one, and "
            "so does sep_peft.training.calibrate."
        ):
            ask()
    assert not list(tmp_path.iterdir())
    with raises("A 'gda' head tells one class an image, but it may have several of these. Keep prototypes."):
        trained.keep_prototypes(kind="gda", batches=[])
    with raises(
        "Where an image may have several classes, thresholds are chosen on images that were not trained on. Pass "
        "eval_samples, or a recipe with calibration_folds and two images."
    ):
        fit(classifier, TRAIN, replace(RECIPE, calibration_folds=0))
    with raises(
        "class_sample=2 draws beside the one class of an image, but it may have several of these. Pass a recipe with "
        "class_sample=0."
    ):
        fit(classifier, TRAIN, replace(RECIPE, class_sample=2))
    with raises(
        "agreement_weight of the recipe are for classes of which an image has one, but it may have several of these. "
        "Leave them at 0."
    ):
        fit(classifier, TRAIN, replace(RECIPE, agreement_weight=1.0))
    with raises(
        "k folds measure classes of which an image has one, but it may have several of these. Hold images out and use "
        "evaluate_labels."
    ):
        cross_validate(classifier, TRAIN)
    with raises("SEPTrainer trains classes of which an image has one, but it may have several. Use fit."):
        SEPTrainer(classifier)
    plain = SEPClassifier.from_class_names(classifier.model, classifier.processor, classifier.class_names)
    for train in (lambda recipe: fit(plain, [], recipe), lambda recipe: SEPTrainer(plain, recipe=recipe)):
        with raises(
            "negative_focus is for images that may have several classes, but these have one. It is 2.0; leave it at 0."
        ):
            train(replace(RECIPE, negative_focus=2.0))
    with raises(
        "An image may have several of the classifier's classes. Train by fit and measure by evaluate_labels, with "
        "(image, [name, ...]) for each image."
    ):
        evaluate(trained, VAL)


def test_samples_are_checked():
    classifier, single = make_classifier(), make_classifier(multi_label=False)
    with raises(
        "A sample is an image and a list of names of its classes, but sample 0 has 'lamp' in the place of the list. "
        "Take names from classifier.class_names."
    ):
        fit(classifier, [("a.png", "lamp")])
    with raises("The classifier has no classes 'dog'; it has 'lamp', 'pizza', 'sunflower'."):
        fit(classifier, [("a.png", ["lamp", "dog"])])
    with raises(
        "An image has one of the classifier's classes. Make it with multi_label=True where it may have several."
    ):
        evaluate_labels(single, VAL)
    pixels = torch.zeros(2, 3, 64, 64)
    with raises(
        "Labels must have the shape (2, 3), 1 for the labels of each image and 0 for its other classes, but got (2,)."
    ):
        classifier(pixels, labels=torch.tensor([0, 1]))
    with raises("Labels must be 0 or 1 where an image may have several classes, but other values are there."):
        classifier(pixels, labels=torch.full((2, 3), 0.5))


def with_sigmoids() -> SEPClassifier:
    """Not calibrated, with what training might have left of the sigmoids."""
    classifier = make_classifier()
    for parameter in classifier.sigmoids.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    return classifier.finish_training()


@torch.no_grad()
def test_without_calibration_logits_are_those_of_before_a_save_and_of_each_class_among_all(tmp_path):
    classifier = with_sigmoids()
    pixels = classifier.processor(images=[image for image, _ in VAL], return_tensors="pt")["pixel_values"]
    expected = classifier(pixels).logits
    classifier.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).logits, expected)
    assert not any(p.requires_grad for p in loaded.sigmoids.parameters())
    going_on = SEPClassifier.from_pretrained(tmp_path, is_trainable=True)
    assert same(dict(going_on.sigmoids.named_parameters()), dict(classifier.sigmoids.named_parameters()))
    assert all(p.requires_grad for p in going_on.sigmoids.parameters())
    loaded.set_classes(["lamp", "cup"])
    assert not torch.equal(loaded(pixels).logits[:, 0], expected[:, 0])
    loaded.set_classes(NAMES[:0:-1])
    torch.testing.assert_close(loaded(pixels).logits, expected[:, [2, 1]])
    data = json.loads((tmp_path / "sep_classes.json").read_text())
    kept = data["sigmoids"]
    keys = "log_slope, biases, prototype_biases"
    for change, message in (
        ({"sigmoids": [1]}, f"sigmoids of the class list must have {keys}, got [1]."),
        ({"sigmoids": kept | {"log_slope": 31}}, "log_slope of the sigmoids must be a number from -30 to 30, got 31. "
         "Train with a lower learning rate."),
        ({"sigmoids": kept | {"biases": ["a"]}}, "biases of the sigmoids must be numbers from -10000 to 10000, got "
         "('a',). Train with a lower learning rate."),
        ({"sigmoids": kept | {"biases": [1.0]}}, "biases and prototype_biases of the sigmoids must be as many, but are "
         "1 and 3."),
        ({"sigmoids": {"log_slope": 0, "biases": [1.0], "prototype_biases": [1.0]}}, "The sigmoids have the biases of "
         "1 class, but there are 3."),
        ({"multi_label": False}, "sigmoids are for classes of which an image may have several, but these have one."),
    ):  # fmt: skip
        file = tmp_path / "sep_classes.json"
        file.write_text(json.dumps(data | change))
        with raises(f"{file}: {message}"):
            SEPClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("trains", [True, False])
def test_what_takes_the_place_of_the_loss_trains_as_it_did(trains):
    """Of the classes before, and where there was none, as the model does."""
    classifier = make_classifier().requires_grad_(trains)
    for classes in (["cup", "lamp"], replace(classifier.classes, multi_label=False), classifier.classes):
        classifier.set_classes(classes)
        of_loss = [classifier.prototypes, *(classifier.sigmoids.parameters() if classifier.sigmoids else ())]
        assert {p.requires_grad for p in of_loss} == {trains}
