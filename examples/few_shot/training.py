"""Training a method on a plan's images, by the package's own augmentation, views and loop.

The package's `fit` is not called as a whole, because LoRA's classifier is trained as well and runs are measured before
anything is kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from methods import Method
from protocols import Plan
from run_folder import CHECKPOINT
from torch import nn
from torch.utils.data import DataLoader

from sep_peft.training import CachedImages, LabelledImages, train


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
) -> list[dict[str, Any]]:
    """Train the classifier in place, or go on where a checkpoint in `folder` stands.

    Args:
        cache: folder for the trunk of images, where the method is cached; None: in memory.

    Returns:
        a dict per epoch: loss, accuracy on the training images, learning rate.
    """
    recipe, names = replace(method.recipe, seed=seed), plan.data.classes
    samples = [(sample.key, names[sample.label]) for sample in plan.images.train]
    if recipe.prototype_weight:
        plain = LabelledImages(samples, names, processor, read=plan.data.open)
        classifier.reset_prototypes(DataLoader(plain, batch_size=100, num_workers=workers))
    images = LabelledImages(samples, names, processor, recipe, read=plan.data.open)
    if method.cached:
        images = CachedImages(images, classifier.model, recipe.views, cache)
    checkpoint = folder / CHECKPOINT
    return train(classifier, images, recipe, accelerator=accelerator, checkpoint=checkpoint, workers=workers).rows
