"""Images that are nearly the same: of test images that were trained on, accuracy says little."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..classifier.classifier import SEPClassifier
from ..classifier.embeddings import embed_images
from ..classifier.images import read_image
from ..tuner.mixed_batch import BASE
from .evaluation import Evaluation
from .folders import Samples


#: Training images whose copies say how similar two copies are.
COPIES = 64
#: Size of such a copy, of both sides, and its quality as JPEG.
COPY_SCALE, COPY_QUALITY = 0.7, 50
#: Share of copies that are less similar to their images than what counts as a duplicate.
MISSED_SHARE = 0.05
#: Images that are compared at a time.
ROWS = 1024


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
    """Images that look like one that was trained on, the most similar first.

    How similar duplicates are depends on the encoder, so it is measured: images count as such whose frozen embeddings
    are as similar as those of training images and of copies of these, saved at 0.7 of the size and with JPEG's quality
    50, are in 95 of 100 cases.

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
    some = list(range(0, len(images), max(1, len(images) // COPIES)))
    copies = embed([worse_copy(read_image(images[index])) for index in some])
    least = (trained[some] * copies).sum(dim=1).quantile(MISSED_SHARE).item()
    return {
        part: _alike(each.samples, each.embeds, training, trained, least)
        for part, each in evaluations.items()
        if each.embeds is not None
    }


def _alike(
    samples: Samples, embeds: torch.Tensor, training: Samples, trained: torch.Tensor, least: float
) -> list[Duplicate]:
    """Of N samples with embeddings (N, E), those whose cosine to one of M trained embeddings (M, E) is at least so."""
    found = []
    for start in range(0, len(embeds), ROWS):
        best = (embeds[start : start + ROWS].to(trained) @ trained.T).max(dim=1)
        for place in (best.values >= least).nonzero()[:, 0].tolist():
            (image, label), (other, other_label) = samples[start + place], training[int(best.indices[place])]
            found.append(Duplicate(image, label, other, other_label, best.values[place].item()))
    return sorted(found, key=lambda each: -each.similarity)


def worse_copy(image: Image.Image) -> Image.Image:
    """An image as it is after it was made smaller and saved as JPEG."""
    width, height = (max(1, round(COPY_SCALE * side)) for side in image.size)
    file = BytesIO()
    image.resize((width, height)).save(file, "JPEG", quality=COPY_QUALITY)
    return Image.open(file).convert("RGB")
