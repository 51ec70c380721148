"""Accuracy of a classifier on one evaluation of a plan, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from protocols import Measurement
from readers import UNREADABLE, ImageSet, Sample
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
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


@torch.no_grad()
def measure(
    classifier, evaluation: Measurement, image_processor, accelerator: Accelerator, workers: int = 0
) -> dict[str, Any] | None:
    """Measure a classifier that has the classes of the evaluation; every process takes its share of the images.

    Returns:
        accuracy in percent, counts, and the keys of images that could not be read; None where the classifier cannot
        tell these classes apart.

    Raises:
        ValueError: no image could be read.
    """
    names = list(evaluation.data.classes)
    if not getattr(classifier, "can_classify", lambda names: True)(names):
        return None
    classifier.eval()
    samples = evaluation.data.splits[evaluation.split][accelerator.process_index :: accelerator.num_processes]
    loader = batches(evaluation.data, samples, image_processor, shifted=evaluation.shift, workers=workers)
    counts, unreadable = torch.zeros(2, dtype=torch.long, device=accelerator.device), []
    for pixels, labels, broken in tqdm(
        loader, desc=evaluation.name, leave=False, disable=not accelerator.is_main_process
    ):
        unreadable += broken
        if pixels is not None:
            with accelerator.autocast():
                logits = classifier(pixel_values=pixels.to(accelerator.device)).logits
            counts += torch.tensor([(logits.argmax(dim=1).cpu() == labels).sum(), len(labels)]).to(counts.device)
    right, total = accelerator.reduce(counts, "sum").tolist()
    unreadable = sorted(gather_object(unreadable))
    if not total:
        raise ValueError(f"{evaluation.data.name}: none of the {len(unreadable)} test images can be read.")
    return {"accuracy": 100 * right / total, "right": right, "total": total, "unreadable": unreadable}


@torch.no_grad()
def features(classifier, data: ImageSet, samples: list[Sample], image_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, E) of images without augmentation, and their labels (N,)."""
    found = [
        (classifier.image_embeds(pixels.to(next(classifier.parameters()).device)), labels)
        for pixels, labels, _ in batches(data, samples, image_processor)
        if pixels is not None
    ]
    embeds, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return embeds, labels.to(embeds.device)
