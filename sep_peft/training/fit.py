"""`fit`: train a classifier on images by a recipe."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator

from ..classifier.classifier import SEPClassifier
from ..method.recipe import Recipe
from .calibrate import calibrate, cross_fit, values_of
from .data import CachedImages, LabelledImages
from .evaluation import check_samples
from .folders import Samples
from .loop import train, trainable


def fit(
    classifier: SEPClassifier,
    samples: Samples,
    recipe: Recipe | None = None,
    *,
    quiet: bool = False,
    cache: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    eval_samples: Samples | None = None,
) -> list[dict[str, Any]]:
    """Train the adapter; afterwards the classifier is in evaluation, with the prototypes that predict, and calibrated.

    The prototypes start at the class means of the frozen image embeddings, as published. Scores are calibrated on
    `eval_samples`, or without them by cross-fitting on `samples`, which trains again for a while; see `cross_fit`.
    A warning tells if that fails.

    Args:
        classifier: with a processor, on the device to train on.
        samples: images (paths, URLs or `PIL.Image`) and names of their classes, all of them the classifier's.
        recipe: how to train; it becomes the classifier's. None: the one that the classifier has.
        quiet: without progress.
        cache: for adapters with `start_layer` above 0: what is below it is computed once, for `recipe.views`
            augmentations of each image. A folder to keep it in, or "memory"; None: no cache.
        checkpoint, workers, accelerator: as for `train`.
        eval_samples: images that are not trained on and names of their classes, to calibrate scores; None: none.

    Returns:
        for each epoch its "epoch" from 1, "loss", "accuracy" in percent and "lr"; see `train`.

    Raises:
        TypeError: `recipe` is no `Recipe`, or the samples are no list.
        ValueError: nothing of the classifier is to be trained, it has no processor, there are no samples, one has no
            name or one that is not among the classes, or the adapter has no trunk to cache; nothing is changed then.
            Or the checkpoint is of another training; no parameter but the prototypes is changed then.

    Example:
        >>> classifier = SEPClassifier.from_class_names(model, processor, ["butterfly", "lobster"])
        >>> fit(classifier, [("a.jpg", "lobster"), ("b.jpg", "butterfly")])
    """
    recipe = classifier.recipe if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a sep_peft.training.Recipe, but got {recipe!r}.")
    if not trainable(classifier.model):
        raise ValueError(
            "There is nothing to train: every parameter of the model is frozen. A loaded adapter is trained on with "
            "SEPClassifier.from_pretrained(..., is_trainable=True)."
        )
    check_samples(classifier, samples, "train on")
    if eval_samples is not None:
        check_samples(classifier, eval_samples, "calibrate on")
    if cache is not None:
        classifier.vision_tower.check_trunk()
    names, processor = classifier.class_names, classifier.processor
    plain = LabelledImages(samples, names, processor)
    classifier.recipe = recipe
    if recipe.prototype_weight:
        classifier.reset_prototypes(torch.utils.data.DataLoader(plain, recipe.batch_size, num_workers=workers))
    else:
        classifier.prototypes = None
    images = LabelledImages(samples, names, processor, recipe)
    if cache is not None:
        images = CachedImages(images, classifier.model, recipe.views, None if cache == "memory" else cache)
    start = values_of(classifier)
    options = {"accelerator": accelerator, "workers": workers, "quiet": quiet}
    entries = train(classifier, images, recipe, checkpoint=checkpoint, **options)
    classifier.finish_training()
    if eval_samples is not None:
        calibrate(classifier, LabelledImages(eval_samples, names, processor), workers=workers)
    elif recipe.calibration_folds and len(samples) > 1:
        try:
            calibrate(classifier, cross_fit(classifier, plain, images, recipe, start, **options))
        except ValueError as error:  # what was trained is right all the same
            warnings.warn(
                f"Scores are not calibrated, because a training without some images failed: {error}", stacklevel=2
            )
    return entries
