"""`FrozenImages`: images with their frozen embeddings, which no training changes, computed once for many trainings."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from ..classifier.classifier import SEPClassifier
from ..tuner.modes import evaluating
from .data import EpochDataset, LabelledImages


class FrozenImages(EpochDataset):
    """Images that bring what the frozen tower makes of them, so that only the prompted one has to run.

    An entry is that of the images and `frozen_embeds` (E,), projected, without dropout. In memory an entry of N images
    takes ``4 E`` bytes in each epoch.

    Args:
        classifier: whose image tower runs, without its adapter.
        images: N of them.
        epochs: so many of them, from the first, are embedded; no other can be shown.
        batch_size: images at a time.
        workers: processes that read images.
    """

    def __init__(
        self, classifier: SEPClassifier, images: LabelledImages, epochs: int, batch_size: int, workers: int = 0
    ):
        super().__init__()
        self._images, self._embeds = images, []
        for epoch in range(epochs):
            images.set_epoch(epoch)
            self._embeds.append(_embed(classifier, DataLoader(images, batch_size, num_workers=workers)))
        self.labels = images.targets()
        images.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._images[index], "frozen_embeds": self._embeds[self.epoch][index]}

    def known(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """`frozen_embeds` (B, E) and `labels` (B,) of some images in this epoch, which are not read for it."""
        return {"frozen_embeds": self._embeds[self.epoch][indices], "labels": self.labels[indices]}


@torch.no_grad()
def _embed(classifier: SEPClassifier, batches: DataLoader) -> torch.Tensor:
    """(N, E), on the CPU."""
    found = []
    with evaluating(classifier.model):
        for batch in batches:
            inputs = {name: value.to(classifier.device) for name, value in batch.items() if name != "labels"}
            found.append(classifier.vision_tower.embed_frozen(**inputs).cpu())
    return torch.cat(found)
