"""Frozen embeddings of test images, which no method changes: computed once for all cells that a process runs."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from baselines import AdaptedClassifier, PlainClassifier

from sep_peft import SEPClassifier
from sep_peft.method.mix import unit


class FrozenEmbeddings:
    """Image -> its frozen embedding (E,), on the CPU; all of one base model, in one precision."""

    def __init__(self):
        self._found: dict[Hashable, torch.Tensor] = {}

    def both(self, classifier, images: Sequence[Hashable], pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of images with the adapter and without, both (B, E); the frozen pass runs where one is new.

        Args:
            classifier: one that `takes_frozen`.
            images: what tells each image from all others.
            pixels: (B, 3, H, W).
        """
        if not all(image in self._found for image in images):
            self._found.update(zip(images, frozen_pass(classifier, pixels).cpu(), strict=True))
        frozen = torch.stack([self._found[image] for image in images]).to(pixels.device)
        if isinstance(classifier, SEPClassifier):
            return classifier.image_embeds(pixels, frozen_embeds=frozen)
        frozen = unit(frozen)
        return (classifier.image_embeds(pixels) if isinstance(classifier, AdaptedClassifier) else frozen), frozen


def frozen_pass(classifier, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> embeddings without the adapter, (B, E)."""
    if isinstance(classifier, SEPClassifier):
        return classifier.vision_tower.embed_frozen(pixel_values=pixels)
    if isinstance(classifier, AdaptedClassifier):
        return classifier.frozen(classifier.image_embeds, pixels)
    return classifier.image_embeds(pixels)


def takes_frozen(classifier) -> bool:
    """Whether a classifier predicts by the frozen embedding as well, or by it alone."""
    if isinstance(classifier, AdaptedClassifier):
        return classifier.needs_frozen
    return isinstance(classifier, SEPClassifier | PlainClassifier)


@functools.cache
def frozen_embeddings(model: str, attention: str | None, precision: str, data_root: Path) -> FrozenEmbeddings:
    """Those of this process for a base model and the images below a folder."""
    return FrozenEmbeddings()
