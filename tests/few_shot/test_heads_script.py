"""Heads and margins on kept embeddings, and paired intervals."""

from __future__ import annotations

import heads
import torch
import torch.nn.functional as F


def part(count: int, seed: int, classes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = F.normalize(torch.randn(classes, 8, generator=torch.Generator().manual_seed(classes)), dim=1)
    images = F.normalize(centres[labels] + 0.3 * torch.randn(count, 8, generator=generator), dim=1)
    # the frozen texts are those of other classes, so that zero-shot is wrong
    return {
        "images": images,
        "frozen_images": images,
        "labels": labels,
        "texts": centres,
        "frozen_texts": centres.roll(1, dims=0),
    }


def test_every_way_to_predict():
    found = {"scale": 20.0, "train": part(12, 1, 3), "base": part(30, 2, 3), "new": part(20, 3, 2)}
    found["prototypes"] = found["base"]["texts"]
    right = heads.predictions(found)
    base = ("zero-shot", "texts", "prototypes", "gda", "probe", "prototypes-gda", "residual", "tip-adapter-f")
    new = ("zero-shot", "texts", "margin 1", "margin 1.5")
    assert list(right) == [*(f"base {name}" for name in base), *(f"new {name}" for name in new)]
    shares = {name: value.float().mean().item() for name, value in right.items()}
    assert shares["base zero-shot"] < 0.1 and min(shares["base texts"], shares["base prototypes"]) > 0.9
    assert min(shares["base gda"], shares["base probe"], shares["base residual"]) > 0.7
    assert len(right["base gda"]) == 30 and len(right["new texts"]) == 20


def test_paired_interval():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.rand(2, 200, generator=generator) < 0.5
    assert heads.paired_interval(theirs, theirs) == (0.0, 0.0, 0.0)
    ours = theirs | (torch.rand(2, 200, generator=generator) < 0.2)
    mean, low, high = heads.paired_interval(ours, theirs)
    assert 5 < mean < 15 and 0 < low < mean < high < 25
    unpaired = (ours.float().var(unbiased=True) + theirs.float().var(unbiased=True)) / 200
    assert high - low < 2 * 1.96 * 100 * unpaired**0.5  # the same images make it narrower than images of their own
