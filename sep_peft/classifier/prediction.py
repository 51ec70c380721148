"""From pixels to logits and ranked labels, for samples of one task or of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..method.mix import mix_embeddings, unit, wide
from ..tuner.current import Current, chosen_adapters
from ..tuner.messages import shown
from ..tuner.tower import SEPTower
from .answers import Answers
from .class_encoder import ClassEncoder
from .classes import TaskClasses
from .logits import ClassWeights, class_logits


#: A list that takes the frozen embeddings (B, E) of each batch that this call predicts, on the CPU; None: nothing does.
seen_embeds = Current("sep_peft_seen_embeds")


class Task(NamedTuple):
    """What a sample is classified by.

    Args:
        adapter: name of an adapter, or "__base__" for none; None: the active one.
        encoder: of the classes.
    """

    adapter: str | None
    encoder: ClassEncoder

    @property
    def classes(self) -> TaskClasses:
        return self.encoder.classes


def image_embeds(tower: SEPTower, inputs: Mapping[str, Any], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """SEP's and the frozen image embeddings, each (B, E), of unit length, in fp32 or wider.

    Args:
        tower: of the images.
        inputs: what the tower takes, such as `pixel_values` (B, channels, height, width), and where they are known
            `frozen_embeds` (B, E), as `SEPTower.embed_frozen` gives them: only the prompted pass is run then.
        options: of `SEPTower.embed`, where both passes are run.
    """
    inputs = dict(inputs)
    frozen = inputs.pop("frozen_embeds", None)
    if frozen is None:
        prompted, frozen = tower.embed(**inputs, **options)
    else:
        prompted = tower.embed_prompted(**inputs)
    prompted, frozen = wide(prompted), wide(frozen)
    return mix_embeddings(prompted, frozen, tower.frozen_weight_beside(frozen)), unit(frozen)


def image_embeds_by(tower: SEPTower, inputs: Mapping[str, Any], adapters: Sequence[str]) -> list[torch.Tensor]:
    """SEP's image embeddings of several adapters, (B, E) for each, of unit length, in fp32 or wider.

    Args:
        tower: of the images.
        inputs: what the tower takes; its frozen branch is computed once.
        adapters: names of adapters, or "__base__".
    """
    found, frozen = tower.embed_by(adapters, **inputs)
    embeds = []
    for adapter, prompted in zip(adapters, found, strict=True):
        with chosen_adapters.set(adapter):
            embeds.append(mix_embeddings(wide(prompted), wide(frozen), tower.frozen_weight))
    return embeds


def image_logits(tower: SEPTower, inputs: Mapping[str, torch.Tensor], weights: ClassWeights, **options) -> torch.Tensor:
    """Logits (B, C) of images among the classes of `weights`; see `image_embeds`."""
    return class_logits(tower, *image_embeds(tower, inputs, **options), weights)


def predict_batch(
    tower: SEPTower, inputs: Mapping[str, torch.Tensor], tasks: Sequence[Task], answers: Answers | None = None
) -> list[list[dict]]:
    """Classify a batch, in evaluation; all samples are embedded together.

    Args:
        tower: of the images.
        inputs: what the tower takes, tensors (B, ...).
        tasks: one for each sample.
        answers: what is asked for; None: all classes, best first.

    Returns:
        for each sample its classes with their probabilities; where it may have several, those that it has.

    Raises:
        FloatingPointError, ValueError: as `Answers.of`.
    """
    answers = answers or Answers()
    predictions: list = [None] * len(tasks)
    adapters = tuple(task.adapter for task in tasks)
    with chosen_adapters.set(adapters if len(set(adapters)) > 1 else adapters[0]):
        embeds = image_embeds(tower, inputs)
    if (seen := seen_embeds.get()) is not None:
        seen.append(embeds[1].cpu())
    for task in dict.fromkeys(tasks):
        own = [index for index, other in enumerate(tasks) if other == task]
        with chosen_adapters.set(task.adapter):
            encoder = task.encoder
            logits = class_logits(tower, embeds[0][own], embeds[1][own], encoder.weights(training=False))
            # zero-shot has no temperature, and a scale of its own
            rankings = answers.of(logits, task.classes, encoder.calibration, encoder.label_scale)
        for index, ranking in zip(own, rankings, strict=True):
            predictions[index] = ranking
    return predictions


def check_answers(answers: Answers, tasks: Sequence[Task]) -> None:
    """
    Raises:
        TypeError: `top_k` is no whole number.
        ValueError: `top_k` is below 1 or above the number of classes of a task, or the classes of a task have no
            calibration for what is asked.
    """
    for task in dict.fromkeys(tasks):
        encoder = task.encoder
        with chosen_adapters.set(task.adapter):  # zero-shot has no calibration, whatever its classes have
            answers.check(task.classes, encoder.label_scale if task.classes.multi_label else encoder.calibration)
    top_k = answers.top_k
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool)):
        raise TypeError(f"top_k must be None or a whole number, but got {shown(top_k)}.")
    count = min((len(task.classes) for task in tasks), default=0)
    if top_k is not None and tasks and not 1 <= top_k <= count:
        raise ValueError(f"top_k must be between 1 and {count}, the number of classes, but got {top_k}.")
