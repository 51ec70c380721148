"""No training step waits for an accelerator: shown by a device without values, `stand_in`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import CASES
from family_models import adapt_once, tower_of
from fresh import usual
from torch import nn

from sep_peft.classifier import on_the_way, value_sample
from sep_peft.classifier.on_the_way import OnTheWay, send
from sep_peft.classifier.value_sample import ValueSample


#: Steps of a classifier on the device; prints where each of them waits.
STEPS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from stand_in import Waits
import torch
from small_classifier import IMAGES, LABELS, make_classifier
from small_clip import make_clip
from sep_peft.method.recipe import Recipe
from sep_peft.training import History
from sep_peft.training.progress import Progress

found = {}


def classifier_steps(name, size, **config):
    waits = Waits()
    clip = make_clip(text_layers=2, vision_layers=2)
    classifier = make_classifier(recipe=Recipe(class_sample=size), config={"clip": clip, **config})
    waits.move(classifier)
    images, labels = waits.there(IMAGES), waits.there(LABELS)
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad])
    progress = Progress(History(1), 2, 0, quiet=False)
    with waits:
        for _ in range(2):
            output = classifier(images, labels, num_items_in_batch=len(labels))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.step(output.loss, len(labels))
    found[name] = waits.places


def evaluation():
    waits = Waits()
    classifier = make_classifier(config={"clip": make_clip(text_layers=2, vision_layers=2)}).eval()
    waits.move(classifier)
    images = waits.there(IMAGES)
    with waits, torch.no_grad():
        classifier(images)
        waits.places.clear()
        classifier(images)
    found["evaluation"] = waits.places


classifier_steps("all texts", 0)
classifier_steps("a sample", 2)
evaluation()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def places() -> dict[str, list[str]]:
    """Steps -> where they wait."""
    result = usual().run(STEPS, str(Path(__file__).parent))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", ["all texts", "a sample"])
def test_a_training_step_waits_for_nothing(step, places):
    """Its losses, its draw of classes and its progress included."""
    assert places[step] == []


def test_evaluation_looks_at_the_weights(places):
    """Which shows that the device notes who waits."""
    assert places["evaluation"]
    assert all(place.startswith("equal at classifier/value_sample.py:") for place in places["evaluation"])


def test_a_change_on_an_accelerator_is_seen_one_look_late(monkeypatch):
    for module in (on_the_way, value_sample):
        monkeypatch.setattr(module, "at_hand", lambda tensor: False)
    monkeypatch.setattr(value_sample, "can_come_later", lambda device: True)
    there = []

    class Event:
        def query(self):
            return there[-1]

    monkeypatch.setattr(on_the_way, "_event", lambda device: Event())
    parameter = nn.Parameter(torch.zeros(3))
    sample = ValueSample([parameter])
    there.append(True)
    assert not sample.has_changed(waits=False) and not sample.has_changed(waits=False)
    parameter.data.add_(1)
    assert sample.has_changed()
    assert not sample.has_changed(waits=False)  # what the look before has found; this one is on the way
    there.append(False)
    assert not sample.has_changed(waits=False)
    there.append(True)
    assert sample.has_changed(waits=False)


def test_a_device_without_streams_is_waited_for(monkeypatch):
    """As that of Apple, whose module of torch has events and no streams."""
    monkeypatch.setattr(on_the_way, "at_hand", lambda tensor: False)
    monkeypatch.delattr(torch.cpu, "current_stream")
    assert OnTheWay(torch.tensor(3.0)).get() == 3


def test_a_device_without_streams_has_read_what_it_is_sent():
    """Or it would read memory in which something else stands by then."""

    class Sent:
        def to(self, device, *, non_blocking):
            return device.type, non_blocking

    assert send(Sent(), torch.device("mps")) == ("mps", False)
    assert send(Sent(), torch.device("cuda")) == ("cuda", True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.text])
@torch.no_grad()
def test_texts_that_need_no_mask(name):
    """Embeddings without the mask are those with it, wherever it is left out."""
    tower = tower_of(adapt_once(CASES[name]), "text")
    padded = CASES[name].text([6, 4])
    without = tower.texts.without_mask(padded)
    if "attention_mask" not in without:
        assert tower.spec.causal
        for embed in (tower.embed_prompted, tower.embed_frozen):
            torch.testing.assert_close(embed(**without), embed(**padded), rtol=1e-4, atol=2e-5)
    for kept in [CASES[name].text([6, 4], left=True)] if CASES[name].left else []:
        assert "attention_mask" in tower.texts.without_mask(kept)


def test_clip_needs_no_mask():
    rules, texts = tower_of(adapt_once(CASES["clip"]), "text").texts, CASES["clip"].text([6, 4])
    assert set(rules.without_mask(texts)) == {"input_ids"}
    texts["attention_mask"][0, 2] = 0  # a token of the text itself, which no causal attention hides
    assert "attention_mask" in rules.without_mask(texts)
