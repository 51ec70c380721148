"""The strength of an adapter beside the frozen model, set after training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_classifier import CLASSES, IMAGES, LABELS, SMALL, make_classifier, make_model, mix, raises, with_prototypes
from small_clip import perturb
from small_sep import TEXTS

import sep_peft
from sep_peft import SEPClassifier, SEPConfig, TaskClasses
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.logits import head_features
from sep_peft.tuner.model import find_towers


BATCHES = [{"pixel_values": IMAGES[:3], "labels": LABELS[:3]}, {"pixel_values": IMAGES[3:], "labels": LABELS[3:]}]
OTHERS = TaskClasses({"input_ids": CLASSES["input_ids"][:2], "attention_mask": CLASSES["attention_mask"][:2]})


@torch.no_grad()
def embeds(model, adapter_names=None) -> list[torch.Tensor]:
    names = {} if adapter_names is None else {"adapter_names": adapter_names}
    found = model.get_image_features(pixel_values=IMAGES[:4], **names), model.get_text_features(**TEXTS, **names)
    return [getattr(output, "pooler_output", output) for output in found]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.9])
def test_it_is_an_adapter_that_was_made_with_this_weight(weight):
    model = make_model(frozen_weight=0.5).eval()
    before = embeds(model)
    sep_peft.set_frozen_weight(model, "default", weight)
    assert equal(embeds(model), embeds(make_model(frozen_weight=weight).eval()))
    assert not equal(embeds(model), before)
    sep_peft.set_frozen_weight(model, "default", 0.5)
    assert equal(embeds(model), before)


def test_others_keep_theirs_in_a_mixed_batch_and_it_is_saved(tmp_path):
    model = make_model()
    torch.manual_seed(4)
    model.add_adapter("other", SEPConfig.published(**SMALL, frozen_weight=0.2))
    perturb(model, "other", seed=4)
    model.eval()
    names = ["other", "default", "other", "default"]
    before = embeds(model, names)
    sep_peft.set_frozen_weight(model, "default", 0.75)
    after, alone = embeds(model, names), embeds(model)
    for mixed, old, own in zip(after, before, alone, strict=True):
        torch.testing.assert_close(mixed[::2], old[::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[1::2], own[1::2], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mixed[1::2], old[1::2], atol=1e-4)
    model.save_pretrained(tmp_path)
    assert SEPConfig.from_pretrained(tmp_path).frozen_weight == 0.75
    assert SEPConfig.from_pretrained(tmp_path / "other").frozen_weight == 0.2


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("birds", 0.5, "There is no SEP adapter 'birds' in this model."),
        ("default", 1.0, "frozen_weight must be a number of at least 0 and below 1, but got 1.0."),
        ("default", float("nan"), "frozen_weight must be a number of at least 0 and below 1, but got nan."),
        ("default", "0.5", "frozen_weight must be a number of at least 0 and below 1, but got '0.5'."),
    ],
)
def test_refusals(name, weight, message):
    model = make_model()
    with raises(message):
        sep_peft.set_frozen_weight(model, name, weight)
    assert model.peft_config["default"].frozen_weight == 0.5


@torch.no_grad()
def test_a_classifier_encodes_its_texts_anew():
    classifier = make_classifier(prototype_weight=0.0).finish_training()
    classifier(IMAGES)
    assert classifier.set_frozen_weight(0.8) is classifier
    assert torch.equal(classifier(IMAGES).logits, make_classifier(config={"frozen_weight": 0.8}).eval()(IMAGES).logits)
    towers = find_towers(classifier.model)
    prompted, frozen = towers["vision"].embed(pixel_values=IMAGES)
    torch.testing.assert_close(classifier.image_embeds(IMAGES)[0], mix(prompted, frozen, 0.8))


def test_a_calibration_is_dropped():
    classifier = make_classifier(prototype_weight=0.0).finish_training().calibrate(Calibration(2.0))
    classifier.set_frozen_weight(0.4)
    assert classifier.classes.calibration is None and classifier.trained is classifier.classes


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prototypes", "gda", "prototypes-gda", "tip-adapter-f"])
def test_heads_are_made_anew(kind, tmp_path):
    def keep(classifier):
        return classifier.keep_prototypes(2.0) if kind == "prototypes" else classifier.keep_prototypes(**options)

    options = {"kind": kind, "batches": BATCHES}
    classifier = keep(with_prototypes(None)).eval()
    before = classifier(IMAGES).logits
    what = "prototypes, which belong" if kind == "prototypes" else f"a {kind} head, which belongs"
    message = (
        f"The classes keep {what} to the present frozen_weight. Pass batches of the training images, from which it can "
        "be made anew."
    )
    with raises(message):
        classifier.set_frozen_weight(0.8)
    with raises("Labels must be between 0 and 3 for 4 classes, but got [4]."):
        classifier.set_frozen_weight(0.8, batches=[{"pixel_values": IMAGES[:1], "labels": torch.tensor([4])}])
    assert torch.equal(classifier(IMAGES).logits, before)

    after = classifier.set_frozen_weight(0.8, batches=BATCHES)(IMAGES).logits
    anew = make_classifier(config={"frozen_weight": 0.8}).eval()
    if kind.startswith("prototypes"):
        features = head_features(*anew.image_embeds(IMAGES))
        means = torch.stack([features[LABELS == c].mean(dim=0) for c in range(4)])
        anew.prototypes.data = means
    torch.testing.assert_close(after, keep(anew)(IMAGES).logits)
    classifier.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_model().unload())
    assert torch.equal(loaded(IMAGES).logits, after) and loaded.model.peft_config["default"].frozen_weight == 0.8


@torch.no_grad()
def test_a_task_and_those_beside_it():
    classifier = make_classifier(prototype_weight=0.0).finish_training()
    torch.manual_seed(4)
    classifier.model.add_adapter("other", SEPConfig.published(**SMALL))
    perturb(classifier.model, "other", seed=4)
    calibrated = replace(OTHERS, calibration=Calibration(3.0))
    classifier.add_task("pair", calibrated, adapter="other").add_task("plain", OTHERS, adapter="__base__")
    own = classifier(IMAGES).logits
    classifier.set_frozen_weight(0.9, task="pair")
    assert classifier.model.peft_config["other"].frozen_weight == 0.9 and list(classifier.tasks) == ["pair", "plain"]
    assert classifier.tasks["pair"].classes.calibration is None and torch.equal(classifier(IMAGES).logits, own)
    with raises("There is no task 'birds'; the tasks are ['pair', 'plain']."):
        classifier.set_frozen_weight(0.9, task="birds")
    with raises("There is no adapter whose frozen_weight could be set: the model predicts as it is."):
        classifier.set_frozen_weight(0.9, task="plain")
    with raises("batches must be left out: the classes keep neither prototypes nor another head."):
        classifier.set_frozen_weight(0.9, task="pair", batches=BATCHES)

    classifier.reset_prototypes()
    classifier.keep_prototypes(2.0).add_task("again", OTHERS, adapter="default")
    message = (
        "Adapter 'default' serves other classes as well (\"the classifier's own\"), whose heads belong to the present "
        "frozen_weight. Load the adapter a second time for one of them."
    )
    with raises(message):
        classifier.set_frozen_weight(0.9, task="again")
    classifier.set_classes(OTHERS)
    message = (
        "The classes that were trained keep a head for the present frozen_weight, but others are set. Call set_classes "
        "with the trained names first."
    )
    with raises(message):
        classifier.set_frozen_weight(0.9)
    assert classifier.model.peft_config["default"].frozen_weight == 0.5
