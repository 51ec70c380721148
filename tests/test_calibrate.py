"""Calibration after training: on images that were held out, or on training images by models that did not see them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from bundled import ASSETS, save_shallow_clip
from peft import get_peft_model
from small_classifier import raises
from torch.utils.data import DataLoader, Subset
from transformers import AutoModel, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.calibration import fit_temperature
from sep_peft.training import LabelledImages, Recipe, calibrate, fit, train
from sep_peft.training.folders import read_folder
from sep_peft.tuner.tower import SEPTower


room = import_module("sep_peft.training.calibrate")  # the package has a function of this name
NAMES = ["butterfly", "lamp", "pizza"]
RECIPE = Recipe(epochs=2, batch_size=4, calibration_folds=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(save_shallow_clip(tmp_path_factory.mktemp("calibrate") / "clip", layers=2))


@pytest.fixture(scope="module")
def images():
    """Three training images and two others of each of three classes."""
    folder = read_folder(ASSETS / "caltech101", shots=16, seed=1)

    def first(samples, count):
        return [sample for name in NAMES for sample in [s for s in samples if s[1] == name][:count]]

    return first(folder.train, 3), first(folder.tests["test"], 2)


@pytest.fixture
def make(clip_folder, processor):
    def make(recipe=RECIPE, **config) -> SEPClassifier:
        set_seed(1)
        model = get_peft_model(AutoModel.from_pretrained(clip_folder), SEPConfig(**config))
        return SEPClassifier.from_class_names(model, processor, NAMES, recipe=recipe)

    return make


def state(classifier: SEPClassifier) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits_of(classifier: SEPClassifier, samples) -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(iter(DataLoader(LabelledImages(samples, NAMES, classifier.processor), len(samples))))
    return classifier.eval()(batch["pixel_values"]).logits, batch["labels"]


def test_on_held_out_images(make, images):
    training, held_out = images
    classifier = make()
    fit(classifier, training, quiet=True, eval_samples=held_out)
    calibration = classifier.classes.calibration
    assert (calibration.images, calibration.source) == (6, "held-out images")
    classifier.calibrate(None)
    logits, labels = logits_of(classifier, held_out)
    assert calibration.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    classifier.set_classes(replace(classifier.classes, prototypes=None, zero_shot_margin=RECIPE.zero_shot_margin))
    assert calibration.new_class_temperature == pytest.approx(
        fit_temperature(logits_of(classifier, held_out)[0], labels)
    )


@pytest.mark.parametrize(("recipe", "epochs"), [(RECIPE, 2), (replace(RECIPE, max_steps=2), 1)])
def test_the_frozen_pass_runs_once_for_all_parts(recipe, epochs, make, images, monkeypatch):
    """For the prototypes, for the images as they are, and for the epochs that a third of six steps or of two see."""
    classifier, seen, whole = make(recipe), [], SEPTower.embed_frozen
    monkeypatch.setattr(
        SEPTower, "embed_frozen", lambda tower, **inputs: (seen.append(inputs), whole(tower, **inputs))[1]
    )
    plain = LabelledImages(images[0], NAMES, classifier.processor)
    augmented = LabelledImages(images[0], NAMES, classifier.processor, recipe)
    start = room.values_of(classifier)
    classifier.encoder.frozen_embeds()
    seen.clear()
    monkeypatch.setattr(SEPTower, "embed", lambda *args, **inputs: pytest.fail("both passes ran"))
    room.cross_fit(classifier.finish_training(), plain, augmented, recipe, start, quiet=True)
    assert sum(len(inputs["pixel_values"]) for inputs in seen if "pixel_values" in inputs) == (1 + epochs) * 9


def test_by_cross_fitting(make, images):
    """As by hand: each part is told by a classifier that was trained on the other alone, for two steps of six.

    The larger part has two steps an epoch and the smaller one has one, where all images have three.
    """
    training, found, labels = images[0], [], []
    classifier = make()
    fit(classifier, training, quiet=True)
    order = [NAMES.index(name) for _, name in training]
    parts = room.deal(order, 2, RECIPE.seed)
    for part in parts:
        other, rest = make(), sorted(set(range(9)) - set(part))
        plain = LabelledImages(training, NAMES, other.processor)
        other.reset_prototypes(DataLoader(Subset(plain, rest), 4))
        augmented = LabelledImages(training, NAMES, other.processor, RECIPE)
        train(other, room.ImagePart(augmented, rest), replace(RECIPE, max_steps=2), quiet=True)
        logits, own = logits_of(other.finish_training(), [training[index] for index in part])
        found.append(logits)
        labels.append(own)
    calibration = classifier.classes.calibration
    assert (calibration.images, calibration.source) == (9, "cross-fitting")
    assert calibration.temperature == pytest.approx(fit_temperature(torch.cat(found), torch.cat(labels)), rel=1e-3)


@pytest.mark.parametrize("start_layer", [0, 1])
def test_calibrating_changes_nothing_else(start_layer, make, images):
    """Neither by its training nor by the order in which images are seen, with a cache as well."""
    found = []
    for folds in (0, 3):
        classifier = make(start_layer=start_layer)
        cache = "memory" if start_layer else None
        fit(classifier, images[0], replace(RECIPE, calibration_folds=folds), quiet=True, cache=cache)
        assert (classifier.classes.calibration is not None) == bool(folds) and not classifier.training
        found.append((state(classifier), logits_of(classifier.calibrate(None), images[1])[0]))
    (plain, logits), (calibrated, other_logits) = found
    assert plain.keys() == calibrated.keys()
    assert all(torch.equal(value, calibrated[name]) for name, value in plain.items())
    assert torch.equal(logits, other_logits)


def test_a_failure_leaves_the_trained_classifier(make, images, monkeypatch):
    classifier = make()
    fit(classifier, images[0], replace(RECIPE, calibration_folds=0), quiet=True)
    before, classes, encoder = state(classifier), classifier.classes, classifier.encoder
    prototypes = classifier.prototypes

    def fail(model, *args, **kwargs):
        next(p for p in model.parameters() if p.requires_grad).data.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "train", fail)
    plain = LabelledImages(images[0], NAMES, classifier.processor)
    with pytest.raises(KeyboardInterrupt):
        room.cross_fit(classifier, plain, plain, RECIPE, room.values_of(make()))
    assert all(torch.equal(value, before[name]) for name, value in state(classifier).items())
    assert classifier.classes is classes and classifier.encoder is encoder and classifier.prototypes is prototypes
    assert classifier.trained is classes


def test_the_paper_has_none(make, images):
    classifier = make(Recipe.published(epochs=1))
    fit(classifier, images[0], quiet=True)
    assert classifier.classes.calibration is None


def test_after_a_loop_of_ones_own(make, images):
    classifier = make().finish_training()
    held_out = LabelledImages(images[1], NAMES, classifier.processor)
    logits, labels = logits_of(classifier, images[1])
    for batch_size in (32, 4):  # a calibration that is there is not in the way
        calibrate(classifier, held_out, batch_size=batch_size)
        assert classifier.classes.calibration.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-3)


def test_a_part_that_cannot_be_trained_is_a_warning(make, images, monkeypatch):
    """Here its learning rate is too high, as only a part's may be."""
    whole = room.train
    monkeypatch.setattr(
        room, "train", lambda *args, **kwargs: (whole(*args, **kwargs), args[0].prototypes.data.fill_(float("nan")))
    )
    classifier = make()
    message = (
        "Scores are not calibrated, because a training without some images failed: prototypes must be finite, but some "
        "values are not. Train with a lower learning rate."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        fit(classifier, images[0], quiet=True)
    assert classifier.classes.calibration is None
    assert logits_of(classifier, images[1])[0].isfinite().all()


# parts


@pytest.mark.parametrize(("counts", "folds"), [([4, 4, 4], 4), ([5, 1, 3], 4), ([1, 1], 4), ([7], 2), ([16] * 3, 5)])
def test_parts_are_even(counts, folds):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    parts = room.deal(labels, folds, seed=3)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert len(parts) == min(folds, len(labels)) and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    for label in range(len(counts)):
        own = [Counter(labels[index] for index in part)[label] for part in parts]
        assert max(own) - min(own) <= 1
    assert parts == room.deal(labels, folds, seed=3)
    if len(labels) > 10:
        assert parts != room.deal(labels, folds, seed=4)


def test_one_image_is_too_few(make, images):
    classifier = make()
    plain = LabelledImages(images[0][:1], NAMES, classifier.processor)
    with raises("Cross-fitting needs at least two images, but there are 1."):
        room.cross_fit(classifier, plain, plain, RECIPE, room.values_of(classifier))


def test_held_out_images_of_other_classes_are_found_before_training(make, images):
    classifier = make()
    before = state(classifier)
    with raises("The classifier has no classes crab; it has butterfly, lamp, pizza."):
        fit(classifier, images[0], quiet=True, eval_samples=[("a.jpg", "crab")])
    with raises("There are no images to validate on."):
        fit(classifier, images[0], quiet=True, eval_samples=[])
    assert all(torch.equal(value, before[name]) for name, value in state(classifier).items())
