"""The loop, on Accelerate: one process or many, killed and resumed, always the same images in the same order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..method.recipe import Recipe
from .data import EpochDataset, epoch_order


def make_optimizer(model: nn.Module | Mapping[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of a recipe; the class prototypes are a group of their own, where they have a learning rate of their own.

    Args:
        model: a classifier, or name -> parameter of all that it trains; its prototypes are called "prototypes".
        recipe: gives the learning rates, `adam_epsilon` and `weight_decay`.
    """
    parameters = trainable(model) if isinstance(model, nn.Module) else model
    groups: list[dict[str, Any]] = [{"params": [p for name, p in parameters.items() if name != "prototypes"]}]
    if "prototypes" in parameters:
        groups.append({"params": [parameters["prototypes"]]})
        if recipe.prototype_learning_rate is not None:
            groups[1]["lr"] = recipe.prototype_learning_rate
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, eps=recipe.adam_epsilon, weight_decay=recipe.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """Learning rates of a recipe: they rise from 0 during `warmup_epochs` and fall to 0 along a cosine.

    Args:
        optimizer: whose learning rates are the highest.
        recipe: gives the length.
        steps_per_epoch: batches of an epoch, the length of its data loader.
    """
    steps = count_steps(recipe, steps_per_epoch)
    return get_cosine_schedule_with_warmup(optimizer, recipe.warmup_epochs * steps_per_epoch, steps)


def count_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps that a recipe takes."""
    steps = recipe.epochs * steps_per_epoch
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(
    classifier: nn.Module,
    images: EpochDataset,
    recipe: Recipe,
    *,
    accelerator: Accelerator | None = None,
    checkpoint: str | os.PathLike | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train what requires gradients, in place; `fit` does all around it.

    A batch is shared out among the processes and weighed by its images, so that the result is that of one process up to
    rounding, uneven last batches included. The order of the images, their augmentation and dropout follow the recipe's
    seed; torch's, NumPy's and Python's generators are set to it in every epoch.

    Args:
        classifier: takes an entry's tensors and gives `loss`, a mean over the batch, and `logits` (B, C).
        images: to train on.
        recipe: how to train.
        accelerator: for mixed precision and many processes; None: one without options, which leaves the classifier on
            its device where there is one process.
        checkpoint: a file that is written whole after every epoch, and gone on from where it is there: bit for bit, as
            if nothing had happened. None: no file.
        workers: processes that read images.
        quiet: without progress.

    Returns:
        for each epoch its number from 1 as "epoch", mean "loss", "accuracy" on the augmented images in percent, and the
        learning rate after it as "lr".

    Raises:
        ValueError: the checkpoint is of another recipe, of other parameters or of another number of images.
    """
    accelerator = accelerator or Accelerator(device_placement=False)
    device = next(classifier.parameters()).device
    if accelerator.device_placement or accelerator.num_processes > 1:
        device = accelerator.device
    classifier.to(device)
    parameters = trainable(classifier)
    optimizer = make_optimizer(parameters, recipe)
    per_epoch = -(-len(images) // recipe.batch_size)
    steps = count_steps(recipe, per_epoch)
    schedule = make_schedule(optimizer, recipe, per_epoch)
    state = _State(parameters, optimizer, schedule, accelerator, asdict(recipe) | {"images": len(images)})
    entries = [] if checkpoint is None else state.resume(Path(checkpoint))
    model, optimizer = accelerator.prepare(classifier, optimizer)
    model.train()
    bar = tqdm(
        total=steps,
        initial=min(len(entries) * per_epoch, steps),
        leave=False,
        disable=quiet or not accelerator.is_main_process,
    )
    for epoch in range(len(entries), -(-steps // per_epoch)):
        set_seed(recipe.seed + epoch)  # dropout, where there is any
        images.set_epoch(epoch)
        batches = _batches(images, recipe, min(per_epoch, steps - epoch * per_epoch), accelerator, workers)
        bar.set_description(f"epoch {epoch + 1}")
        entry = _one_epoch(model, optimizer, schedule, batches, accelerator, device, bar)
        entries.append({"epoch": epoch + 1, **entry})
        if checkpoint is not None and accelerator.is_main_process:
            state.save(Path(checkpoint), entries)
        accelerator.wait_for_everyone()
    bar.close()
    # later calls are evaluations, with other classes, outside of DistributedDataParallel
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return entries


def _one_epoch(
    model: nn.Module, optimizer, schedule: LRScheduler, batches: Iterator, accelerator, device: torch.device, bar: tqdm
) -> dict[str, Any]:
    """One pass over the images; each process weighs its mean loss by its share of the batch, so that the gradient is
    that of the whole batch."""
    sums, seen = torch.zeros(2, device=device), 0  # of the loss and of right answers
    for batch, own, whole in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        output, labels = model(**batch), batch["labels"]
        # DistributedDataParallel takes the mean over the processes
        accelerator.backward(output.loss * (own / whole * accelerator.num_processes))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right = (output.logits.detach()[:own].argmax(dim=1) == labels[:own]).sum()
        sums += torch.stack([output.loss.detach() * own, right])
        seen += whole
        bar.update()
        bar.set_postfix(loss=f"{output.loss.item():.3f}", accuracy=f"{right.item() / max(own, 1):.0%}")
    loss, right = (accelerator.reduce(sums, "sum") / seen).tolist()
    return {"loss": loss, "accuracy": 100 * right, "lr": schedule.get_last_lr()[0]}


def _batches(
    images: EpochDataset, recipe: Recipe, steps: int, accelerator: Accelerator, workers: int
) -> Iterator[tuple[dict[str, torch.Tensor], int, int]]:
    """For each step a batch of this process, the images of it that count, and the images of all processes."""
    order = epoch_order(len(images), recipe.seed, images.epoch)
    shares, sizes = share_out(order, recipe.batch_size, accelerator.process_index, accelerator.num_processes)
    loader = torch.utils.data.DataLoader(images, batch_sampler=shares[:steps], num_workers=workers)
    for batch, (own, whole) in zip(loader, sizes[:steps], strict=True):
        yield batch, own, whole


def share_out(
    order: list[int], batch_size: int, process: int, processes: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Indices of a process for each batch of an epoch, and (images of its own, of the whole batch).

    A process without an image in the last batch gets one that counts 0, because all processes must take part.
    """
    shares, sizes = [], []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        own = batch[process::processes]
        shares.append(own or batch[:1])
        sizes.append((len(own), len(batch)))
    return shares, sizes


class _State:
    """What a checkpoint holds, beside the epochs that are done."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer, schedule, accelerator, made_for: dict[str, Any]):
        self.parameters, self.made_for = parameters, made_for
        self.parts = {"optimizer": optimizer, "schedule": schedule}
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler

    def save(self, path: Path, entries: list[dict[str, Any]]) -> None:
        """Written to a temporary name and renamed, so a kill leaves the checkpoint before."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"parameters": {name: p.detach() for name, p in self.parameters.items()}}
        temporary = path.with_suffix(".tmp")
        torch.save(state | {"made_for": self.made_for, "log": entries}, temporary)
        os.replace(temporary, path)

    @torch.no_grad()
    def resume(self, path: Path) -> list[dict[str, Any]]:
        """Take up a checkpoint, if there is one; returns the epochs that are done."""
        if not path.exists():
            return []
        state = torch.load(path, map_location="cpu", weights_only=True)
        expected = {**self.made_for, "parameters": {name: p.shape for name, p in self.parameters.items()}}
        found = {**state["made_for"], "parameters": {name: p.shape for name, p in state["parameters"].items()}}
        if differ := sorted(name for name, value in expected.items() if found.get(name) != value):
            raise ValueError(
                f"{path} is a checkpoint of another training ({', '.join(differ)} differ). Go on as it was begun, or "
                "remove the file."
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["log"]
