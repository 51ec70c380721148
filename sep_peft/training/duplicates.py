"""Images that are nearly one that was trained on: of such test images accuracy says little."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ..classifier.classifier import SEPClassifier
from ..classifier.embeddings import embed_images
from ..classifier.near_duplicates import copy_similarity, nearest
from ..tuner.mixed_batch import BASE
from .evaluation import Evaluation
from .folders import Samples


class Duplicate(NamedTuple):
    """An image that is nearly one that was trained on.

    Args:
        image, label: it and its class.
        other, other_label: the training image and its class.
        similarity: cosine of their frozen embeddings.
    """

    image: Any
    label: str
    other: Any
    other_label: str
    similarity: float


def near_duplicates(
    classifier: SEPClassifier, evaluations: Mapping[str, Evaluation], training: Samples, batch_size: int = 32
) -> dict[str, list[Duplicate]]:
    """Images that look like one that was trained on, the most similar first; see `copy_similarity` for how similar.

    Args:
        classifier: with a processor; its frozen image tower embeds the training images.
        evaluations: part of the data -> what `evaluate` found; parts without embeddings are left out.
        training: images that were trained on and names of their classes.
        batch_size: images at a time.

    Returns:
        for each part its images that are nearly one of `training`.
    """
    images = [image for image, _ in training]
    embed = partial(embed_images, classifier.model, classifier.processor, batch_size=batch_size, adapter=BASE)
    trained = embed(images)
    least = copy_similarity(images, trained, embed)
    return {
        part: _alike(each.samples, each.embeds, training, trained, least)
        for part, each in evaluations.items()
        if each.embeds is not None
    }


def _alike(
    samples: Samples, embeds: torch.Tensor, training: Samples, trained: torch.Tensor, least: float
) -> list[Duplicate]:
    """Of N samples with embeddings (N, E), those whose cosine to one of M trained embeddings (M, E) is at least so."""
    found, (best, places) = [], nearest(embeds, trained)
    for index in (best >= least).nonzero()[:, 0].tolist():
        (image, label), (other, other_label) = samples[index], training[int(places[index])]
        found.append(Duplicate(image, label, other, other_label, best[index].item()))
    return sorted(found, key=lambda each: -each.similarity)
