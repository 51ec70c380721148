"""Training images, augmented; drawn anew in every epoch, or a few views of each with their trunk computed once."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from protocols import Plan
from torch import nn
from torch.utils.data import Dataset
from transforms import TrainTransform

from sep_peft import TrunkCache


class TrainImages(Dataset):
    """What happens to an image depends on the seed, the epoch and its place in the draw alone."""

    def __init__(self, plan: Plan, transform: TrainTransform, seed: int):
        self.plan, self.transform, self.seed, self.epoch = plan, transform, seed, 0

    def __len__(self) -> int:
        return len(self.plan.images.train)

    def __getitem__(self, index: int) -> dict:
        return self.read(index, self.epoch)

    def read(self, index: int, epoch: int) -> dict[str, torch.Tensor | int]:
        """An image as it is in an epoch."""
        sample = self.plan.images.train[index]
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        return {"pixel_values": self.transform(self.plan.data.open(sample.key), rng), "labels": sample.label}


class FirstEpochs(Dataset):
    """N images as they are in the first epochs: entry i + N e is image i in epoch e."""

    def __init__(self, images: TrainImages, epochs: int):
        self.images, self.epochs = images, epochs

    def __len__(self) -> int:
        return len(self.images) * self.epochs

    def __getitem__(self, index: int) -> dict:
        epoch, image = divmod(index, len(self.images))
        return self.images.read(image, epoch)


class CachedImages(Dataset):
    """Images whose trunk, all below the adapter's `start_layer`, is computed once for augmentations of first epochs.

    With as many views as epochs training is what it is without a cache; with fewer, views come again in their order.

    Args:
        images: N of them.
        views: augmentations of each.
        model: with a SEP adapter whose `start_layer` is above 0.
        folder: where to keep the trunk between runs; None: in memory.
    """

    def __init__(self, images: TrainImages, views: int, model: nn.Module, folder: Path | None):
        self.count, self.views, self.epoch = len(images), views, 0
        self.cache = TrunkCache(model, FirstEpochs(images, views), folder)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.cache[index + self.epoch % self.views * self.count]
