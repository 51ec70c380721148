"""Recipes: train a classifier on pictures with transformers' Trainer."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments

from .classes import PROTOTYPE_LOGIT_WEIGHT
from .classifier import SEPClassifier
from .folders import Samples
from .pictures import read_picture
from .trunk_cache import TrunkCache


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those that `examples/few_shot` tuned for the default adapter.

    Args:
        epochs: passes over the pictures; the learning rate rises during the first and falls along a cosine.
        batch_size: pictures a step.
        learning_rate: of AdamW, without weight decay.
        prototype_learning_rate: the same for the class prototypes, which start where they nearly belong; None:
            `learning_rate`, as published.
        adam_epsilon: of AdamW.
        smallest_crop: least share of a picture's area that augmentation keeps.
        text_weight, vision_weight: of the consistency losses.
        prototype_logit_weight: of the trained prototypes in predictions; 0, as published: they serve the loss alone.
        views: augmentations of each picture, where what is below `start_layer` is cached.
        seed: of batches and augmentation.
        max_steps: stop after so many steps; None: after `epochs`.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 5e-3
    prototype_learning_rate: float | None = 1e-3
    adam_epsilon: float = 1e-8
    smallest_crop: float = 0.5
    text_weight: float = 4.0
    vision_weight: float = 3.0
    prototype_logit_weight: float = PROTOTYPE_LOGIT_WEIGHT
    views: int = 8
    seed: int = 1
    max_steps: int | None = None

    @classmethod
    def published(cls, **overrides) -> Recipe:
        """The recipe of the paper's released code, for `SEPConfig.published()`."""
        paper = {"epochs": 50, "learning_rate": 2.5e-3, "adam_epsilon": 1e-3, "smallest_crop": 0.08}
        paper |= {"text_weight": 8.0, "vision_weight": 6.0}
        paper |= {"prototype_learning_rate": None, "prototype_logit_weight": 0.0}
        return cls(**(paper | overrides))

    @classmethod
    def compact(cls, **overrides) -> Recipe:
        """The recipe that was tuned for `SEPConfig.compact()`."""
        return cls(**({"learning_rate": 1e-2, "text_weight": 2.0, "vision_weight": 1.5} | overrides))

    def __str__(self) -> str:
        length = f"{self.epochs} epochs" if self.max_steps is None else f"{self.max_steps} steps"
        own = self.prototype_learning_rate
        prototypes = "" if own is None else f" ({own:g} for the prototypes)"
        return (
            f"{length} of batches of {self.batch_size}, AdamW with learning rate {self.learning_rate:g}{prototypes}, "
            f"eps {self.adam_epsilon:g}, warm-up for one epoch, cosine; consistency weights {self.text_weight:g} and "
            f"{self.vision_weight:g}; prototypes predict with weight {self.prototype_logit_weight:g}; random crops "
            f"from {self.smallest_crop:.0%} of the area and flips"
        )


class Pictures(torch.utils.data.Dataset):
    """Pictures with labels as a Trainer wants them.

    Args:
        samples: pictures and names of their classes.
        names: all class names, in the order of the labels.
        processor: with an image processor of transformers.
        smallest_crop: crop at random to so much of the area or more, and flip; None: pictures as they are.
    """

    def __init__(self, samples: Samples, names: list[str], processor, smallest_crop: float | None = None):
        self.samples = [(path, names.index(name)) for path, name in samples]
        self.processor = getattr(processor, "image_processor", processor)
        self.smallest_crop = smallest_crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.read(index, random)

    def read(self, index: int, source) -> dict:
        """A picture, augmented by draws from `source`, the module `random` or a `random.Random`."""
        path, label = self.samples[index]
        picture = read_picture(path)
        if self.smallest_crop is not None:
            picture = random_crop_and_flip(picture, self.smallest_crop, source)
        return {"pixel_values": self.processor(picture, return_tensors="pt")["pixel_values"][0], "labels": label}


class FixedViews(torch.utils.data.Dataset):
    """`views` augmentations of each picture, the same ones every time: entry i + N v is view v of picture i.

    Args:
        pictures: N of them, augmented.
        views: augmentations of each.
        seed: of them.
    """

    def __init__(self, pictures: Pictures, views: int, seed: int):
        self.pictures, self.views, self.seed = pictures, views, seed

    def __len__(self) -> int:
        return len(self.pictures) * self.views

    def __getitem__(self, index: int) -> dict:
        return self.pictures.read(index % len(self.pictures), random.Random(f"{self.seed}/{index}"))


def random_crop_and_flip(picture: Image.Image, smallest: float, source=random) -> Image.Image:
    """A square-ish part of `smallest` to all of the area, mirrored half of the time: the field's augmentation."""
    width, height = picture.size
    area, ratio = width * height * source.uniform(smallest, 1), source.uniform(3 / 4, 4 / 3)
    part = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = source.randint(0, width - part[0]), source.randint(0, height - part[1])
    side = min(width, height)
    picture = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + part[0], top + part[1]))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if source.random() < 0.5 else picture


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
        samples: pictures and names of their classes.
        recipe: how to train.
        quiet: without progress.
        cache: for adapters with `start_layer` above 0: what is below it is computed once, for `recipe.views`
            augmentations of each picture. A folder to keep it in, or "memory"; None: no cache.

    Raises:
        ValueError: the adapter has no trunk to cache.
    """
    if cache is not None:
        classifier.vision_tower.check_trunk()
    names, processor = classifier.class_names, classifier.processor
    classifier.loss_weights |= {"text_weight": recipe.text_weight, "vision_weight": recipe.vision_weight}
    plain = Pictures(samples, names, processor)
    classifier.reset_prototypes(torch.utils.data.DataLoader(plain, recipe.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(recipe, len(samples), classifier.device.type == "cpu", quiet, folder)
        data = Pictures(samples, names, processor, recipe.smallest_crop)
        if cache is not None:
            views = FixedViews(data, recipe.views, recipe.seed)
            data = TrunkCache(classifier.model, views, None if cache == "memory" else cache, views=recipe.views)
        parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        optimizers = make_optimizer(parameters, recipe), None  # the schedule is Trainer's
        Trainer(classifier, arguments, train_dataset=data, optimizers=optimizers).train()
    if recipe.prototype_logit_weight:
        classifier.keep_prototypes(recipe.prototype_logit_weight)


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
