"""Accuracy of a classifier on one evaluation of a plan, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from protocols import Evaluation
from readers import UNREADABLE, PictureSet, Sample
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transforms import shift


class TestPictures(Dataset):
    """Pictures as the model's processor makes them; one that cannot be read gives its key instead of pixels."""

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(self, data: PictureSet, samples: list[Sample], shifted: str = ""):
        self.data, self.samples, self.shifted = data, samples, shifted

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Sample]:
        sample = self.samples[index]
        try:
            picture = self.data.open(sample.key)
        except UNREADABLE:
            return None, sample
        return (shift(self.shifted, picture, sample.key) if self.shifted else picture), sample


class Collate:
    """A batch of pictures -> pixel_values (B, 3, H, W), labels (B,), keys of those that could not be read."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, batch: list) -> tuple[torch.Tensor | None, torch.Tensor, list[str]]:
        pictures = [picture for picture, _ in batch if picture is not None]
        labels = torch.tensor([sample.label for picture, sample in batch if picture is not None])
        unreadable = [sample.key for picture, sample in batch if picture is None]
        pixels = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"] if pictures else None
        return pixels, labels, unreadable


def batches(data, samples, image_processor, *, shifted="", batch_size=100, workers=0) -> DataLoader:
    """Loader of test pictures, in their order."""
    collate = Collate(image_processor)
    return DataLoader(TestPictures(data, samples, shifted), batch_size, num_workers=workers, collate_fn=collate)


@torch.no_grad()
def evaluate(
    classifier, evaluation: Evaluation, image_processor, accelerator: Accelerator, workers: int = 0
) -> dict[str, Any] | None:
    """Measure a classifier that has the classes of the evaluation; every process takes its share of the pictures.

    Returns:
        accuracy in percent, counts, and the keys of pictures that could not be read; None where the classifier cannot
        tell these classes apart.

    Raises:
        ValueError: no picture could be read.
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
        raise ValueError(f"{evaluation.data.name}: none of the {len(unreadable)} test pictures can be read.")
    return {"accuracy": 100 * right / total, "right": right, "total": total, "unreadable": unreadable}


@torch.no_grad()
def features(classifier, data: PictureSet, samples: list[Sample], image_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, E) of pictures without augmentation, and their labels (N,)."""
    found = [
        (classifier.image_embeds(pixels.to(next(classifier.parameters()).device)), labels)
        for pixels, labels, _ in batches(data, samples, image_processor)
        if pixels is not None
    ]
    embeds, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return embeds, labels.to(embeds.device)
