"""Test images in batches, as the model's processor makes them."""

from __future__ import annotations

from typing import Any

import torch
from readers import UNREADABLE, ImageSet, Sample
from torch.utils.data import DataLoader, Dataset
from transforms import shift


class TestImages(Dataset):
    """Images as the model's processor makes them; one that cannot be read gives its key instead of pixels."""

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(self, data: ImageSet, samples: list[Sample], shifted: str = ""):
        self.data, self.samples, self.shifted = data, samples, shifted

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Sample]:
        sample = self.samples[index]
        try:
            image = self.data.open(sample.key)
        except UNREADABLE:
            return None, sample
        return (shift(self.shifted, image, sample.key) if self.shifted else image), sample


class Collate:
    """A batch of images -> pixel_values (B, 3, H, W), labels (B,), keys of those that could not be read."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, batch: list) -> tuple[torch.Tensor | None, torch.Tensor, list[str]]:
        images = [image for image, _ in batch if image is not None]
        labels = torch.tensor([sample.label for image, sample in batch if image is not None])
        unreadable = [sample.key for image, sample in batch if image is None]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        return pixels, labels, unreadable


def batches(data, samples, image_processor, *, shifted="", batch_size=100, workers=0) -> DataLoader:
    """Loader of test images, in their order."""
    collate = Collate(image_processor)
    return DataLoader(TestImages(data, samples, shifted), batch_size, num_workers=workers, collate_fn=collate)
