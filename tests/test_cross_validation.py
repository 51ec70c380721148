"""Measuring by k folds: every image is told by an adapter that was trained on the others, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from bundled import ASSETS, save_shallow_clip
from peft import get_peft_model
from small_classifier import raises
from torch.utils.data import Subset
from transformers import AutoModel, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.calibration import fit_temperature
from sep_peft.cli.evaluate import evaluate
from sep_peft.cli.session import AdapterSource, Session
from sep_peft.training import LabelledImages, Recipe, cross_validate, fit
from sep_peft.training.calibrate import deal, logits_of
from sep_peft.training.folders import read_folder
from sep_peft.training.run_log import RUN_FOLDER, SETTINGS_FILE


NAMES = ["butterfly", "lamp"]
RECIPE = Recipe(epochs=1, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return str(save_shallow_clip(tmp_path_factory.mktemp("folds") / "clip", layers=2))


@pytest.fixture(scope="module")
def samples():
    """Three images of each of two classes."""
    found = read_folder(ASSETS / "caltech101", shots=16, seed=1).train
    return [sample for name in NAMES for sample in [s for s in found if s[1] == name][:3]]


def make(clip_folder, processor, **options) -> SEPClassifier:
    set_seed(RECIPE.seed)
    model = get_peft_model(AutoModel.from_pretrained(clip_folder), SEPConfig(num_text_prompts=2, num_vision_prompts=3))
    return SEPClassifier.from_class_names(model, processor, NAMES, recipe=RECIPE, **options)


@pytest.fixture(scope="module")
def trained(clip_folder, processor, samples, tmp_path_factory) -> Path:
    """A folder with an adapter."""
    classifier = make(clip_folder, processor)
    fit(classifier, samples, replace(RECIPE, calibration_folds=0), quiet=True)
    classifier.save_pretrained(folder := tmp_path_factory.mktemp("folds") / "adapter")
    return folder


def state(classifier: SEPClassifier) -> list:
    return [(name, p.requires_grad, p.detach().clone()) for name, p in classifier.named_parameters()]


def test_folds_are_trainings_of_new_adapters(clip_folder, processor, samples, trained):
    """As by hand, although the adapter has seen every image; its temperature is that of the other parts."""
    base = AutoModel.from_pretrained(clip_folder)
    classifier = SEPClassifier.from_pretrained(trained, model=base, processor=processor)
    before, classes = state(classifier), classifier.classes
    found = cross_validate(classifier, samples, RECIPE, folds=2, quiet=True)
    assert (found.folds, found.images, found.names) == (2, 6, NAMES)
    plain, logits, labels = LabelledImages(samples, NAMES, processor), [], []
    parts = deal([NAMES.index(name) for _, name in samples], 2, RECIPE.seed)
    for part in parts:
        other = make(clip_folder, processor)
        rest = [samples[index] for index in range(6) if index not in part]
        fit(other, rest, replace(RECIPE, calibration_folds=0), quiet=True)
        own, _, truth = logits_of(other, Subset(plain, part), 4, 0)
        logits.append(own)
        labels.append(truth)
    for place, part in enumerate(parts):
        temperature = fit_temperature(logits[1 - place], labels[1 - place])
        torch.testing.assert_close(found.scores[part], (logits[place] / temperature).softmax(dim=1))
    after = state(classifier)
    assert [each[:2] for each in after] == [each[:2] for each in before]
    assert all(torch.equal(old[2], new[2]) for old, new in zip(before, after, strict=True))
    assert classifier.classes is classes and list(classifier.model.peft_config) == ["default"]
    assert classifier.model.active_adapter == "default" and not classifier.training


def test_a_failure_leaves_no_adapter(clip_folder, processor, samples):
    classifier = make(clip_folder, processor).train()
    before = state(classifier)
    with pytest.raises(ValueError, match=r"^The loss is nan in epoch \d"):
        cross_validate(classifier, samples, replace(RECIPE, learning_rate=1e30, epochs=3), folds=2, quiet=True)
    after = state(classifier)
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
    assert list(classifier.model.peft_config) == ["default"] and classifier.training


def test_what_cannot_be_dealt(clip_folder, processor, samples):
    classifier = make(clip_folder, processor)
    with raises("folds must be a whole number of at least 2, but got 1."):
        cross_validate(classifier, samples, folds=1)
    with raises("k folds need at least two images, but there are 1."):
        cross_validate(classifier, samples[:1])
    with raises("There are no images to deal into folds."):
        cross_validate(classifier, [])
    classifier.model.add_adapter("fold", SEPConfig())
    with raises('An adapter is called "fold", which is the name of those that are trained for k folds.'):
        cross_validate(classifier, samples)


# the command


@pytest.fixture
def folder(samples, tmp_path) -> Path:
    """With train/ alone."""
    for path, name in samples:
        (tmp_path / "images" / "train" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "images" / "train" / name)
    return tmp_path / "images"


def test_a_folder_without_test_images(folder, trained, clip_folder, tmp_path):
    """By the recipe and with as many images as the run's settings say."""
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    settings = adapter / RUN_FOLDER / SETTINGS_FILE
    settings.parent.mkdir()
    settings.write_text(json.dumps({"recipe": asdict(RECIPE), "shots": 2}))
    source, session = AdapterSource(str(adapter)), Session("cpu", quiet=True)
    found = evaluate(source, folder, session, base_model=clip_folder, folds=2)
    assert found.lines[0] == "2 folds, no test: each image was told by an adapter that was trained on the others"
    assert (found.data["folds"], found.data["images"], found.data["count"]) == (2, 4, {"butterfly": 2, "lamp": 2})
    assert found.data["zero_shot"] is not None
    with raises("k folds train anew on the trained classes. Leave out --new-classes."):
        evaluate(source, folder, session, base_model=clip_folder, new_classes=True)
    settings.write_text(json.dumps({"recipe": {"epochs": -1}}))
    message = (
        f"{settings} does not hold the settings of a training ('epochs must be an integer of at least 1, but got -1.')."
    )
    with raises(message):
        evaluate(source, folder, session, base_model=clip_folder)
    settings.write_text(json.dumps({"recipe": asdict(RECIPE), "shots": "2"}))
    with raises(f"{settings} does not hold the settings of a training (shots is '2')."):
        evaluate(source, folder, session, base_model=clip_folder)
