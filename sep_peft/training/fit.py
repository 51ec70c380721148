"""Recipes: train a classifier on images with transformers' Trainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..classifier.classifier import SEPClassifier
from ..classifier.trunk_cache import TrunkCache
from ..method.recipe import Recipe
from .data import FixedViews, Images
from .folders import Samples


def fit(
    classifier: SEPClassifier,
    samples: Samples,
    recipe: Recipe,
    quiet: bool = False,
    cache: str | os.PathLike | None = None,
) -> None:
    """Train the adapter; the prototypes start at the class means, as published.

    Args:
        classifier: with a processor, on the device to train on.
        samples: images and names of their classes.
        recipe: how to train.
        quiet: without progress.
        cache: for adapters with `start_layer` above 0: what is below it is computed once, for `recipe.views`
            augmentations of each image. A folder to keep it in, or "memory"; None: no cache.

    Raises:
        ValueError: the adapter has no trunk to cache.
    """
    if cache is not None:
        classifier.vision_tower.check_trunk()
    names, processor = classifier.class_names, classifier.processor
    classifier.recipe = recipe
    plain = Images(samples, names, processor)
    classifier.reset_prototypes(torch.utils.data.DataLoader(plain, recipe.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(recipe, len(samples), classifier.device.type == "cpu", quiet, folder)
        data = Images(samples, names, processor, recipe.smallest_crop)
        if cache is not None:
            views = FixedViews(data, recipe.views, recipe.seed)
            data = TrunkCache(classifier.model, views, None if cache == "memory" else cache, views=recipe.views)
        parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        optimizers = make_optimizer(parameters, recipe), None  # the schedule is Trainer's
        Trainer(classifier, arguments, train_dataset=data, optimizers=optimizers).train()
    classifier.finish_training()


def make_optimizer(parameters: Mapping[str, nn.Parameter], recipe, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW of a recipe; the prototypes are a group of their own, since they may have a learning rate of their own.

    Args:
        parameters: name -> parameter of all that a classifier trains; its prototypes are called "prototypes".
        recipe: has `learning_rate`, `prototype_learning_rate` and `adam_epsilon`.
        weight_decay: of all parameters.
    """
    groups = [{"params": [p for name, p in parameters.items() if name != "prototypes"]}]
    if "prototypes" in parameters:
        groups.append({"params": [parameters["prototypes"]]})
        if recipe.prototype_learning_rate is not None:
            groups[1]["lr"] = recipe.prototype_learning_rate
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, eps=recipe.adam_epsilon, weight_decay=weight_decay)


def _arguments(recipe: Recipe, count: int, use_cpu: bool, quiet: bool, folder: str) -> TrainingArguments:
    steps_per_epoch = -(-count // recipe.batch_size)
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=recipe.epochs,
        max_steps=-1 if recipe.max_steps is None else recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        adam_epsilon=recipe.adam_epsilon,
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=steps_per_epoch,
        logging_steps=10 * steps_per_epoch,
        save_strategy="no",
        report_to="none",
        seed=recipe.seed,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        disable_tqdm=quiet,
    )
