"""A data set of `small_classifier`'s images whose epochs can be told apart."""

from __future__ import annotations

from small_classifier import IMAGES, LABELS

from sep_peft.training.data import EpochDataset


class Images(EpochDataset):
    """Five images that differ from epoch to epoch."""

    fingerprint = "five"

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index] + 0.1 * self.epoch, "labels": LABELS[index]}
