"""`repr` of a classifier: short, true, and harmless whatever the names in it are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_classifier import make_classifier
from torch import nn

from sep_peft.classifier.calibration import Calibration


@pytest.fixture
def classifier():
    return make_classifier()


def lines(classifier) -> dict[str, str]:
    first, *middle, last = repr(classifier).splitlines()
    assert (first, last) == ("SEPClassifier(", ")")
    return dict(line.removeprefix("  ").split(": ", 1) for line in middle)


def test_what_it_says(classifier):
    parameters = list(classifier.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    own, count = trained - classifier.prototypes.numel(), sum(p.numel() for p in parameters)
    assert 0 < own < trained < count
    assert lines(classifier) == {
        "classes": "4 ('class 0', 'class 1', 'class 2', ...)",
        "base": "CLIPModel",
        "adapter": "'default'",
        "parameters": f"{own:,} in the adapter, {count:,} in all, {trained:,} being trained",
        "tasks": "none",
        "calibration": "none",
    }


def test_what_changes_is_told(classifier):
    classifier.model.get_base_model().name_or_path = "openai/clip\x1b[2J"
    classifier.add_task("first", replace(classifier.classes, names=tuple("abcd")), adapter="__base__")
    classifier.calibrate(Calibration(1.2345, images=1600, source="cross-fitting")).requires_grad_(False)
    with classifier.model.disable_adapter():
        found = lines(classifier)
    assert found["base"] == r"CLIPModel 'openai/clip\x1b[2J'"
    assert found["adapter"] == "off"
    assert found["parameters"].endswith(" in all, 0 being trained")
    assert found["tasks"] == "1 ('first')"
    assert found["calibration"] == "temperature 1.23, found on 1,600 images (cross-fitting)"


def test_names_of_strangers_stay_on_their_line(classifier):
    names = ("a\nb\x1b[31m", "c" * 5000, "<b>", "d")
    classifier.set_classes(replace(classifier.classes, names=names))
    assert len(repr(classifier).splitlines()) == 8
    assert lines(classifier)["classes"].startswith(r"4 ('a\nb\x1b[31m', 'ccc")
    assert len(repr(classifier)) < 1000


def test_inside_of_another_module(classifier):
    text = repr(nn.Sequential(classifier, nn.Identity()))
    assert text.startswith("Sequential(\n  (0): SEPClassifier(\n    classes: 4 (")
    assert text.endswith("\n  )\n  (1): Identity()\n)")


def test_the_tree_is_still_there(classifier):
    assert "SEPTower" in repr(classifier.model)
