"""Mosaics of two images, which have the classes of both, and classifiers of which an image may have several classes."""

from __future__ import annotations

import random
from functools import cache

from bundled import ASSETS
from peft import get_peft_model
from PIL import Image
from shallow_classifier import BASE
from transformers import AutoModel, AutoProcessor, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.training import Recipe


NAMES = ["lamp", "pizza", "sunflower"]
RECIPE = Recipe(epochs=1, batch_size=4, calibration_folds=2)


@cache
def tiles(part: str) -> dict[str, list[Image.Image]]:
    """The images of each class, 32 pixels wide, of "train" or "test"."""
    folder = ASSETS / "caltech101" / part
    return {
        name: [Image.open(path).convert("RGB").resize((32, 64)) for path in sorted((folder / name).iterdir())]
        for name in NAMES
    }


def mosaics(part: str, count: int, seed: int = 0) -> list[tuple[Image.Image, tuple[str, ...]]]:
    """Images of 64 pixels with one class or two, and their names."""
    source, found = random.Random(seed), []
    for _ in range(count):
        own = source.choices(NAMES, k=2)
        image = Image.new("RGB", (64, 64))
        for place, name in enumerate(own):
            image.paste(source.choice(tiles(part)[name]), (32 * place, 0))
        found.append((image, tuple(sorted(set(own)))))
    return found


def make_classifier(recipe: Recipe = RECIPE, **options) -> SEPClassifier:
    """Of the three classes, on the first layers of the small CLIP; as new."""
    set_seed(1)
    model, processor = AutoModel.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE)
    options = {"multi_label": True, "recipe": recipe, **options}
    return SEPClassifier.from_class_names(get_peft_model(model, SEPConfig()), processor, NAMES, **options)
