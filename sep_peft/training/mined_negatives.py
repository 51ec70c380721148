"""Hard negatives that are mined: captions of other images that the frozen model takes for those of an image.

Sources: negatives that are near count most (VSE++, arXiv 1707.05612), as long as they are not nearer than what belongs
to an image, which is often a caption of it that nobody wrote down ("semi-hard", FaceNet, arXiv 1503.03832); looked up
by the model that training starts from (NegCLIP, arXiv 2210.01936).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .pairs import Pair
from .retrieval import PairValidation


#: Similarities of images and texts that are in memory at a time.
SIMILARITIES = 2**24


def with_mined_negatives(pairs: Sequence[Pair], known: PairValidation, count: int) -> list[Pair]:
    """The pairs with so many more negatives for each image, of the captions of others.

    They are the most similar to the image by the frozen model among those that are less similar than its own most
    similar caption. Where there are fewer, it gets fewer.

    Args:
        pairs: to train on.
        known: embeds the same pairs.
        count: of negatives for each image, at least 1.
    """
    images, texts = known.frozen_embeds()  # (N, E) and (M, E)
    captions = list(known.captions.numbers)
    found, size = [], max(1, SIMILARITIES // len(captions))
    for start in range(0, len(pairs), size):
        cosines = images[start : start + size] @ texts.T  # (n, M)
        for pair, row in zip(pairs[start : start + size], cosines, strict=True):
            own = known.captions.numbers_of(pair.captions)
            left_out = row >= row[own].max()
            left_out[own] = True
            best = row.masked_fill(left_out, -torch.inf).topk(min(count + len(pair.negatives), len(captions)))
            mined = [
                captions[i] for i, cos in zip(best.indices.tolist(), best.values.tolist(), strict=True) if cos > -2
            ]
            new = [text for text in mined if text not in (*pair.captions, *pair.negatives)][:count]
            found.append(replace(pair, negatives=(*pair.negatives, *new)))
    return found
