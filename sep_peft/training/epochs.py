"""Going through the images once: in one process or many, always the same batches and the same steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from ..classifier.on_the_way import send
from ..method.base_recipe import BaseRecipe
from .data import EpochDataset, epoch_order
from .optimizer import count_steps, make_optimizer, make_schedule, trainable
from .progress import Progress
from .steps import Share, Step, labelled_step


#: A batch of this process, and how much of the whole it is.
Batch = tuple[dict[str, torch.Tensor], Share]


@runtime_checkable
class HasStepsState(Protocol):
    """A classifier whose steps need something of those before them beside parameters, as `SEPClassifier` does."""

    def steps_state(self) -> Mapping[str, torch.Tensor]: ...

    def take_steps_state(self, state: Mapping[str, torch.Tensor], /) -> None: ...


class Epochs:
    """What is trained, by what, and on which images; goes through them an epoch at a time.

    Args:
        classifier, images, recipe, accelerator, workers, step: as for `train`.

    Attributes:
        waited: seconds in which steps have waited for images.
    """

    def __init__(
        self,
        classifier: nn.Module,
        images: EpochDataset,
        recipe: BaseRecipe,
        accelerator: Accelerator,
        workers: int,
        step: Step = labelled_step,
    ):
        self.classifier, self.images, self.recipe = classifier, images, recipe
        self.accelerator, self.workers, self.step = accelerator, workers, step
        self.waited = 0.0
        self.device = next(classifier.parameters()).device
        if accelerator.device_placement or accelerator.num_processes > 1:
            self.device = accelerator.device
        classifier.to(self.device)
        self.parameters = trainable(classifier)
        self.optimizer = make_optimizer(self.parameters, recipe)
        self.per_epoch = -(-len(images) // recipe.batch_size)
        self.steps = count_steps(recipe, self.per_epoch)
        self.schedule = make_schedule(self.optimizer, recipe, self.per_epoch)
        self.parts: dict[str, Any] = {"schedule": self.schedule}
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler

    def prepare(self) -> None:
        self.model, self.prepared = self.accelerator.prepare(self.classifier, self.optimizer)
        self.model.train()

    def release(self) -> None:
        """Later calls are evaluations, with other classes, outside of DistributedDataParallel."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    @torch.no_grad()
    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def take(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def steps_state(self) -> dict[str, torch.Tensor]:
        """A copy of what the next step needs beside parameters."""
        state = self.classifier.steps_state() if isinstance(self.classifier, HasStepsState) else {}
        return {name: value.clone() for name, value in state.items()}

    def take_steps_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `steps_state` gave, or begin anew from an empty one."""
        if isinstance(self.classifier, HasStepsState):
            self.classifier.take_steps_state(state)

    def _batches(self, steps: int) -> Iterator[Batch]:
        """For each step of the present epoch."""
        images, recipe, accelerator = self.images, self.recipe, self.accelerator
        order = epoch_order(len(images), recipe.seed, images.epoch)
        shares, sizes = share_out(order, recipe.batch_size, accelerator.process_index, accelerator.num_processes)
        loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=shares[:steps],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",  # so that copying a batch does not hold up the step before
        )
        yield from zip(loader, sizes[:steps], strict=True)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Adds the time until each batch is there to `waited`."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def agree(self, reason: str | None) -> str | None:
        """What the main process says, in every process."""
        return broadcast_object_list([reason])[0]

    def epoch(self, epoch: int, progress: Progress) -> dict[str, Any]:
        """One pass over the images. Returns the epoch's row of the history."""
        set_seed(self.recipe.seed + epoch)  # dropout, where there is any
        self.images.set_epoch(epoch)
        sums, seen, own_seen = torch.zeros(2, device=self.device), 0, 0  # of the loss and of right answers
        steps = min(self.per_epoch, self.steps - epoch * self.per_epoch)
        for batch, share in self._timed(self._batches(steps)):
            batch = {key: send(value, self.device) for key, value in batch.items()}
            loss, right = self.step(self.model, batch, share, self.accelerator)
            self.prepared.step()
            self.prepared.zero_grad()
            self.schedule.step()
            sums += torch.stack([loss * share.own, right])
            seen, own_seen = seen + share.whole, own_seen + share.own
            progress.step(sums[0], own_seen)
        whole_sums: Any = self.accelerator.reduce(sums, "sum")
        loss, right = (whole_sums / seen).tolist()
        return {"epoch": epoch + 1, "loss": loss, "accuracy": 100 * right, "lr": self.schedule.get_last_lr()[0]}


def share_out(order: list[int], batch_size: int, process: int, processes: int) -> tuple[list[list[int]], list[Share]]:
    """Indices of a process for each batch of an epoch, and how much of it these are.

    Process p of P has every P-th image of a batch, from its p-th on.

    A process without an image in the last batch gets one that counts 0, because all processes must take part.
    """
    shares, sizes = [], []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        own = batch[process::processes]
        shares.append(own or batch[:1])
        sizes.append(Share(len(own), len(batch)))
    return shares, sizes
