"""Training with Accelerate: one process or many, killed and resumed, always the same images in the same order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from evaluation import batches
from methods import Method, trainable
from protocols import Plan
from torch.utils.data import DataLoader
from tqdm import tqdm
from train_images import CachedImages, TrainImages
from transformers import get_cosine_schedule_with_warmup
from transforms import TrainTransform

from sep_peft.training.fit import make_optimizer


CHECKPOINT = "checkpoint.pt"


def fit(
    classifier,
    method: Method,
    plan: Plan,
    image_processor,
    accelerator: Accelerator,
    folder: Path,
    seed: int,
    workers: int,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Train the classifier in place, or go on where a checkpoint in `folder` stands.

    Args:
        cache: folder for the trunk of images, where the recipe has `cached_views`; None: in memory.

    Returns:
        a dict per epoch: loss, its parts, accuracy on the training images, learning rate.
    """
    recipe = method.recipe
    classifier.to(accelerator.device)
    start_prototypes(classifier, plan, image_processor)
    parameters = trainable(classifier)
    optimizer = make_optimizer(parameters, recipe, recipe.weight_decay)
    images = TrainImages(plan, TrainTransform(image_processor, recipe.smallest_crop), seed)
    if recipe.cached_views:
        images = CachedImages(images, recipe.cached_views, classifier.model, cache)
    steps = -(-len(images) // recipe.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_epochs * steps, recipe.epochs * steps)
    log = resume(folder / CHECKPOINT, parameters, optimizer, schedule)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    model.train()
    bar = tqdm(
        total=recipe.epochs * steps, initial=len(log) * steps, leave=False, disable=not accelerator.is_main_process
    )
    for epoch in range(len(log), recipe.epochs):
        set_seed(seed * 1000 + epoch)  # dropout, where a method has it
        images.epoch = epoch
        log.append(one_epoch(model, optimizer, schedule, images, recipe.batch_size, accelerator, seed, workers, bar))
        if accelerator.is_main_process:
            save(folder / CHECKPOINT, parameters, optimizer, schedule, log)
        accelerator.wait_for_everyone()
    bar.close()
    # later calls are evaluations, with other classes, outside of DistributedDataParallel
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return log


def one_epoch(model, optimizer, schedule, images, batch_size, accelerator, seed, workers, bar) -> dict[str, Any]:
    """One pass over the images; a global batch is shared out among the processes.

    Each process weighs its mean loss by its share of the batch, so that the gradient is that of the whole batch.
    """
    shares, sizes = share_out(len(images), batch_size, accelerator, seed * 1000 + images.epoch)
    loader = DataLoader(images, batch_sampler=shares, num_workers=workers)
    sums = torch.zeros(2, device=accelerator.device)  # loss, right
    for batch, (own, whole) in zip(loader, sizes, strict=True):
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        output, labels = model(**batch), batch["labels"]
        share = own / whole
        accelerator.backward(output.loss * share * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right = (output.logits.detach()[:own].argmax(dim=1) == labels[:own]).sum()
        sums += torch.stack([output.loss.detach() * own, right])
        bar.update()
        bar.set_postfix(epoch=images.epoch + 1, loss=f"{output.loss.item():.3f}", acc=f"{right / max(own, 1):.0%}")
    loss, right = (accelerator.reduce(sums, "sum") / len(images)).tolist()
    return {"epoch": images.epoch + 1, "loss": loss, "accuracy": 100 * right, "lr": schedule.get_last_lr()[0]}


def share_out(count: int, batch_size: int, accelerator: Accelerator, seed: int):
    """Indices of this process for each batch of a shuffled epoch, and (images of its own, of the whole batch).

    A process without an image in the last batch gets one that counts 0, because all processes must take part.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    shares, sizes = [], []
    for start in range(0, count, batch_size):
        batch = order[start : start + batch_size]
        own = batch[accelerator.process_index :: accelerator.num_processes]
        shares.append(own or batch[:1])
        sizes.append((len(own), len(batch)))
    return shares, sizes


def start_prototypes(classifier, plan: Plan, image_processor) -> None:
    """Class means of the frozen embeddings of the training images, where the loss has prototypes."""
    if getattr(classifier, "prototypes", None) is None:
        return
    loader = batches(plan.data, plan.images.train, image_processor)
    classifier.reset_prototypes(
        {"pixel_values": pixels, "labels": labels} for pixels, labels, _ in loader if pixels is not None
    )


def save(path: Path, parameters, optimizer, schedule, log) -> None:
    """Written to a temporary name and renamed, so a kill leaves the checkpoint before."""
    state = {
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "log": log,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def resume(path: Path, parameters, optimizer, schedule) -> list[dict[str, Any]]:
    """Take up a checkpoint, if there is one; returns the log of the epochs that are done."""
    if not path.exists():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, parameter in parameters.items():
        parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["log"]
