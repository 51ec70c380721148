"""`PairModel`: embeds images and captions that are to be compared, in the memory of a few of them if need be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..method.mix import mix_embeddings, unit, wide
from ..tuner.model import find_towers
from ..tuner.tower import SEPTower
from .pair_images import NEGATIVE, NUMBERS, TEXT


class PairEmbeddings(NamedTuple):
    """Embeddings (B, E), of unit length, in fp32 or wider.

    Args:
        image, text: SEP's, of images and of their captions.
        frozen_image, frozen_text: of the frozen model.
        negative: SEP's, of a hard negative for each image; None: the batch has none.
    """

    image: torch.Tensor
    frozen_image: torch.Tensor
    text: torch.Tensor
    frozen_text: torch.Tensor
    negative: torch.Tensor | None = None


class PairModel(nn.Module):
    """Embeds a batch of `PairedImages` by both branches of both towers.

    With a `chunk_size` the activations of so many images, or captions, are kept at a time: the backward pass computes
    each chunk again, by torch's activation checkpointing, with the random numbers that it had. Only embeddings are kept
    of the whole batch, so the gradients are those of the whole batch in the memory of a chunk, as in GradCache
    (arXiv 2101.06983).

    Args:
        model: with a SEP adapter on both towers.
        chunk_size: images, and captions, whose activations are kept; None: those of the whole batch.
    """

    def __init__(self, model: nn.Module, chunk_size: int | None = None):
        super().__init__()
        self.model, self.chunk_size = model, chunk_size

    def forward(self, **batch: torch.Tensor) -> PairEmbeddings:
        """
        Args:
            batch: entries of `PairedImages`, stacked.
        """
        towers = find_towers(self.model)
        texts = {prefix: _with_prefix(batch, prefix) for prefix in (TEXT, NEGATIVE)}
        others = {*NUMBERS, *(prefix + name for prefix, inputs in texts.items() for name in inputs)}
        pixels = {name: value for name, value in batch.items() if name not in others}
        image = self._embed(towers["vision"], pixels)
        text = self._embed(towers["text"], texts[TEXT])
        negative = self._embed(towers["text"], texts[NEGATIVE])[0] if texts[NEGATIVE] else None
        return PairEmbeddings(*image, *text, negative)

    def _embed(self, tower: SEPTower, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """SEP's and the frozen embeddings, each (B, E)."""
        count = len(next(iter(inputs.values())))
        size = self.chunk_size or count
        again = count > size and torch.is_grad_enabled()
        found = []
        for start in range(0, count, size):
            rows = slice(start, start + size)
            chunk: dict[str, Any] = {name: value[rows] for name, value in inputs.items()}  # (<= size, ...)
            if tower.spec.inputs == "input_ids":
                chunk = tower.texts.trim(chunk)
            if again:
                frozen = tower.embed_frozen(**chunk)
                embed = partial(checkpoint, tower.embed_prompted, use_reentrant=False)
                found.append((embed(**chunk), frozen))
            else:
                found.append(tower.embed(**chunk))
        prompted, frozen = (wide(torch.cat(parts)) for parts in zip(*found, strict=True))
        return mix_embeddings(prompted, frozen, tower.frozen_weight), unit(frozen)


def _with_prefix(batch: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
