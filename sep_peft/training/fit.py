"""`fit`: train a classifier on images by a recipe."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator

from ..classifier.classifier import SEPClassifier
from ..classifier.trunk_cache import check_cacheable
from ..method.recipe import Recipe
from .calibrate import calibrate, cross_fit, values_of
from .checkpoint import CHECKPOINT_FILE
from .data import CachedImages, EpochDataset, LabelledImages
from .evaluation import check_samples
from .folders import Samples
from .frozen_images import FrozenImages
from .history import History, TrainingInterrupted
from .label_evaluation import check_label_samples
from .label_files import LabelSamples
from .limits import Limits
from .loop import Callback, train
from .optimizer import trainable
from .run_folder import check_run_folder
from .run_log import RunLog
from .shipping import LabelValidation, Validation, ship
from .signals import Signals


#: Attributes of a classifier that a training sets before its first step.
CHANGED_AT_START = ("recipe", "whitening", "prototypes", "sigmoids")


def fit(
    classifier: SEPClassifier,
    samples: Samples | LabelSamples,
    recipe: Recipe | None = None,
    *,
    eval_samples: Samples | LabelSamples | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    notes: Mapping[str, Any] | None = None,
    max_seconds: float | None = None,
    patience: int | None = None,
    keep: Literal["best", "last"] = "best",
    quiet: bool = False,
    cache: str | os.PathLike | None = None,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> History:
    """Train the adapter; afterwards the classifier is in evaluation, with the prototypes that predict, and calibrated.

    The prototypes start at the class means of the frozen image embeddings, as published. Scores are calibrated on
    `eval_samples`, or without them by cross-fitting on `samples`, which trains again for a while; see `cross_fit`.
    A warning tells if that fails.

    Args:
        classifier: with a processor, on the device to train on.
        samples: images (paths, URLs or `PIL.Image`) and names of their classes, all of them the classifier's; for a
            classifier with ``multi_label=True`` a list of names each, which may be empty.
        recipe: how to train; it becomes the classifier's. None: the one that the classifier has.
        eval_samples: images that are not trained on and names of their classes: to measure the classifier on after
            every epoch as it would be saved, beside zero-shot before the first, and to calibrate scores; None: none.
        callbacks: each is called with the `History` after every epoch; `history.stop(reason)` ends the training.
        folder: for a file that the training can go on from, `CHECKPOINT_FILE`, and in ``run/`` below it the settings
            and a log of the epochs, see `RunLog`; all written whole after every epoch. Made where it is missing. The
            adapter and its card are written by `SEPClassifier.save_pretrained`, and the report, which needs images to
            test on, by `write_report`. None: no files.
        resume: go on with the training in `folder`, bit for bit as if it had not been interrupted, given a classifier
            that was made as the first one was; where there is none, begin.
        notes: what else `folder` is to say of the training in its settings, as JSON knows it; None: nothing.
        max_seconds: end before an epoch that would not end within so many seconds; the first one always ends. None:
            no limit.
        patience: end after so many epochs whose accuracy on `eval_samples` was not higher than all before; None: never.
        keep: "best" leaves the classifier with the weights of the epoch with the highest accuracy on `eval_samples`,
            the last of equals; "last" with those of the last epoch, as does "best" without `eval_samples`.
        quiet: without progress.
        cache: what training does not change, the frozen pass and all below `start_layer`, is computed once, for
            `recipe.views` augmentations of each image. A folder to keep it in, or "memory"; None: no cache.
        workers, accelerator: as for `train`.

    Returns:
        the history of all epochs, those before a resumption included; its rows have "epoch" from 1, "loss", "accuracy"
        in percent, "lr" and, with `eval_samples`, "val_accuracy" in percent, or "val_map" where an image may have
        several classes.

    Raises:
        TypeError: `recipe` is no `Recipe`, or the samples are no list.
        FileExistsError: `folder` has a training that is not finished, and `resume` was not asked for.
        OSError: nothing can be written in `folder`, or its disk has no room.
        ValueError: nothing of the classifier is to be trained, it has no processor, there are no samples, one has no
            name or one that is not among the classes, thresholds for several labels an image have neither
            `eval_samples` nor `calibration_folds`, the adapter has no image prompts to cache for or needs all class
            texts where `class_sample` draws some, or an option has a value that is not allowed; nothing is changed
            then. Or the checkpoint is of another training; nothing is changed then either. Or an image cannot be read,
            or the loss is not finite; before the end of the first epoch the classifier is as it was.
        TrainingInterrupted: Ctrl-C or SIGTERM came. The classifier is finished as if the training had ended with the
            last epoch that was done, but for whitening and calibration, which would take a while: `missing` and the
            message name what a whole training would have. Before the end of the first epoch it is as it was.

    Example:
        >>> classifier = SEPClassifier.from_class_names(model, processor, ["butterfly", "lobster"])
        >>> history = fit(classifier, [("a.jpg", "lobster"), ("b.jpg", "butterfly")], folder="run", resume=True)
        >>> history[-1]["loss"]
    """
    recipe = classifier.recipe if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a sep_peft.training.Recipe, but got {recipe!r}.")
    if not trainable(classifier.model):
        raise ValueError(
            "There is nothing to train: every parameter of the model is frozen. A loaded adapter is trained on with "
            "SEPClassifier.from_pretrained(..., is_trainable=True)."
        )
    _check_samples(classifier, samples, eval_samples, recipe)
    classifier.drawn_classes(recipe)
    limits = Limits(max_seconds, patience, keep)
    if patience is not None and eval_samples is None:
        raise ValueError(f"patience={patience} needs eval_samples, on which the classifier gets better or does not.")
    if cache is not None:
        check_cacheable(classifier.vision_tower)
    names, processor = classifier.class_names, classifier.processor
    plain = LabelledImages(samples, names, processor)
    held_out = None if eval_samples is None else LabelledImages(eval_samples, names, processor)
    check_run_folder(folder, resume, classifier)
    checkpoint = None if folder is None else Path(folder, CHECKPOINT_FILE)
    with _as_before_unless_trained(classifier) as start:
        classifier.recipe, classifier.whitening = recipe, None
        _start(classifier, plain, workers, resume and checkpoint is not None and checkpoint.exists())
        images: EpochDataset = LabelledImages(samples, names, processor, recipe)
        if cache is not None:
            images = CachedImages(images, classifier.model, recipe.views, None if cache == "memory" else cache)
        validation = None
        if held_out is not None:
            several = classifier.classes.multi_label
            validation = (
                LabelValidation(classifier, held_out, recipe.batch_size, workers)
                if several
                else Validation(classifier, cast(Samples, eval_samples), recipe.batch_size)
            )
        if checkpoint is not None and not resume:
            checkpoint.unlink(missing_ok=True)  # of a training that was finished
        if folder is not None:
            limited = {"max_seconds": max_seconds, "patience": patience, "keep": keep}
            parts = {"training": samples, "validation": eval_samples or []}
            callbacks = [RunLog(folder, {**(notes or {}), **_noted(classifier, recipe, parts), **limited}), *callbacks]
        options = {"accelerator": accelerator, "workers": workers, "quiet": quiet}
        try:
            history = train(
                classifier,
                images,
                recipe,
                checkpoint=checkpoint,
                settings=_settings(classifier, held_out),
                unknown={"class_sample": None} if classifier.drawn_classes(recipe) == len(names) else None,
                validation=validation,
                callbacks=callbacks,
                limits=limits,
                **options,
            )
        except TrainingInterrupted as interruption:
            if not interruption.history.rows:
                raise
            ship(classifier)
            raise _lacking(interruption.history, classifier, plain, held_out, folder) from None
    with Signals() as signals:
        try:
            with signals.held():
                ship(classifier)
            if recipe.whiten:
                classifier.fit_whitening(torch.utils.data.DataLoader(plain, recipe.batch_size, num_workers=workers))
            if held_out is not None:
                calibrate(classifier, held_out, workers=workers)
            elif recipe.calibration_folds and len(samples) > 1:
                _cross_fit(classifier, plain, images, recipe, start, options)
        except KeyboardInterrupt as stop:
            inner = stop.history if isinstance(stop, TrainingInterrupted) else None  # of a training without some images
            history.stopped = signals.received if inner is None else inner.stopped
            raise _lacking(history, classifier, plain, held_out, folder) from None
    return history


def _lacking(
    history: History,
    classifier: SEPClassifier,
    plain: LabelledImages,
    held_out: LabelledImages | None,
    folder: str | os.PathLike | None,
) -> TrainingInterrupted:
    """The interruption of a training whose weights are finished, with what a whole one would have beside them."""
    recipe, missing, calls = classifier.recipe, [], []
    if recipe.whiten and classifier.whitening is None:
        missing, calls = ["whitening"], ["classifier.fit_whitening(batches)"]
    calibrates = held_out is not None or (recipe.calibration_folds and len(plain) > 1)
    if calibrates and classifier.classes.calibration is None:
        missing, calls = [*missing, "calibration"], [*calls, "sep_peft.training.calibrate(classifier, images)"]
    resume = "" if folder is None else "fit(..., resume=True) with a classifier that is made anew, or "
    remedy = f"Call {resume}{' and '.join(calls)}."
    return TrainingInterrupted(history, missing, remedy)


@contextmanager
def _as_before_unless_trained(classifier: SEPClassifier) -> Iterator[dict[str, torch.Tensor]]:
    """Where the block raises before an epoch has ended, what a training sets before its first step is as it was.

    It is given what `values_of` gives before the block.
    """
    before, start = {name: getattr(classifier, name) for name in CHANGED_AT_START}, values_of(classifier)
    try:
        yield start
    except BaseException:
        if all(torch.equal(value, start[name]) for name, value in values_of(classifier).items()):
            for name, value in before.items():
                setattr(classifier, name, value)
        raise


def check_recipe(classifier: SEPClassifier, recipe: Recipe) -> None:
    """
    Raises:
        ValueError: a setting is for classes of another kind than the classifier's.
    """
    several = classifier.classes.multi_label
    if several and (others := recipe.regularizer_weights):
        raise ValueError(
            f"{', '.join(others)} of the recipe are for classes of which an image has one, but it may have several of "
            "these. Leave them at 0."
        )
    if not several and recipe.negative_focus:
        raise ValueError(
            "negative_focus is for images that may have several classes, but these have one. It is "
            f"{recipe.negative_focus}; leave it at 0."
        )
    if several and recipe.whiten:
        raise ValueError(
            "A whitening tells images of one class from others, but an image may have several of these. Pass a recipe "
            "with whiten=False."
        )


def _check_samples(classifier: SEPClassifier, samples: Any, eval_samples: Any, recipe: Recipe) -> None:
    """
    Raises:
        TypeError, ValueError: as `fit`.
    """
    check_recipe(classifier, recipe)
    several = classifier.classes.multi_label
    check = check_label_samples if several else check_samples
    check(classifier, samples, "train on")
    if recipe.whiten and len({name for _, name in samples}) < 2:
        raise ValueError(
            "A whitening tells images of one class from others, but all samples are of one. Pass images of two classes "
            "at least, or a recipe with whiten=False."
        )
    if eval_samples is not None:
        check(classifier, eval_samples, "validate on")
    elif several and not (recipe.calibration_folds and len(samples) > 1):
        raise ValueError(
            "Where an image may have several classes, thresholds are chosen on images that were not trained on. Pass "
            "eval_samples, or a recipe with calibration_folds and two images."
        )


def _start(classifier: SEPClassifier, plain: LabelledImages, workers: int, resumed: bool) -> None:
    """Begin what the loss needs beside the adapter; of a resumed training the checkpoint has the values."""
    recipe, batches = classifier.recipe, None
    if not resumed:
        batches = torch.utils.data.DataLoader(plain, recipe.batch_size, num_workers=workers)
        if classifier.classes.multi_label:  # gone through twice
            known = FrozenImages(classifier, plain, 1, recipe.batch_size, workers)
            batches = [known.known(list(range(len(plain))))]
    if recipe.prototype_weight:
        classifier.reset_prototypes(batches)
    else:
        classifier.prototypes = None
    classifier.reset_sigmoids(batches)


def _cross_fit(
    classifier: SEPClassifier,
    plain: LabelledImages,
    images: EpochDataset,
    recipe: Recipe,
    start: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
) -> None:
    """Calibrate without held-out images; what was trained is right, whether that works or not."""
    try:
        calibrate(classifier, cross_fit(classifier, plain, images, recipe, start, **options))
    except ValueError as error:
        warnings.warn(
            f"Scores are not calibrated, because a training without some images failed: {error}", stacklevel=3
        )


def _noted(classifier: SEPClassifier, recipe: Recipe, parts: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What is told of a training beside its adapter."""
    return {
        "recipe": asdict(recipe),
        "images": {part: len(samples) for part, samples in parts.items()},
        "classes": classifier.class_names,
        "templates": list(classifier.classes.templates),
        "device": str(classifier.device),
    }


def _settings(classifier: SEPClassifier, held_out: LabelledImages | None) -> Mapping[str, Any]:
    """What must be the same for a training that is gone on with, beside recipe and images."""
    described = classifier.classes.description_texts
    texts = [classifier.classes.templates, *([described] if described else [])]
    classes = json.dumps([classifier.classes.names, *texts])
    return {
        "classes": hashlib.sha256(classes.encode()).hexdigest()[:32],
        "eval_samples": None if held_out is None else held_out.fingerprint,
    }
