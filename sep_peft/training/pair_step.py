"""`PairStep`: the step of a training on images with captions, which compares the embeddings of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from ..classifier.logits import scaled_cosines
from ..method.contrastive import own_texts, sigmoid_loss, softmax_loss
from ..method.pairs_recipe import PairsRecipe
from ..tuner.tower import SEPTower
from .pair_images import NEGATIVE_NUMBER, OWN_NUMBERS, TEXT_NUMBER
from .pair_model import PairEmbeddings
from .steps import Share, StepOutcome


class PairStep:
    """Computes the gradients of a batch of pairs, which are those of one process that had the whole batch::

        L = contrast(v, t) + w_t mean_i(1 - cos(t_i, t0_i)) + w_v mean_i(1 - cos(v_i, v0_i))

    Every process compares all images with all captions of the step; gradients go into its own alone.

    Args:
        vision: the tower that sees; its architecture names the scale and the bias of the model.
        recipe: gives the weights of the consistency with the frozen model, and the loss.
    """

    def __init__(self, vision: SEPTower, recipe: PairsRecipe):
        self._vision, self._recipe = vision, recipe
        self._contrast = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}[loss_of(vision, recipe)]

    def __call__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], share: Share, accelerator: Accelerator
    ) -> StepOutcome:
        batch = _as_long_as_others(batch, share, accelerator)
        embeds: PairEmbeddings = model(**batch)
        logits, own = self._compared(embeds, batch, share, accelerator)
        contrast = self._contrast(logits, own)
        drift = self._drift(embeds, share)
        # a process without an image of its own takes part all the same: others wait for its gradients
        loss = contrast + drift / share.whole + 0.0 * (embeds.image.sum() + embeds.text.sum())
        accelerator.backward(loss * accelerator.num_processes)
        with torch.no_grad():
            mine = logits[accelerator.process_index :: accelerator.num_processes]  # (own, M)
            best = own[accelerator.process_index :: accelerator.num_processes].gather(1, mine.argmax(1, keepdim=True))
            return StepOutcome(contrast.detach() + drift.detach() / max(share.own, 1), best.sum())

    def _compared(
        self, embeds: PairEmbeddings, batch: Mapping[str, torch.Tensor], share: Share, accelerator: Accelerator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, M) of all images and texts, and which texts are the image's own, (N, M)."""

        def whole(rows: torch.Tensor) -> torch.Tensor:
            return of_all_processes(rows, share, accelerator)

        texts, numbers = [whole(embeds.text)], [whole(batch[TEXT_NUMBER])]
        if embeds.negative is not None:
            negatives, found = whole(embeds.negative), whole(batch[NEGATIVE_NUMBER])
            texts, numbers = [*texts, negatives[found >= 0]], [*numbers, found[found >= 0]]
        cosines = whole(embeds.image) @ torch.cat(texts).T
        own = own_texts(whole(batch[OWN_NUMBERS]), torch.cat(numbers))
        return scaled_cosines(self._vision, cosines), own

    def _drift(self, embeds: PairEmbeddings, share: Share) -> torch.Tensor:
        """The consistency terms, summed over this process' own images, ()."""
        text = 1 - (embeds.text * embeds.frozen_text).sum(dim=1)[: share.own]
        vision = 1 - (embeds.image * embeds.frozen_image).sum(dim=1)[: share.own]
        return self._recipe.text_weight * text.sum() + self._recipe.vision_weight * vision.sum()


def _as_long_as_others(
    batch: Mapping[str, torch.Tensor], share: Share, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """A batch with its last row repeated, which does not count, until it is as long as the longest of all processes.

    Each process then runs the model for as many chunks, as it must where they hold its layers together.
    """
    most = -(-share.whole // accelerator.num_processes)

    def longer(rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) >= most else torch.cat([rows, rows[-1:].expand(most - len(rows), *rows.shape[1:])])

    return {name: longer(rows) for name, rows in batch.items()}


def loss_of(vision: SEPTower, recipe: PairsRecipe) -> str:
    """Which loss a training has: that of the recipe, else the sigmoid loss for models with a bias for logits."""
    return recipe.loss or ("softmax" if vision.architecture.logit_bias is None else "sigmoid")


def of_all_processes(rows: torch.Tensor, share: Share, accelerator: Accelerator) -> torch.Tensor:
    """The rows of a batch, in the order in which one process would have them, from all processes.

    Args:
        rows: (B, ...), of this process, of which the first `share.own` count.
        share: of the batch, as `share_out` shares it: process p of P has every P-th row from the p-th on.
        accelerator: of the processes.

    Returns:
        (N, ...); gradients go to this process' own rows.
    """
    processes, process, rows = accelerator.num_processes, accelerator.process_index, rows[: share.own]
    if processes == 1:
        return rows
    most = -(-share.whole // processes)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: share.own] = rows.detach()
    stacked = cast(Any, accelerator.gather(padded)).unflatten(0, (processes, most))  # (P most, ...) -> (P, most, ...)
    whole = stacked.transpose(0, 1).flatten(0, 1)[: share.whole]  # (P, most, ...) -> (most P, ...) -> (N, ...)
    places = process + processes * torch.arange(share.own, device=rows.device)
    return whole.index_copy(0, places, rows)
