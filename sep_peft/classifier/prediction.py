"""From images to labels with probabilities: what `SEPClassifier.predict` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.image_processing_base import ImageProcessingMixin

from .classes import TaskClasses
from .images import read_image
from .logits import logits_of


if TYPE_CHECKING:
    from .classifier import SEPClassifier


@torch.no_grad()
def predict(
    classifier: SEPClassifier, images: Any, top_k: int | None, batch_size: int, task: str | Sequence[str] | None
) -> list:
    """See `SEPClassifier.predict`."""
    single = not isinstance(images, (list, tuple))
    images = [images] if single else images
    tasks = None if task is None else classifier.tasks.of_rows(task, len(images))
    used = [classifier.classes] if tasks is None else [classifier.tasks[name].classes for name in tasks]
    _check_top_k(top_k, used)
    processor = processor_part(classifier.processor, "image_processor", ImageProcessingMixin, "to read images")
    images = [read_image(image) for image in images]
    results: list = [None] * len(images)
    with evaluating(classifier):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            batch = processor(images[rows], return_tensors="pt").to(classifier.device)
            for own, logits, classes in _logits(classifier, batch, None if tasks is None else tasks[rows]):
                for row, ranking in zip(own, _rank(logits, classes, top_k), strict=True):
                    results[start + row] = ranking
    return results[0] if single else results


def processor_part(processor, part: str, kind: type, purpose: str):
    """The processor's part, or the processor where it is that part itself.

    Raises:
        ValueError: there is none.
    """
    found = getattr(processor, part, processor)
    if not isinstance(found, kind):
        raise ValueError(
            f"This classifier has no processor {purpose}. Pass processor=AutoProcessor.from_pretrained(...)."
        )
    return found


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the mode of before after it."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()


def _logits(
    classifier: SEPClassifier, batch: dict, tasks: list[str] | None
) -> Iterator[tuple[Sequence[int], torch.Tensor, TaskClasses]]:
    """Rows of the batch, their logits and the classes these belong to."""
    if tasks is None:
        logits = classifier(**batch).logits
        yield range(len(logits)), logits, classifier.classes
    else:
        score = partial(logits_of, classifier.vision_tower)
        yield from classifier.tasks.logits(tasks, batch, classifier.image_embeds, score)


def _rank(logits: torch.Tensor, classes: TaskClasses, top_k: int | None) -> list[list[dict]]:
    """(B, C) -> for each row its best classes with their probabilities."""
    scores, indices = logits.softmax(dim=-1).topk(len(classes) if top_k is None else top_k, dim=-1)
    return [
        [{"label": classes.names[i], "score": score} for score, i in zip(row_scores, row_indices, strict=True)]
        for row_scores, row_indices in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


def _check_top_k(top_k: int | None, used: list[TaskClasses]) -> None:
    count = min(map(len, used), default=0)
    if top_k is not None and used and not 1 <= top_k <= count:
        raise ValueError(f"top_k must be between 1 and {count}, the number of classes, but got {top_k}.")
