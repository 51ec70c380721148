"""`fit_pairs`: train an adapter on images with captions, without a class list."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from torch import nn

from ..classifier.embeddings import check_batch_size
from ..method.pairs_recipe import PairsRecipe
from ..tuner.model import find_towers
from ..tuner.offload import compute_device
from .captions import Captions, LongCaptions
from .checkpoint import CHECKPOINT_FILE
from .history import History
from .limits import Limits
from .loop import Callback, train
from .mined_negatives import with_mined_negatives
from .optimizer import trainable
from .pair_images import PairedImages
from .pair_model import PairModel
from .pair_step import PairStep, loss_of
from .pairs import as_pairs
from .retrieval import PairValidation
from .run_folder import check_run_folder
from .run_log import RunLog


def fit_pairs(
    model: nn.Module,
    pairs: Iterable[Any],
    recipe: PairsRecipe | None = None,
    *,
    processor: Any,
    eval_pairs: Iterable[Any] | None = None,
    long_captions: LongCaptions = "refuse",
    chunk_size: int | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    notes: Mapping[str, Any] | None = None,
    max_seconds: float | None = None,
    patience: int | None = None,
    keep: Literal["best", "last"] = "best",
    quiet: bool = False,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> History:
    """Train the active adapter so that images and their captions find each other; then the model is in evaluation.

    The images of a step are compared with all its captions, over all processes, by the loss that the model was trained
    with: CLIP's, or for models with a bias of their logits SigLIP's. Consistency with the frozen model keeps what it
    knows. Both branches of the text tower read the caption.

    Args:
        model: with a SEP adapter on both towers, on the device to train on.
        pairs: images with captions, each a `Pair` or a tuple of an image (path, URL, `PIL.Image`) and its caption or a
            list of its captions, of which every epoch draws one. See `read_pairs`.
        recipe: how to train; None: `PairsRecipe()`.
        processor: of transformers, with a tokenizer and an image processor.
        eval_pairs: images with captions that are not trained on: recall at 1, 5 and 10 is measured on them in both
            directions after every epoch, any caption of an image counting, beside the frozen model; None: none.
        long_captions: what becomes of captions with more tokens than `max_text_length(model)`: "refuse" them, or "cut"
            their ends and warn of how many.
        chunk_size: images, and captions, whose activations are kept at a time, so that a large batch needs the memory
            of a small one and some more time; its gradients are the same. None: those of the whole batch.
        callbacks, folder, resume, notes, max_seconds, patience, keep, quiet, workers, accelerator: as for `fit`, where
            the mean of the six recalls is in the place of accuracy.

    Returns:
        the history of all epochs; its rows have "epoch" from 1, "loss", "accuracy", in percent, of telling the captions
        of a batch apart, "lr" and, with `eval_pairs`, in percent "val_recall", the mean of six, each of them as
        "val_image_to_text_1" and so on, and the frozen model's as "frozen_image_to_text_1" and so on.

    Raises:
        TypeError: `recipe` is no `PairsRecipe`, or the pairs are none.
        FileExistsError: `folder` has a training that is not finished, and `resume` was not asked for.
        OSError: nothing can be written in `folder`, or its disk has no room.
        ValueError: the model has no adapter to be trained, or no scale of its own, a caption is blank or too long, or
            an option has a value that is not allowed; nothing is changed then. Or the checkpoint is of another
            training, or the loss is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM came; the adapter is as the last epoch that was done left it.

    Example:
        >>> model = get_peft_model(clip, SEPConfig())
        >>> fit_pairs(model, [("a.jpg", ["a red dress", "a long dress"])], processor=processor, folder="run")
        >>> model.save_pretrained("my-adapter")
    """
    recipe = PairsRecipe() if recipe is None else recipe
    if not isinstance(recipe, PairsRecipe):
        raise TypeError(f"recipe must be a sep_peft.training.PairsRecipe, but got {recipe!r}.")
    vision = check_model(model)
    if chunk_size is not None:
        check_batch_size(chunk_size, "chunk_size")
    found = as_pairs(pairs)
    held_out = None if eval_pairs is None else as_pairs(eval_pairs, "validate on")
    limits = Limits(max_seconds, patience, keep)
    if patience is not None and held_out is None:
        raise ValueError(f"patience={patience} needs eval_pairs, on which the model gets better or does not.")
    captions = Captions(model, processor, found, long_captions)
    size = min(recipe.batch_size, chunk_size or recipe.batch_size)
    validation = None if held_out is None else PairValidation(model, held_out, processor, size, long_captions)
    check_run_folder(folder, resume, model)
    trained = found
    if recipe.mined_negatives:
        known = PairValidation(model, found, processor, size, "cut")  # what is too long was told already
        trained = with_mined_negatives(found, known, recipe.mined_negatives)
    images = PairedImages(trained, captions, processor, recipe, named=found)
    checkpoint = None if folder is None else Path(folder, CHECKPOINT_FILE)
    if checkpoint is not None and not resume:
        checkpoint.unlink(missing_ok=True)  # of a training that was finished
    if folder is not None:
        counts = {"training": len(found), "validation": len(held_out or ())}
        limited = {"max_seconds": max_seconds, "patience": patience, "keep": keep, "chunk_size": chunk_size}
        noted = {"recipe": asdict(recipe), "images": counts, "captions": len(captions), "long_captions": long_captions}
        device = {"device": str(compute_device(model))}
        callbacks = [RunLog(folder, {**(notes or {}), **noted, **device, **limited}), *callbacks]
    try:
        return train(
            PairModel(model, chunk_size),
            images,
            recipe,
            accelerator=accelerator,
            checkpoint=checkpoint,
            settings={
                "loss": loss_of(vision, recipe),
                "long_captions": long_captions,
                "eval_pairs": None if validation is None else validation.fingerprint,
            },
            validation=validation,
            callbacks=callbacks,
            limits=limits,
            workers=workers,
            quiet=quiet,
            step=PairStep(vision, recipe),
        )
    finally:
        model.eval()


def check_model(model: nn.Module):
    """Make sure that a model can be trained on pairs; returns its tower that sees, a `SEPTower`.

    Raises:
        ValueError: it has no adapter on both towers, does not compare images with texts, nothing of it is to be
            trained or its scale is, or the adapter is `batch_coupled`.
    """
    towers = find_towers(model)
    if set(towers) != {"text", "vision"}:
        raise ValueError(
            f"The model needs a SEP adapter on a text and an image tower, but has {sorted(towers) or 'none'}. Make "
            "one with peft.get_peft_model(model, SEPConfig())."
        )
    vision = towers["vision"]
    architecture, name = vision.architecture, type(vision.owner).__name__
    if vision.spec.inputs != "pixel_values" or vision.spec.videos or architecture.logit_scale is None:
        raise ValueError(f"{name} does not compare images with texts, so it cannot be trained on images with captions.")
    trained = trainable(model)
    if not any(".sep_" in parameter for parameter in trained):
        raise ValueError(
            "There is nothing to train: every parameter of the adapter is frozen. A loaded adapter is trained on with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    for place in filter(None, (architecture.logit_scale, architecture.logit_bias)):
        if any(parameter.endswith(place) for parameter in trained):
            raise ValueError(
                f"{place} of {name} requires gradients, but it stays as the model has it: no adapter holds it. Call "
                "requires_grad_(False) on it."
            )
    if any((settings := tower.active_settings) is not None and settings.batch_coupled for tower in towers.values()):
        raise ValueError(
            "An adapter with batch_coupled=True embeds an image by the others beside it, so it cannot be trained on "
            "images with captions. Make one with batch_coupled=False."
        )
    return vision
