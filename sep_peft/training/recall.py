"""Recall of images by captions and of captions by images: how often what belongs together is found first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


#: How many of the best count, as image-text retrieval is usually told.
RANKS = (1, 5, 10)
#: Similarities that are in memory at a time.
SIMILARITIES = 2**24


@dataclass(frozen=True)
class Recall:
    """Shares in percent, of those that are found among the k best.

    Args:
        image_to_text: k -> share of the images of which a caption is among the k most similar captions.
        text_to_image: k -> share of the captions of which an image is among the k most similar images.
    """

    image_to_text: Mapping[int, float]
    text_to_image: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Of all shares in both directions, in percent."""
        shares = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(shares) / len(shares)

    def named(self) -> dict[str, float]:
        """Such as "image_to_text_5" -> 61.3."""
        return {
            f"{way}_{rank}": share
            for way in ("image_to_text", "text_to_image")
            for rank, share in getattr(self, way).items()
        }

    def __str__(self) -> str:
        """Such as "image to text 10.1 30.2 41.0, text to image 9.8 28.8 40.3 %"."""
        ways = [" ".join(f"{share:.1f}" for share in way.values()) for way in (self.image_to_text, self.text_to_image)]
        return f"image to text {ways[0]}, text to image {ways[1]} %"


def measure_recall(
    images: torch.Tensor, texts: torch.Tensor, captions: Sequence[Sequence[int]], ranks: Sequence[int] = RANKS
) -> Recall:
    """
    Args:
        images: (N, E), embeddings of unit length.
        texts: (M, E), of distinct texts.
        captions: for each image the numbers of its captions among the texts, one or more. A text may belong to several
            images; each caption of each image is looked up by itself.
        ranks: k of the shares.

    Returns:
        what was found. An image counts as found by any of its captions, a caption by any image that has it. Where
        something else is as similar, that comes first: embeddings that are all the same find nothing.
    """
    owners = owners_of(captions)
    of_images = torch.cat(list(places(images, texts, captions)))  # (N,)
    known = list(owners)
    of_texts = torch.cat(list(places(texts[known], images, list(owners.values()))))  # one for each text
    weights = torch.tensor([len(owners[number]) for number in known], dtype=torch.float64)  # of each its images

    def shares(found: torch.Tensor, weights: torch.Tensor) -> dict[int, float]:
        return {rank: 100 * (weights[found < rank].sum() / weights.sum()).item() for rank in ranks}

    return Recall(shares(of_images, torch.ones(len(of_images), dtype=torch.float64)), shares(of_texts, weights))


def owners_of(captions: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Number of each text -> the images that have it as a caption, of the numbers of each image's captions."""
    owners: dict[int, list[int]] = {}
    for image, numbers in enumerate(captions):
        for number in dict.fromkeys(numbers):
            owners.setdefault(number, []).append(image)
    return owners


def places(queries: torch.Tensor, found: torch.Tensor, right: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Place of the best right answer to each query among the answers, from 0, wrong ones that are as similar first.

    Args:
        queries: (Q, E).
        found: (F, E), the answers.
        right: for each query the numbers of its right answers.
    """
    size = max(1, SIMILARITIES // len(found))
    for start in range(0, len(queries), size):
        similarities = queries[start : start + size] @ found.T  # (q, F)
        mine = torch.zeros_like(similarities, dtype=torch.bool)
        for row, answers in enumerate(right[start : start + size]):
            mine[row, list(answers)] = True
        best = similarities.masked_fill(~mine, float("-inf")).amax(dim=1, keepdim=True)  # (q, 1)
        yield (~mine & (similarities >= best)).sum(dim=1)
