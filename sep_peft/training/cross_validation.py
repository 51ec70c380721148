"""Measuring by k folds where every image was trained on: each is told by an adapter that was trained on the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import PeftModel
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import set_seed

from ..classifier.calibration import fit_temperature
from ..classifier.classifier import SEPClassifier
from ..method.recipe import Recipe
from ..tuner.config import SEPConfig
from .calibrate import deal, logits_of
from .data import LabelledImages
from .evaluation import Evaluation, check_samples
from .fit import fit
from .folders import Samples


#: Name of the adapter that is trained for each part, and taken out again.
FOLD = "fold"


def cross_validate(
    classifier: SEPClassifier,
    samples: Samples,
    recipe: Recipe | None = None,
    *,
    folds: int = 4,
    workers: int = 0,
    quiet: bool = False,
) -> Evaluation:
    """Measure how well adapters like that of a classifier tell images that they were not trained on, by k folds.

    The images are dealt into parts, each class as evenly as can be; for each part an adapter of the same options is
    trained on the others from the start, as long as the recipe says, and is shown the part. What comes out is the
    recipe's worth with ``1 - 1 / folds`` of the images, not that of the classifier's weights, which have seen all of
    them. Logits of each part are divided by the temperature that fits the other parts best, where the recipe has
    `calibration_folds`. The classifier is afterwards as it was.

    Args:
        classifier: with a processor and the classes of the images; its own weights take no part.
        samples: images and names of their classes.
        recipe: how to train; None: the classifier's.
        folds: parts, at least 2; with fewer images as many as there are images.
        workers: processes that read images.
        quiet: without progress.

    Returns:
        an evaluation of all samples with `Evaluation.folds`; `mislabelled` names training images whose label may be
        wrong.

    Raises:
        TypeError: the model is no `PeftModel`, or the samples are no list.
        ValueError: fewer than two images or folds, an adapter is called "fold", or as `fit`.

    Example:
        >>> found = cross_validate(classifier, images.train)
        >>> found.accuracy, found.mislabelled
    """
    recipe = classifier.recipe if recipe is None else recipe
    if not isinstance(classifier.model, PeftModel):
        raise TypeError(f"k folds need a PeftModel to add adapters to, but got {type(classifier.model).__name__}.")
    if not isinstance(folds, int) or isinstance(folds, bool) or folds < 2:
        raise ValueError(f"folds must be a whole number of at least 2, but got {folds!r}.")
    if classifier.classes.multi_label:
        raise ValueError(
            "k folds measure classes of which an image has one, but it may have several of these. Hold images out and "
            "use evaluate_labels."
        )
    check_samples(classifier, samples, "deal into folds")
    if len(samples) < 2:
        raise ValueError(f"k folds need at least two images, but there are {len(samples)}.")
    if FOLD in classifier.model.peft_config:
        raise ValueError(f'An adapter is called "{FOLD}", which is the name of those that are trained for k folds.')
    plain = LabelledImages(samples, classifier.class_names, classifier.processor)
    parts = deal(plain.labels, folds, recipe.seed)
    found = []
    for part in tqdm(parts, desc="folds", disable=quiet, file=sys.stderr):
        rest = sorted(set(range(len(samples))) - set(part))
        with _fresh_adapter(classifier, recipe) as other:
            once = replace(recipe, calibration_folds=0)
            fit(other, [samples[index] for index in rest], once, quiet=True, workers=workers)
            found.append(logits_of(other, Subset(plain, part), recipe.batch_size, workers))
    scores = torch.empty(len(samples), len(classifier.classes))
    for place, part in enumerate(parts):
        others = [each for index, each in enumerate(found) if index != place]
        logits, _, labels = (torch.cat(each) for each in zip(*others, strict=True))
        temperature = fit_temperature(logits, labels) if recipe.calibration_folds else 1.0
        scores[part] = (found[place][0] / temperature).softmax(dim=1).to(scores.dtype)
    return Evaluation(classifier.class_names, list(samples), scores, folds=len(parts))


@contextmanager
def _fresh_adapter(classifier: SEPClassifier, recipe: Recipe) -> Iterator[SEPClassifier]:
    """A classifier of the same classes on the same model, with a new adapter that is active as long as the block
    lasts."""
    model, classes = classifier.model, classifier.classes
    assert isinstance(model, PeftModel), "checked above"
    active, training = str(model.active_adapter), classifier.training
    trained = {name: p.requires_grad for name, p in classifier.named_parameters()}
    config = model.peft_config[active]
    assert isinstance(config, SEPConfig), "the classifier has a SEP adapter"
    set_seed(recipe.seed)
    try:
        model.add_adapter(FOLD, replace(config, inference_mode=False))
        model.set_adapter(FOLD)
        untrained = replace(
            classes, prototypes=None, prototype_logit_weight=0.0, head=None, calibration=None, zero_shot_margin=0.0
        )
        encoder = classifier.encoder
        yield SEPClassifier(
            model,
            untrained,
            processor=classifier.processor,
            recipe=recipe,
            chunk_size=encoder.chunk_size,
            kept_tokens=encoder.kept_tokens,
        )
    finally:
        model.set_adapter(active)
        if FOLD in model.peft_config:
            model.delete_adapter(FOLD)
        for name, parameter in classifier.named_parameters():
            parameter.requires_grad_(trained[name])
        classifier.train(training)
