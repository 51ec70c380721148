"""`PairedImages`: images with captions as training reads them: one caption of each in every epoch, always the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from ..method.pairs_recipe import PairsRecipe
from .captions import Captions
from .data import AugmentedImages
from .pairs import Pair, fingerprint_of


#: What the names of a text's tensors begin with in an entry: the caption that was drawn, and the negative.
TEXT, NEGATIVE = "text.", "negative."
#: Entries beside what the towers take; see `PairedImages`.
TEXT_NUMBER, NEGATIVE_NUMBER, OWN_NUMBERS = "text_number", "negative_number", "own_numbers"
NUMBERS = (TEXT_NUMBER, NEGATIVE_NUMBER, OWN_NUMBERS)


class PairedImages(AugmentedImages):
    """Images with captions; the images are augmented as `AugmentedImages` are.

    Which caption of an image an epoch shows, and which of its negatives, depends on the recipe's seed, the epoch and
    the index alone. An entry is a dict of what the image processor gives for one image, the tokens (L,) of the caption
    under `TEXT`, its number among `captions` as `TEXT_NUMBER`, and the numbers (K,) of all captions of the image as
    `OWN_NUMBERS`, filled up with -1. Where any image has negatives there are tokens of one under `NEGATIVE` and its
    number as `NEGATIVE_NUMBER`; an image without negatives has its own caption there, and the number -1.

    Args:
        pairs: N images with captions.
        captions: tokens of all their texts.
        processor: of transformers, with an image processor.
        recipe: gives `smallest_crop`, `mirrors` and `seed`.
        named: the pairs as they were handed in, which tell this training from others; None: these.

    Raises:
        ValueError: there is no image processor.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        captions: Captions,
        processor: Any,
        recipe: PairsRecipe,
        named: Sequence[Pair] | None = None,
    ):
        super().__init__([pair.image for pair in pairs], processor, recipe)
        self.captions, self._seed, self._fingerprint = (
            captions,
            recipe.seed,
            fingerprint_of(pairs if named is None else named),
        )
        self._own = [captions.numbers_of(pair.captions) for pair in pairs]
        self._negatives = [captions.numbers_of(pair.negatives) for pair in pairs]
        self._most = max(map(len, self._own))
        self._has_negatives = any(self._negatives)

    @property
    def fingerprint(self) -> str:
        """That of the pairs."""
        return self._fingerprint

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        own, source = self._own[index], random.Random(f"{self._seed}/{self.epoch}/{index}/texts")
        number = source.choice(own)
        entry = self.image_at(index, self.epoch) | self._tokens(TEXT, number)
        entry[TEXT_NUMBER] = torch.tensor(number)
        entry[OWN_NUMBERS] = torch.tensor(own + [-1] * (self._most - len(own)))  # (K,)
        if self._has_negatives:
            negatives = self._negatives[index]
            negative = source.choice(negatives) if negatives else -1
            entry |= self._tokens(NEGATIVE, number if negative < 0 else negative)
            entry[NEGATIVE_NUMBER] = torch.tensor(negative)
        return entry

    def _tokens(self, prefix: str, number: int) -> dict[str, torch.Tensor]:
        return {prefix + key: value for key, value in self.captions.tokens(number).items()}
