"""Fitting a classifier's calibration: on held-out images, or by cross-fitting on the training images.

Training images themselves say nothing about scores: the adapter and the prototypes were fitted to them, and on images
of few shots the adapter is nearly always right and sure of it. What it makes of an image that it did not see is found
by training it anew, for a shorter time, without a part of the images: every image is then told by a model that did not
see it. Measured, a third of the steps gives a temperature as near to that of test images as all of them do
(docs/scores.md).
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..classifier.calibration import KNOWN_SHARE, Calibration, fit_temperature, kept_scores, nearness, typical_logits
from ..classifier.classifier import SEPClassifier
from ..classifier.label_calibration import LabelCalibration, fit_scale, is_rare
from ..classifier.logits import ClassWeights, class_logits, zero_shot_logits
from ..method.recipe import Recipe
from ..tuner.modes import evaluating
from .data import EpochDataset, ImagePart, LabelledImages
from .frozen_images import FrozenImages
from .loop import train
from .optimizer import count_steps, trainable


@dataclass(frozen=True)
class HeldOut:
    """What a classifier makes of N images that it did not see.

    Args:
        logits: (N, C), not calibrated.
        new_logits: (N, C), as if the classes had not been trained: by texts alone and with the margin of zero-shot.
        labels: (N,), or (N, C) with 1 for those of an image, which may have several.
        source: of the images, as `Calibration` has it.
        zero_shot: (N, C), of the base model; None where an image has one class.
    """

    logits: torch.Tensor
    new_logits: torch.Tensor
    labels: torch.Tensor
    source: str
    zero_shot: torch.Tensor | None = None

    def calibration(self) -> Calibration | LabelCalibration:
        """
        Raises:
            ValueError: there are no images, or a logit is not finite.
        """
        if self.labels.ndim == 2:
            return self._of_labels()
        temperature = fit_temperature(self.logits, self.labels)
        right = (self.logits.argmax(dim=1) == self.labels).sum().item()
        logits = self.logits / temperature
        scores = logits.softmax(dim=1).clamp(0, 1).gather(1, self.labels[:, None].long())[:, 0]  # of their labels, (N,)
        typical = typical_logits(logits, self.labels)
        return Calibration(
            temperature,
            fit_temperature(self.new_logits, self.labels),
            len(self.labels),
            self.source,
            100 * right / len(self.labels),
            label_scores=kept_scores(scores),
            typical_logits=typical,
            least_nearness=nearness(logits, typical).quantile(1 - KNOWN_SHARE).item(),
        )

    def _of_labels(self) -> LabelCalibration:
        assert self.zero_shot is not None, "of several labels it is always there"
        rare = [place for place, own in enumerate(self.labels.unbind(dim=1)) if is_rare(own)]
        return LabelCalibration(
            fit_scale(self.logits, self.labels),
            fit_scale(self.zero_shot, self.labels),
            fit_scale(self.new_logits, self.labels, shared=True),
            len(self.labels),
            self.source,
            tuple(rare),
        )


def calibrate(
    classifier: SEPClassifier, images: LabelledImages | HeldOut, *, batch_size: int = 32, workers: int = 0
) -> SEPClassifier:
    """Fit a calibration and give it to the classifier; `fit` ends with it. Returns the classifier.

    Labels stay as they are, and so does accuracy.

    Args:
        classifier: trained, with the classes of the images.
        images: that were not trained on, as they are, or what `cross_fit` gave.
        batch_size: images at a time.
        workers: processes that read images.

    Raises:
        ValueError: there are no images, or a logit is not finite; the classifier is as before.

    Example:
        >>> classifier.finish_training()  # after a loop of one's own
        >>> calibrate(classifier, LabelledImages(validation, classifier.class_names, processor))
    """
    if not isinstance(images, HeldOut):
        images = _held_out(classifier, images, batch_size, workers, "held-out images")
    return classifier.calibrate(images.calibration())


def cross_fit(
    classifier: SEPClassifier,
    plain: LabelledImages,
    images: EpochDataset,
    recipe: Recipe,
    start: Mapping[str, torch.Tensor],
    *,
    accelerator: Accelerator | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> HeldOut:
    """What models that are trained without an image make of it, for every training image.

    The images are dealt into `recipe.calibration_folds` parts, each class as evenly as can be. For each part the
    classifier starts from `start`, is trained on the others for a third of the steps, and is shown the part.
    Afterwards it is as it was. In one process the frozen pass runs once for all parts.

    Args:
        classifier: trained; its class names are those of the images.
        plain: N training images as they are.
        images: the same as they are trained on.
        recipe: how the classifier was trained.
        start: what `values_of` gave before it was.
        accelerator, workers, quiet: as for `train`.

    Raises:
        ValueError: there are fewer than two images.
    """
    labels = plain.labels
    parts = deal(labels, recipe.calibration_folds, recipe.seed)
    if len(parts) < 2:
        raise ValueError(f"Cross-fitting needs at least two images, but there are {len(labels)}.")
    fewest = math.ceil((len(labels) - max(map(len, parts))) / recipe.batch_size)  # steps of an epoch
    shorter, found = _shortened(recipe, len(labels), fewest), []
    several = accelerator is not None and accelerator.num_processes > 1
    known = FrozenImages(classifier, plain, 1, recipe.batch_size, workers)
    if isinstance(images, LabelledImages) and not several:  # each of several processes would embed all images
        images = FrozenImages(classifier, images, shorter.epochs, recipe.batch_size, workers)
    with as_it_was(classifier):
        for part in tqdm(parts, desc="calibrating", disable=quiet, file=sys.stderr):
            others = sorted(set(range(len(labels))) - set(part))
            classifier.prototypes = None  # those of the parameters that were there at the start
            set_values(classifier, start)
            if shorter.prototype_weight:
                classifier.reset_prototypes([known.known(others)])
            classifier.reset_sigmoids([known.known(others)])
            options = {"accelerator": accelerator, "workers": workers}
            train(classifier, ImagePart(images, others), shorter, quiet=True, **options)
            classifier.finish_training()
            found.append(_held_out(classifier, Subset(known, part), recipe.batch_size, workers, "cross-fitting"))
    zero_shot = [each.zero_shot for each in found if each.zero_shot is not None]
    return HeldOut(
        torch.cat([each.logits for each in found]),
        torch.cat([each.new_logits for each in found]),
        torch.cat([each.labels for each in found]),
        "cross-fitting",
        torch.cat(zero_shot) if zero_shot else None,
    )


def values_of(classifier: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> a copy of every trained parameter beside those of the loss, which start anew in each training."""
    of_loss = {"prototypes", *(f"sigmoids.{name}" for name in ("log_slope", "biases", "prototype_biases"))}
    return {name: p.detach().clone() for name, p in trainable(classifier).items() if name not in of_loss}


def deal(labels: Sequence[Any], count: int, seed: int) -> list[list[int]]:
    """Indices of N images in at most `count` parts, at random; no class has two more in one part than in another.

    Parts are as even as can be, and none is empty. Where an image may have several classes, images of the same ones are
    spread so.
    """
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: labels[index])  # keeps the random order within a class
    count = min(count, len(order))
    return [sorted(order[part::count]) for part in range(count)]


def _shortened(recipe: Recipe, count: int, fewest: int) -> Recipe:
    """A recipe that takes a third of the steps: of few images, an epoch of a part has fewer steps than one of all.

    Args:
        recipe: to shorten.
        count: images that it is for.
        fewest: steps of an epoch of the smallest part that is trained on.
    """
    steps = math.ceil(count_steps(recipe, math.ceil(count / recipe.batch_size)) / 3)
    return replace(recipe, epochs=math.ceil(steps / fewest), max_steps=steps)


@torch.no_grad()
def set_values(classifier: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters the values that `values_of` took."""
    parameters = dict(classifier.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


@contextmanager
def as_it_was(classifier: SEPClassifier) -> Iterator[None]:
    """After the block the classifier's weights, prototypes and classes are those of before it, whatever happens."""
    values = values_of(classifier)
    prototypes, encoder, trained = classifier.prototypes, classifier.encoder, classifier.trained
    sigmoids = classifier.sigmoids
    try:
        yield
    finally:
        set_values(classifier, values)
        classifier.prototypes, classifier.encoder, classifier.trained = prototypes, encoder, trained
        classifier.sigmoids = sigmoids
        classifier.agreement.state(encoder.classes)
        classifier.eval()


def logits_of(
    classifier: SEPClassifier, images: LabelledImages | Subset, batch_size: int, workers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (N, C) of trained and of new classes, and labels, on the CPU; none of them calibrated."""
    found = _held_out(classifier, images, batch_size, workers, "held-out images")
    return found.logits, found.new_logits, found.labels


@torch.no_grad()
def _held_out(
    classifier: SEPClassifier, images: LabelledImages | Subset, batch_size: int, workers: int, source: str
) -> HeldOut:
    """What a classifier makes of images, on the CPU."""
    tower, found = classifier.vision_tower, []
    weights = classifier.encoder.weights(training=False)
    texts = weights.text_embeds, weights.frozen_text_embeds
    trained = ClassWeights(*texts, weights.prototypes, weights.zero_shot_margin, head=weights.head)
    margin = 0.0 if classifier.classes.multi_label else classifier.recipe.zero_shot_margin
    as_new = ClassWeights(*texts, zero_shot_margin=margin)
    with evaluating(classifier.model):
        for batch in DataLoader(images, batch_size, num_workers=workers):
            labels = batch.pop("labels")
            embeds = classifier.image_embeds(**{name: value.to(classifier.device) for name, value in batch.items()})
            logits = [class_logits(tower, *embeds, each).cpu() for each in (trained, as_new)]
            zero_shot = zero_shot_logits(tower, embeds[1], weights.frozen_text_embeds).cpu()
            found.append((*logits, zero_shot, labels))
    logits, new_logits, zero_shot, labels = map(torch.cat, zip(*found, strict=True))
    return HeldOut(logits, new_logits, labels, source, zero_shot if classifier.classes.multi_label else None)
