"""Classifiers over the small CLIP's first two layers, each as if it were the first that is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from bundled import ASSETS, shallow_clip
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.training import Recipe
from sep_peft.training.optimizer import trainable


BASE = shallow_clip(2)
NAMES = ["lamp", "pizza"]


def images(part: str, count: int) -> list[tuple[Path, str]]:
    """So many images of each class and their names, of "train" or "test"."""
    folder = ASSETS / "caltech101" / part
    return [(path, name) for name in NAMES for path in sorted((folder / name).iterdir())[:count]]


TRAIN, VAL = images("train", 3), images("test", 5)


def weights(classifier: SEPClassifier) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in trainable(classifier).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two copies have the same names and values."""
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def classifier_maker(recipe: Recipe, config: SEPConfig | None = None) -> Callable[[], SEPClassifier]:
    """What makes a new classifier with the same weights whenever it is called."""
    model, processor = AutoModel.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def make() -> SEPClassifier:
        set_seed(1)
        fresh = type(model)(model.config)
        fresh.load_state_dict(state)
        fresh.name_or_path = str(BASE)
        adapted = get_peft_model(fresh, config or SEPConfig())
        return SEPClassifier.from_class_names(adapted, processor, NAMES, recipe=recipe)

    return make
