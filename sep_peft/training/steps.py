"""What a step computes of its batch: a loss, gradients, and how many images were right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import nn


class Share(NamedTuple):
    """What a process has of a batch that is shared out, as `share_out` does it.

    Args:
        own: images of this process that count; 0 where its batch holds one that does not.
        whole: images of all processes.
    """

    own: int
    whole: int


class StepOutcome(NamedTuple):
    """What a step found, without gradients.

    Args:
        loss: (), of the whole batch, or this process' part of it: the mean over all processes, each weighed by its own
            images, is that of the whole batch.
        right: (), how many of the process' own images were right.
    """

    loss: torch.Tensor
    right: torch.Tensor


class Step(Protocol):
    """Computes the gradients of a batch; DistributedDataParallel takes their mean over the processes."""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], share: Share, accelerator: Accelerator
    ) -> StepOutcome:
        """
        Args:
            model: that trains, as Accelerate has prepared it.
            batch: of this process, on its device.
            share: how much of the batch is its own.
            accelerator: whose `backward` is to be called, once.
        """
        ...


def labelled_step(
    model: nn.Module, batch: Mapping[str, torch.Tensor], share: Share, accelerator: Accelerator
) -> StepOutcome:
    """A `Step` of a model that gives `loss`, a mean over the batch, and `logits` (B, C) for a batch with `labels`.

    Each process weighs its mean by its share, so that the gradient is that of the whole batch.
    """
    output, labels = model(**batch), batch["labels"]
    accelerator.backward(output.loss * (share.own / share.whole * accelerator.num_processes))
    right = is_right(output.logits.detach()[: share.own], labels[: share.own]).sum()
    return StepOutcome(output.loss.detach(), right)


def is_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the best class of each image is its own, or one of those that it has, (B,).

    Args:
        logits: (B, C).
        labels: (B,) class indices, or (B, C) with 1 for those of an image.
    """
    best = logits.argmax(dim=1)
    return labels.gather(1, best[:, None])[:, 0] == 1 if labels.ndim == 2 else best == labels
