"""What `forward` is handed is checked before anything runs, and without waiting for a device."""

from __future__ import annotations

import pytest
import torch
from small_classifier import IMAGES, LABELS, make_classifier, raises

from sep_peft.classifier.inputs import check_images, check_labels


SHAPE = "pixel_values must have the shape (B, channels, height, width), but got {}."


def wrong_pixel(value: float) -> torch.Tensor:
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    return images


WRONG = {
    "one image": ({"pixel_values": IMAGES[0]}, ValueError, SHAPE.format("(3, 24, 24)")),
    "a row": ({"pixel_values": IMAGES[0, 0, 0]}, ValueError, SHAPE.format("(24,)")),
    "frames": ({"pixel_values": IMAGES[None]}, ValueError, SHAPE.format("(1, 5, 3, 24, 24)")),
    "none": (
        {"pixel_values": IMAGES[:0]},
        ValueError,
        "pixel_values hold no image: their shape is (0, 3, 24, 24).",
    ),
    "a list": (
        {"pixel_values": [1, 2]},
        TypeError,
        "pixel_values must be a tensor, but got list. Pass what the image processor returns with return_tensors='pt'.",
    ),
    **{
        name: (
            {"pixel_values": wrong_pixel(float(name))},
            ValueError,
            "pixel_values hold NaN or infinity. Look at what the image processor was given.",
        )
        for name in ("nan", "inf")
    },
    "fewer labels": (
        {"pixel_values": IMAGES, "labels": LABELS[:2]},
        ValueError,
        "Labels must be one for each image, but there are 2 for 5 images.",
    ),
    "a label for all": (
        {"pixel_values": IMAGES, "labels": LABELS[:1]},
        ValueError,
        "Labels must be one for each image, but there is 1 for 5 images.",
    ),
    "label out of range": (
        {"pixel_values": IMAGES, "labels": LABELS + 1},
        ValueError,
        "Labels must be between 0 and 3 for 4 classes, but got [4].",
    ),
    "embeddings of others": (
        {"pixel_values": IMAGES, "frozen_embeds": torch.zeros(2, 24)},
        ValueError,
        "frozen_embeds must be of the same images as pixel_values, but are 2 for 5 images.",
    ),
    "trunk alone": (
        {"trunk": torch.zeros(2, 5, 16)},
        ValueError,
        "A trunk needs frozen_embeds beside it. Pass both, as TrunkCache gives them.",
    ),
    "another trunk": (
        {"trunk": torch.zeros(2, 5, 16), "frozen_embeds": torch.zeros(3, 24)},
        ValueError,
        "trunk, frozen_embeds and trunk_layer must be of the same images, one at least, but are of 2 and 3.",
    ),
}


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", WRONG)
def test_refused_before_anything_runs(classifier, monkeypatch, case, training):
    inputs, error, message = WRONG[case]
    monkeypatch.setattr(type(classifier.encoder), "weights", lambda *_, **__: pytest.fail("class texts were encoded"))
    with raises(message, error):
        classifier.train(training)(**inputs)


def test_values_elsewhere_are_not_read(classifier):
    """A meta tensor has none: whoever reads it fails."""
    check_images(IMAGES.to("meta"), classifier.vision_tower)
    check_labels(LABELS.to("meta"), 4, 5, waits=False)
    with pytest.raises(Exception, match="meta"):
        check_labels(LABELS.to("meta"), 4, 5)
    with raises(SHAPE.format("(3, 24, 24)")):
        check_images(IMAGES[0].to("meta"), classifier.vision_tower)
