"""Methods as files: what a JSON file in the folder `methods` may say, and the classifier that it stands for.

    {
      "description": "SEP with low-rank, shared fusion",
      "learner": "sep",
      "config": {"fusion_rank": 4, "share_fusion": true},
      "loss": {"text_weight": 8.0},
      "recipe": {"learning_rate": 0.0025, "epochs": 20}
    }

`learner` is one of "zero-shot", "sep", "lora", "linear-probe" and "tip-adapter"; `config` are the arguments of
`SEPConfig` or `LoraConfig`, `loss` the loss weights of `SEPClassifier`, or the `prototype_weight` of LoRA's classifier,
`prototype_logit_weight` what `keep_prototypes` takes after training (0: the texts alone predict, as published),
`zero_shot_margin` what `set_classes` takes for classes that were not trained. A variant of another method names its
file: with `"like": "sep"` everything that is not said, also within `config`, `loss` and `recipe`, is as in `sep.json`.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from baselines import AdaptedClassifier, LinearProbe, PlainClassifier, TipAdapter
from peft import LoraConfig, get_peft_model
from selection import random_selection
from torch import nn
from transformers import AutoModel

from sep_peft import SEPClassifier, SEPConfig


#: Entries that hold settings by name.
PARTS = ("config", "loss", "recipe")
LEARNERS = ("zero-shot", "sep", "lora", "linear-probe", "tip-adapter")
#: Learners that see the training images once, as frozen features, and take no gradient steps through the towers.
FEATURE_LEARNERS = {"linear-probe": LinearProbe, "tip-adapter": TipAdapter}


@dataclass(frozen=True)
class Recipe:
    """How gradients are used; the defaults are the published ones.

    Args:
        learning_rate: highest of the cosine schedule.
        prototype_learning_rate: the same for class prototypes, where the loss has them; None: `learning_rate`.
        epochs: passes over the training images.
        batch_size: images a step, over all processes.
        warmup_epochs: epochs in which the learning rate rises to its highest.
        adam_epsilon, weight_decay: of AdamW.
        smallest_crop: least share of an image's area that augmentation keeps.
        cached_views: augmentations of each image for which what is below SEP's `start_layer` is computed once; 0:
            every epoch draws and computes anew.
    """

    learning_rate: float = 2.5e-3
    prototype_learning_rate: float | None = None
    epochs: int = 50
    batch_size: int = 32
    warmup_epochs: int = 1
    adam_epsilon: float = 1e-3
    weight_decay: float = 0.0
    smallest_crop: float = 0.08
    cached_views: int = 0


@dataclass(frozen=True)
class Method:
    """One method with all its settings; see the head of this file."""

    name: str
    learner: str
    description: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    selection: str = "representative"
    prototype_logit_weight: float = 0.0
    zero_shot_margin: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def trains(self) -> bool:
        """Whether it takes gradient steps."""
        return self.learner in ("sep", "lora")

    def evaluating(self) -> AbstractContextManager:
        """Surrounds everything that runs the model: the ablation of the token selection lives there."""
        return random_selection() if self.selection == "random" else nullcontext()


def read_method(path: Path, **overrides: Any) -> Method:
    """Read a method's file.

    Args:
        overrides: entries of the recipe to replace.

    Raises:
        FileNotFoundError: the method that this one is like is not beside it.
        ValueError: an entry is unknown, or `learner` or `selection` has a value that is not allowed.
    """
    data = read_entries(path)
    check_names(path, data, {f.name for f in fields(Method)} - {"name"})
    recipe = {**data.pop("recipe", {}), **overrides}
    check_names(path, recipe, {f.name for f in fields(Recipe)})
    method = Method(name=path.stem, recipe=Recipe(**recipe), **data)
    if method.learner not in LEARNERS:
        raise ValueError(f"{path}: learner must be one of {', '.join(LEARNERS)}, but is {method.learner!r}.")
    if method.selection not in ("representative", "random"):
        raise ValueError(f'{path}: selection must be "representative" or "random", but is {method.selection!r}.')
    if method.selection == "random" and method.learner != "sep":
        raise ValueError(f'{path}: selection is for learner "sep", but this is {method.learner!r}.')
    for entry in ("loss", "prototype_logit_weight", "zero_shot_margin"):
        if getattr(method, entry) and not method.trains:
            raise ValueError(f'{path}: {entry} is for learners "sep" and "lora", but this is {method.learner!r}.')
    has_prototypes = method.loss.get("prototype_weight", 0.5 if method.learner == "sep" else 0.0)
    if method.recipe.prototype_learning_rate is not None and not has_prototypes:
        raise ValueError(f"{path}: prototype_learning_rate is for methods whose loss has prototypes.")
    if method.recipe.cached_views and not (method.learner == "sep" and method.config.get("start_layer")):
        raise ValueError(f'{path}: cached_views is for learner "sep" with a start_layer above 0.')
    return method


def read_entries(path: Path) -> dict[str, Any]:
    """What a method's file says, with what it leaves to the file that it is like."""
    own = json.loads(path.read_text(encoding="utf-8"))
    if "like" not in own:
        return own
    file = path.with_name(f"{own.pop('like')}.json")
    if not file.is_file():
        raise FileNotFoundError(f'{path}: it is "like" {file.stem!r}, but there is no {file.name} beside it.')
    other = json.loads(file.read_text(encoding="utf-8"))
    if "like" in other:
        raise ValueError(f"{path}: {file.name} is itself like another method; name that one, {other['like']!r}.")
    merged = {key: {**other[key], **own[key]} for key in PARTS if key in own and key in other}
    return {**other, **own, **merged}


def check_names(path: Path, data: dict, allowed: set[str]) -> None:
    if unknown := sorted(set(data) - allowed):
        raise ValueError(f"{path}: unknown entries {unknown}; these are allowed: {', '.join(sorted(allowed))}.")


def build_classifier(
    method: Method, model_name: str, processor, classes: tuple[str, ...], template: str, **model_options
) -> nn.Module:
    """The classifier of a method: `set_classes(names)`, and `(pixel_values, labels)` -> `loss` and `logits`."""
    model = AutoModel.from_pretrained(model_name, **model_options)
    model.requires_grad_(False)
    if method.learner == "sep":
        model = get_peft_model(model, SEPConfig(**method.config))
        return SEPClassifier.from_class_names(model, processor, classes, template, **method.loss)
    if method.learner == "lora":
        model = get_peft_model(model, LoraConfig(**method.config))
        return AdaptedClassifier(model, processor, classes, template, **method.loss)
    kind = FEATURE_LEARNERS.get(method.learner, PlainClassifier)
    return kind(model, processor, classes, template)


def trainable(classifier: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter of everything that is trained."""
    return {name: p for name, p in classifier.named_parameters() if p.requires_grad}
