"""Methods as files: what a JSON file in the folder `methods` may say, and the classifier that it stands for.

    {
      "description": "SEP with low-rank, shared fusion",
      "learner": "sep",
      "config": {"fusion_rank": 4, "share_fusion": true},
      "recipe": {"like": "published", "learning_rate": 0.0025, "epochs": 20}
    }

`learner` is one of "zero-shot", "sep", "lora", "linear-probe" and "tip-adapter"; `config` are the arguments of
`SEPConfig` or `LoraConfig`; `recipe` are those of the package's `Recipe` that differ from its defaults, or with "like"
from `Recipe.compact()` or `Recipe.published()`; its seed is the run's. Scores are not calibrated. LoRA's classifier has
no consistency losses, so their weights are 0 there. With `"cached": true` what is below SEP's `start_layer` is computed
once, for the recipe's `views` of each image. `"head": "gda"`, "probe" or "tip-adapter-f" fits that head on the training
images after training, in the place of prototypes, on "sep", "lora" and "zero-shot", the frozen model; with
`"first_stage": 0.6` the adapter is trained for that share of the recipe's epochs, and the head takes the rest (2SFS,
arXiv 2503.11609). `"coupled": true` projects the image prompts from the text prompts (MaPLe, arXiv 2210.03117). A
variant of
another method names its file, beside it or in `methods`: with `"like": "sep"` everything that is not said, also within
`config` and `recipe`, is as in `sep.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from baselines import AdaptedClassifier, LinearProbe, PlainClassifier, TipAdapter
from coupling import couple
from peft import LoraConfig, get_peft_model
from selection import select_at_random
from torch import nn
from transformers import AutoModel

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.method.heads import NAMES
from sep_peft.training import Recipe


#: Settings of a recipe that no method has: the runs' own, and what training here does not read.
NOT_OF_METHODS = {"seed", "calibration_folds", "whiten", "negative_focus"}
#: The methods that come with these scripts.
SHIPPED = Path(__file__).parent / "methods"
#: Entries that hold settings by name.
PARTS = ("config", "recipe")
#: What "like" in a recipe may say, and what it stands for.
RECIPES = {"default": Recipe, "compact": Recipe.compact, "published": Recipe.published}
CONFIGS = {"sep": SEPConfig, "lora": LoraConfig}
LEARNERS = ("zero-shot", "sep", "lora", "linear-probe", "tip-adapter")
#: Learners that see the training images once, as frozen features, and take no gradient steps through the towers.
FEATURE_LEARNERS = {"linear-probe": LinearProbe, "tip-adapter": TipAdapter}


@dataclass(frozen=True)
class Method:
    """One method with all its settings; see the head of this file."""

    name: str
    learner: str
    description: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    cached: bool = False
    selection: str = "representative"
    head: str | None = None
    first_stage: float | None = None
    coupled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything that a run's result depends on; options that are left out are none of it."""
        unset = {"first_stage": None, "coupled": False}
        return {name: value for name, value in asdict(self).items() if name not in unset or value != unset[name]}

    @property
    def trains(self) -> bool:
        """Whether it takes gradient steps."""
        return self.learner in ("sep", "lora")


def read_method(path: Path, changes: dict[str, dict[str, Any]] | None = None, **overrides: Any) -> Method:
    """Read a method's file.

    Args:
        changes: entries of "recipe" and "config" to replace, as if the file said them.
        overrides: entries of the recipe to replace, of methods that have one.

    Raises:
        FileNotFoundError: the method that this one is like is neither beside it nor among those of these scripts.
        ValueError: an entry is unknown, or has a value that is not allowed.
    """
    data = read_entries(path)
    data |= {part: {**data.get(part, {}), **own} for part, own in (changes or {}).items()}
    check_names(path, data, {f.name for f in fields(Method)} - {"name"})
    entries = data.pop("recipe", None)
    method = Method(name=path.stem, **data)
    check_method(path, method)
    if not method.trains:
        if entries is not None:
            raise ValueError(f'{path}: recipe is for learners "sep" and "lora", but this is {method.learner!r}.')
        return method
    return replace(method, recipe=read_recipe(path, method, {**(entries or {}), **overrides}))


def read_recipe(path: Path, method: Method, entries: dict[str, Any]) -> Recipe:
    """The recipe of a method that trains, from what its file says of it."""
    check_names(path, entries, {"like", *(f.name for f in fields(Recipe))} - NOT_OF_METHODS)
    like = entries.pop("like", "default")
    if like not in RECIPES:
        raise ValueError(f'{path}: a recipe may be "like" {", ".join(RECIPES)}, but this is like {like!r}.')
    try:
        recipe = RECIPES[like](**entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if entries.get("prototype_learning_rate") is not None and not recipe.prototype_weight:
        raise ValueError(f"{path}: prototype_learning_rate is for methods whose loss has prototypes.")
    if method.learner == "lora" and (recipe.text_weight or recipe.vision_weight):
        raise ValueError(f"{path}: LoRA has no consistency losses; set text_weight and vision_weight to 0.")
    return recipe


def check_method(path: Path, method: Method) -> None:
    """
    Raises:
        ValueError: an entry beside the recipe has a value that is not allowed.
    """
    if method.learner not in LEARNERS:
        raise ValueError(f"{path}: learner must be one of {', '.join(LEARNERS)}, but is {method.learner!r}.")
    if method.selection not in ("representative", "random"):
        raise ValueError(f'{path}: selection must be "representative" or "random", but is {method.selection!r}.')
    if method.selection == "random" and method.learner != "sep":
        raise ValueError(f'{path}: selection is for learner "sep", but this is {method.learner!r}.')
    if method.head is not None and method.head not in NAMES:
        raise ValueError(f"{path}: head must be one of {', '.join(NAMES)}, but is {method.head!r}.")
    if method.head is not None and method.learner in FEATURE_LEARNERS:
        raise ValueError(
            f"{path}: head is for learners that compare images with texts, but this is {method.learner!r}."
        )
    if method.first_stage is not None and not (0 < method.first_stage < 1 and method.head and method.trains):
        raise ValueError(
            f"{path}: first_stage must be above 0 and below 1, of a method that trains and has a head, but is "
            f"{method.first_stage!r}."
        )
    if method.coupled and (method.learner != "sep" or method.config.get("fusion") != "independent"):
        raise ValueError(f'{path}: coupled is for learner "sep" with "fusion": "independent".')
    if method.cached and method.learner != "sep":
        raise ValueError(f'{path}: cached is for learner "sep", but this is {method.learner!r}.')
    check_config(path, method)


def check_config(path: Path, method: Method) -> None:
    """
    Raises:
        ValueError: the learner has no config, or its class refuses it.
    """
    if not method.trains:
        if method.config:
            raise ValueError(f'{path}: config is for learners "sep" and "lora", but this is {method.learner!r}.')
        return
    try:
        CONFIGS[method.learner](**method.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_entries(path: Path) -> dict[str, Any]:
    """What a method's file says, with what it leaves to the file that it is like."""
    own = json.loads(path.read_text(encoding="utf-8"))
    if "like" not in own:
        return own
    name = f"{own.pop('like')}.json"
    file = next((file for file in (path.with_name(name), SHIPPED / name) if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f'{path}: it is "like" {name[:-5]!r}, but there is no {name} beside it or in {SHIPPED}.'
        )
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
        if method.selection == "random":
            select_at_random(model)
        if method.coupled:
            couple(model)
        return SEPClassifier.from_class_names(model, processor, classes, template, recipe=method.recipe)
    if method.learner == "lora":
        model = get_peft_model(model, LoraConfig(**method.config))
        return AdaptedClassifier(model, processor, classes, template, method.recipe.prototype_weight)
    kind = FEATURE_LEARNERS.get(method.learner, PlainClassifier)
    return kind(model, processor, classes, template)
