"""Images that are nearly the same, by their embeddings: how similar such are, and which of many they are.

Shapes: N and M images, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import torch
from PIL import Image

from .images import read_image


#: Images whose copies say how similar two copies are.
COPIES = 64
#: Size of such a copy, of both sides, and its quality as JPEG.
COPY_SCALE, COPY_QUALITY = 0.7, 50
#: Share of copies that are less similar to their images than what counts as a duplicate.
MISSED_SHARE = 0.05
#: Cosines that are computed at a time.
BLOCK = 2**24
#: By how much rounding may lower the cosine of an image and itself.
ROUNDING = 1e-6


class Group(NamedTuple):
    """Images of which each is nearly the same as another one of them.

    Args:
        places: their indices, ascending.
        similarities: for each the cosine to the most similar other image, which is in the group.
    """

    places: list[int]
    similarities: list[float]


def copy_similarity(images: Sequence[Any], embeds: torch.Tensor, embed: Callable[[list[Any]], torch.Tensor]) -> float:
    """The cosine that two embeddings of nearly the same image have, which depends on the encoder, so it is measured.

    It is what the embeddings of images and of copies of these, saved at 0.7 of the size and with JPEG's quality 50,
    reach in 95 of 100 cases.

    Args:
        images: N of them as `read_image` takes them; the copies are of 64 to 127 of these, evenly spread.
        embeds: theirs, (N, E), of unit length.
        embed: images -> embeddings as those.

    Raises:
        ValueError: an image cannot be read.
    """
    some = list(range(0, len(images), max(1, len(images) // COPIES)))
    copies = embed([worse_copy(read_image(images[index])) for index in some])
    return (embeds[some] * copies).sum(dim=1).quantile(MISSED_SHARE).item()


def worse_copy(image: Image.Image) -> Image.Image:
    """An image as it is after it was made smaller and saved as JPEG."""
    width, height = (max(1, round(COPY_SCALE * side)) for side in image.size)
    file = BytesIO()
    image.resize((width, height)).save(file, "JPEG", quality=COPY_QUALITY)
    return Image.open(file).convert("RGB")


def nearest(embeds: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of N embeddings (N, E) the largest cosine to M others (M, E), (N,), and the index of that one, (N,)."""
    rows = max(1, BLOCK // len(others))
    found = [(part.to(others) @ others.T).max(dim=1) for part in embeds.split(rows)]  # (rows, E) @ (E, M)
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def groups(embeds: torch.Tensor, least: float, progress: Callable[[Iterable], Iterable] = iter) -> list[Group]:
    """Groups of images that are nearly the same, those with the most similar images first.

    Two images are in one group where a chain of images leads from one to the other, each nearly the same as the next.
    All N (N - 1) / 2 cosines are computed, a block of them at a time.

    Args:
        embeds: (N, E), of unit length.
        least: cosine from which on two images count as nearly the same, above 0.
        progress: wraps what is iterated over.
    """
    count, labels, best = len(embeds), torch.arange(len(embeds)), torch.zeros(len(embeds))
    rows = max(1, BLOCK // max(1, count))
    for start in progress(range(0, count, rows)):
        # those above the diagonal: each pair once, and no image with itself
        block = (embeds[start : start + rows] @ embeds[start:].T).float().triu_(1)  # (rows, count - start)
        end = start + len(block)
        best[start:end] = torch.maximum(best[start:end], block.amax(dim=1))
        best[start:] = torch.maximum(best[start:], block.amax(dim=0))
        alike = block >= least - ROUNDING
        for row in alike.any(dim=1).nonzero()[:, 0].tolist():
            places = torch.cat([torch.tensor([start + row]), start + alike[row].nonzero()[:, 0]])
            merged = labels[places].unique()
            if len(merged) > 1:
                labels[torch.isin(labels, merged)] = merged[0]
    return _grouped(labels, best)


def _grouped(labels: torch.Tensor, best: torch.Tensor) -> list[Group]:
    """
    Args:
        labels: (N,), the same for images of one group.
        best: (N,), the largest cosine of each to another.
    """
    members: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(place)
    found = [Group(places, best[places].tolist()) for places in members.values() if len(places) > 1]
    return sorted(found, key=lambda group: -max(group.similarities))
