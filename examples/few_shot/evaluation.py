"""Accuracy of a classifier on one evaluation of a plan, over all processes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from embeddings import Embeddings, both_images, combined_logits
from frozen import FrozenEmbeddings, takes_frozen
from images import batches
from pixels import KeptPixels
from protocols import Measurement
from readers import ImageSet, Sample
from tqdm import tqdm

from sep_peft.training.metrics import calibration_error


@torch.no_grad()
def measure(
    classifier,
    evaluation: Measurement,
    image_processor,
    accelerator: Accelerator,
    workers: int = 0,
    kept: Embeddings | None = None,
    known: FrozenEmbeddings | None = None,
    seen: KeptPixels | None = None,
) -> dict[str, Any] | None:
    """Measure a classifier that has the classes of the evaluation; every process takes its share of the images.

    Args:
        kept: gets the embeddings of the images of this process; None: they are not kept.
        known: frozen embeddings of test images, of the classifier's base model, which are used and added to; None: all
            are computed.
        seen: test images that were read before, which are used and added to; None: all are read.

    Returns:
        accuracy in percent, counts, the expected calibration error in percent, for each image whether it was right, as
        a text of 0 and 1 in the order of the images, and the keys of images that could not be read; None where the
        classifier cannot tell these classes apart.

    Raises:
        ValueError: no image could be read.
    """
    names = list(evaluation.data.classes)
    if not getattr(classifier, "can_classify", lambda names: True)(names):
        return None
    classifier.eval()
    samples = evaluation.data.splits[evaluation.split][accelerator.process_index :: accelerator.num_processes]
    loader = batches(evaluation.data, samples, image_processor, shifted=evaluation.shift, workers=workers, kept=seen)
    places, scores, told, unreadable, embedded, rest = [], [], [], [], [], iter(samples)
    place = accelerator.process_index
    for pixels, labels, broken in tqdm(
        loader, desc=evaluation.name, leave=False, disable=not accelerator.is_main_process
    ):
        unreadable += broken
        keys = [sample.key for sample in islice(rest, len(labels) + len(broken)) if sample.key not in broken]
        if pixels is not None:
            pixels = pixels.to(accelerator.device)
            with accelerator.autocast():
                if kept is not None:
                    embedded.append((*both_images(classifier, pixels), labels))
                    logits = combined_logits(classifier, *embedded[-1][:2])
                elif known is not None and takes_frozen(classifier):
                    images = [(evaluation.data.name, evaluation.shift, key) for key in keys]
                    logits = combined_logits(classifier, *known.both(classifier, images, pixels))
                else:
                    logits = classifier(pixel_values=pixels).logits
            scores += logits.float().softmax(dim=1).tolist()
            told += labels.tolist()
            places += range(place, place + accelerator.num_processes * len(labels), accelerator.num_processes)
            place = places[-1] + accelerator.num_processes
    unreadable = sorted(gather_object(unreadable))
    found = sorted(gather_object(list(zip(places, scores, told, strict=True))))
    if not found:
        part = {"val": "validation"}.get(evaluation.split, evaluation.split)
        raise ValueError(f"{evaluation.data.name}: none of the {len(unreadable)} {part} images can be read.")
    if kept is not None:
        kept.add(evaluation.name, classifier, embedded)
    probabilities, labels = torch.tensor([entry[1] for entry in found]), torch.tensor([entry[2] for entry in found])
    return outcome(probabilities, labels, unreadable)


def outcome(probabilities: torch.Tensor, labels: torch.Tensor, unreadable: list[str]) -> dict[str, Any]:
    """What `measure` returns, of the scores (N, C) and labels (N,) of images."""
    correct = (probabilities.argmax(dim=1) == labels).int()
    right, total = int(correct.sum()), len(labels)
    return {
        "accuracy": 100 * right / total,
        "right": right,
        "total": total,
        "ece": calibration_error(probabilities, labels),
        "correct": "".join(map(str, correct.tolist())),
        "unreadable": unreadable,
    }


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
