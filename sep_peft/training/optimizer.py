"""What trains a classifier by a recipe: its parameters, AdamW and the learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from ..method.base_recipe import BaseRecipe


def make_optimizer(model: nn.Module | Mapping[str, nn.Parameter], recipe: BaseRecipe) -> torch.optim.AdamW:
    """AdamW of a recipe; the class prototypes are a group of their own, where they have a learning rate of their own.

    Args:
        model: a classifier, or name -> parameter of all that it trains; its prototypes are called "prototypes".
        recipe: gives the learning rates, `adam_epsilon` and `weight_decay`.
    """
    parameters = trainable(model) if isinstance(model, nn.Module) else model
    groups: list[dict[str, Any]] = [{"params": [p for name, p in parameters.items() if name != "prototypes"]}]
    if "prototypes" in parameters:
        groups.append({"params": [parameters["prototypes"]]})
        if (own := recipe.own_learning_rates.get("prototypes")) is not None:
            groups[1]["lr"] = own
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, eps=recipe.adam_epsilon, weight_decay=recipe.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: BaseRecipe, steps_per_epoch: int) -> LRScheduler:
    """Learning rates of a recipe: they rise from 0 during `warmup_epochs` and fall to 0 along a cosine.

    Args:
        optimizer: whose learning rates are the highest.
        recipe: gives the length.
        steps_per_epoch: batches of an epoch, the length of its data loader.
    """
    steps = count_steps(recipe, steps_per_epoch)
    return get_cosine_schedule_with_warmup(optimizer, recipe.warmup_epochs * steps_per_epoch, steps)


def count_steps(recipe: BaseRecipe, steps_per_epoch: int) -> int:
    """Steps that a recipe takes."""
    steps = recipe.epochs * steps_per_epoch
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def trained_bytes(model: nn.Module) -> int:
    """Memory of everything that is trained, in bytes."""
    return sum(p.numel() * p.element_size() for p in trainable(model).values())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
