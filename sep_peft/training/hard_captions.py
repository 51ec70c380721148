"""Captions whose image is found late: what an adapter that was trained on pairs still takes for something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .pairs import Pair
from .recall import owners_of, places


#: Captions that are told of an evaluation.
HARDEST = 12


class HardCaption(NamedTuple):
    """A caption and the images that were found by it.

    Args:
        caption: the text.
        image: that it belongs to; of several the one that is found first.
        place: of that image among all, from 1; images that are as similar come before it.
        first: the image that is found first.
    """

    caption: str
    image: Any
    place: int
    first: Any


def hardest_captions(
    images: torch.Tensor,
    texts: torch.Tensor,
    pairs: Sequence[Pair],
    numbers: Sequence[Sequence[int]],
    most: int = HARDEST,
) -> tuple[HardCaption, ...]:
    """Captions by which another image is found first, those whose own is found last first.

    Args:
        images: (N, E), embeddings of unit length.
        texts: (M, E), of distinct texts.
        pairs: N images with captions.
        numbers: for each image those of its captions among the texts.
        most: how many captions.
    """
    words = {
        number: text
        for pair, own in zip(pairs, numbers, strict=True)
        for number, text in zip(own, pair.captions, strict=True)
    }
    owners = owners_of(numbers)
    known = list(owners)
    found = torch.cat(list(places(texts[known], images, list(owners.values()))))  # (T,), from 0
    hard = []
    for index in found.argsort(descending=True, stable=True)[:most].tolist():
        if not found[index]:
            break
        number = known[index]
        cosines = images @ texts[number]  # (N,)
        own = max(owners[number], key=lambda image: cosines[image].item())
        others = cosines.clone()
        others[owners[number]] = -torch.inf
        hard.append(
            HardCaption(words[number], pairs[own].image, int(found[index]) + 1, pairs[int(others.argmax())].image)
        )
    return tuple(hard)
