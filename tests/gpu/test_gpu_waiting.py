"""A training step only tells the GPU what to do and never waits for it; tests/test_waiting.py shows it without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from families import CASES
from family_models import adapt, tower_inputs, tower_of
from small_classifier import IMAGES, LABELS, make_classifier
from torch.utils.data import DataLoader

from sep_peft import TrunkCache
from sep_peft.method.recipe import Recipe
from sep_peft.training import make_optimizer, make_schedule


pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def nobody_waits(device: torch.device) -> Iterator[None]:
    """Who waits for a GPU in the block gets a RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


STEPS = {
    "all texts": (0, {}),
    "a sample": (2, {}),
    "late start": (0, {"start_layer": 1}),
    "a sample, late start": (2, {"start_layer": 1}),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step(name, autocast, device, put):
    """Forward, backward, optimizer and learning rate."""
    size, config = STEPS[name]
    classifier = put(make_classifier(recipe=Recipe(class_sample=size), config=config)).train()
    optimizer = make_optimizer(classifier, classifier.recipe)
    schedule = make_schedule(optimizer, classifier.recipe, 4)
    images, labels = put(IMAGES), put(LABELS)
    losses = []
    for number in range(4):
        # the first step encodes what is kept from then on
        with nobody_waits(device) if number else contextlib.nullcontext():
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                output = classifier(images, labels, num_items_in_batch=len(labels))
            output.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(output.loss.detach())
    assert torch.stack(losses).isfinite().all()


def test_a_step_from_the_cache(device, put):
    classifier = put(make_classifier(config={"start_layer": 1})).train()
    images = [{"pixel_values": p, "labels": y} for p, y in zip(IMAGES, LABELS, strict=True)]
    cache = TrunkCache(classifier.model, images)
    batch = next(iter(DataLoader(cache, len(cache), pin_memory=device.type == "cuda")))
    classifier(**put(batch)).loss.backward()
    with nobody_waits(device):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        classifier(**batch).loss.backward()


@pytest.mark.parametrize("name", ["siglip", "bert and vit", "bert and dinov3", "blip", "clip"])
def test_image_towers_of_other_families(name, device, put):
    case = CASES[name]
    model = put(adapt(case))
    inputs = put(tower_inputs(case, "vision"))
    tower_of(model, "vision").embed(**inputs)
    with nobody_waits(device):
        tower_of(model, "vision").embed(**inputs).prompted.sum().backward()
