"""Training a method on a plan's images, by the package's own augmentation, views and loop.

The package's `fit` is not called as a whole, because LoRA's classifier is trained as well and runs are measured before
anything is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from coupling import uncouple
from methods import Method
from protocols import Plan
from run_folder import CHECKPOINT
from torch import nn
from torch.utils.data import DataLoader

from sep_peft import SEPClassifier
from sep_peft.training import CachedImages, LabelledImages, Recipe, train
from sep_peft.training.history import History
from sep_peft.training.loop import Callback
from sep_peft.training.optimizer import count_steps


def fit(
    classifier: nn.Module,
    method: Method,
    plan: Plan,
    processor,
    accelerator: Accelerator,
    folder: Path,
    seed: int,
    workers: int,
    cache: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train the classifier in place, or go on where a checkpoint in `folder` stands.

    Args:
        cache: folder for the trunk of images, where the method is cached; None: in memory.
        callbacks: called with the history after every epoch.

    Returns:
        the history, with the epochs before a checkpoint.
    """
    recipe, names = replace(recipe_of(method), seed=seed), plan.data.classes
    if isinstance(classifier, SEPClassifier):
        classifier.recipe = recipe
    samples = training_samples(plan)
    if recipe.prototype_weight:
        classifier.reset_prototypes(plain_batches(plan, processor, workers))
    images = LabelledImages(samples, names, processor, recipe, read=plan.data.open)
    if method.cached:
        images = CachedImages(images, classifier.model, recipe.views, cache)
    checkpoint = folder / CHECKPOINT
    options = {"accelerator": accelerator, "workers": workers, "callbacks": callbacks}
    history = train(classifier, images, recipe, checkpoint=checkpoint, **options)
    if method.coupled:
        uncouple(classifier.model)
    return history


def recipe_of(method: Method) -> Recipe:
    """By which the adapter is trained: with two stages for its share of the epochs."""
    recipe = method.recipe
    if method.first_stage is not None:
        recipe = replace(recipe, epochs=max(1, round(method.first_stage * recipe.epochs)))
    return recipe


def work_of(method: Method, images: int, epochs: int) -> dict[str, int]:
    """Training steps, and the images in their batches, of a method that went so many times through its images."""
    if not method.trains:
        return {"training_steps": 0, "training_images": 0}
    recipe = recipe_of(method)
    per_epoch = -(-images // recipe.batch_size)
    steps = min(epochs * per_epoch, count_steps(recipe, per_epoch))
    whole, rest = divmod(steps, per_epoch)
    return {"training_steps": steps, "training_images": whole * images + rest * recipe.batch_size}


def keep_head(classifier: nn.Module, kind: str, plan: Plan, processor, workers: int) -> dict[str, float]:
    """Fit a head on the training images as they are; see `SEPClassifier.keep_prototypes`. Returns what was chosen."""
    batches = plain_batches(plan, processor, workers)
    if isinstance(classifier, SEPClassifier):
        head = classifier.keep_prototypes(kind=kind, batches=batches).classes.head
        return {"logit_weight": head.logit_weight}
    return {"logit_weight": classifier.keep_head(kind, batches)}


def training_samples(plan: Plan) -> list[tuple[str, str]]:
    """The training images by key, with the names of their classes."""
    return [(sample.key, plan.data.classes[sample.label]) for sample in plan.images.train]


def plain_batches(plan: Plan, processor, workers: int) -> DataLoader:
    """The training images as they are, not augmented."""
    images = LabelledImages(training_samples(plan), plan.data.classes, processor, read=plan.data.open)
    return DataLoader(images, batch_size=100, num_workers=workers)
