"""Test images in batches, as the model's processor makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pixels import KeptPixels
from readers import UNREADABLE, ImageSet, Sample
from torch.utils.data import DataLoader, Dataset
from transforms import shift


#: pixel_values (B, 3, H, W) of images that can be read, their labels (B,), keys of the others.
Batch = tuple[torch.Tensor | None, torch.Tensor, list[str]]


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

    def __call__(self, batch: list) -> Batch:
        images = [image for image, _ in batch if image is not None]
        readable = [image is not None for image, _ in batch]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        return made_of(pixels, [sample for _, sample in batch], readable)


def made_of(pixels: torch.Tensor | None, samples: list[Sample], readable: list[bool]) -> Batch:
    """The batch of samples of which `pixels` has those that are readable."""
    labels = torch.tensor([sample.label for sample, could_read in zip(samples, readable, strict=True) if could_read])
    return pixels, labels, [sample.key for sample, could_read in zip(samples, readable, strict=True) if not could_read]


class KeptBatches:
    """The batches of a loader of test images; those that are kept are not read, and others are kept then.

    Args:
        images: of which each batch has the next `batch_size`.
        loading: options of `DataLoader`.
    """

    def __init__(self, images: TestImages, kept: KeptPixels, batch_size: int, **loading: Any):
        self._images, self._kept, self._loading = images, kept, loading
        self._parts = [range(len(images))[start : start + batch_size] for start in range(0, len(images), batch_size)]

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        names = [(self._images.data.name, self._images.shifted, sample.key) for sample in self._images.samples]
        known = [all(names[index] in self._kept for index in part) for part in self._parts]
        missing = [list(part) for part, is_known in zip(self._parts, known, strict=True) if not is_known]
        read = iter(DataLoader(self._images, batch_sampler=missing, **self._loading) if missing else ())
        for part, is_known in zip(self._parts, known, strict=True):
            samples, own = ([each[index] for index in part] for each in (self._images.samples, names))
            if is_known:
                pixels, readable = self._kept.stacked(own)
                yield made_of(pixels, samples, readable)
            else:
                batch = next(read)
                self._kept.add(own, [sample.key not in batch[2] for sample in samples], batch[0])
                yield batch


def batches(
    data, samples, image_processor, *, shifted="", batch_size=100, workers=0, kept: KeptPixels | None = None
) -> DataLoader | KeptBatches:
    """Batches of test images, in their order.

    Args:
        kept: pixels of images that were read before, which are used and added to; None: all are read.
    """
    images, loading = TestImages(data, samples, shifted), {"num_workers": workers}
    loading["collate_fn"] = Collate(image_processor)
    return (
        DataLoader(images, batch_size, **loading) if kept is None else KeptBatches(images, kept, batch_size, **loading)
    )
