"""Training pictures, augmented; drawn anew in every epoch, or a few views of each with their trunk computed once."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from protocols import Plan
from torch import nn
from torch.utils.data import Dataset
from transforms import TrainTransform

from sep_peft import TrunkCache


class TrainPictures(Dataset):
    """What happens to a picture depends on the seed, the epoch and its place in the draw alone."""

    def __init__(self, plan: Plan, transform: TrainTransform, seed: int):
        self.plan, self.transform, self.seed, self.epoch = plan, transform, seed, 0

    def __len__(self) -> int:
        return len(self.plan.pictures.train)

    def __getitem__(self, index: int) -> dict:
        return self.read(index, self.epoch)

    def read(self, index: int, epoch: int) -> dict[str, torch.Tensor | int]:
        """A picture as it is in an epoch."""
        sample = self.plan.pictures.train[index]
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        return {"pixel_values": self.transform(self.plan.data.open(sample.key), rng), "labels": sample.label}


class FirstEpochs(Dataset):
    """N pictures as they are in the first epochs: entry i + N e is picture i in epoch e."""

    def __init__(self, pictures: TrainPictures, epochs: int):
        self.pictures, self.epochs = pictures, epochs

    def __len__(self) -> int:
        return len(self.pictures) * self.epochs

    def __getitem__(self, index: int) -> dict:
        epoch, picture = divmod(index, len(self.pictures))
        return self.pictures.read(picture, epoch)


class CachedPictures(Dataset):
    """Pictures whose trunk, all below the adapter's `start_layer`, is computed once for augmentations of first epochs.

    With as many views as epochs training is what it is without a cache; with fewer, views come again in their order.

    Args:
        pictures: N of them.
        views: augmentations of each.
        model: with a SEP adapter whose `start_layer` is above 0.
        folder: where to keep the trunk between runs; None: in memory.
    """

    def __init__(self, pictures: TrainPictures, views: int, model: nn.Module, folder: Path | None):
        self.count, self.views, self.epoch = len(pictures), views, 0
        self.cache = TrunkCache(model, FirstEpochs(pictures, views), folder)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.cache[index + self.epoch % self.views * self.count]
