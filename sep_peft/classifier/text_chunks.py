"""`TextChunks`: many tokenized texts, to be encoded a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..tuner.passes import TrunkFeatures
from ..tuner.texts import TextInputs
from ..tuner.tower import SEPTower
from .following import Following


class TextChunks(Following):
    """Texts from short to long, in chunks that are as long as their longest, so that little padding is encoded.

    The texts follow the module to its device; they are not saved.

    Args:
        tower: that reads them.
        inputs: tokenized texts, tensors (C, L).
        size: texts a chunk.
        by_length: sort them. Without it they stay in their order and at their length, and no value of theirs is read.
    """

    def __init__(self, tower: SEPTower, inputs: TextInputs, size: int, *, by_length: bool = True):
        super().__init__()
        self._names: list[dict[str, str]] = []  # for each chunk, input -> name of the tensor
        if not by_length:
            self.following["places"] = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device)
            parts = zip(*(value.split(size) for value in inputs.values()), strict=True)
            for part in parts:
                self._append(dict(zip(inputs, part, strict=True)))
            return
        ends, order = tower.texts.span(inputs)[1].sort(stable=True)  # both (C,)
        self.following["places"] = order.argsort()
        for chosen in order.split(chunk_sizes(ends.tolist(), size)):
            self._append(tower.texts.trim({key: value[chosen] for key, value in inputs.items()}))

    def _append(self, chunk: TextInputs) -> None:
        number = len(self._names)
        self._names.append({key: f"{key}_{number}" for key in chunk})
        self.following |= {f"{key}_{number}": value for key, value in chunk.items()}

    @property
    def places(self) -> torch.Tensor:
        """Where each text is among those from short to long, (C,)."""
        return self.following["places"]

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[TextInputs]:
        """Chunks, tensors (<= size, <= L)."""
        for names in self._names:
            yield {key: self.following[name] for key, name in names.items()}

    def map(self, call: Callable[..., Any]) -> list:
        """What `call` makes of each chunk, which it gets as keyword arguments."""
        return [call(**chunk) for chunk in self]

    def encode(self, embed: Callable[..., torch.Tensor], trunks: list[TrunkFeatures] | None = None) -> torch.Tensor:
        """Embeddings of all texts (C, E), in the order of the texts.

        Args:
            embed: makes those of a chunk, (<= size, E), which it gets as keyword arguments.
            trunks: of each chunk, for `embed`'s argument `trunk`, where the layers below have run.
        """
        extra = [{}] * len(self) if trunks is None else [{"trunk": trunk} for trunk in trunks]
        embeds = [embed(**chunk, **more) for chunk, more in zip(self, extra, strict=True)]
        return torch.cat(embeds)[self.places]

    def num_tokens(self, num_prompts: int) -> int:
        """Tokens that the tower sees of all texts, padding and prompts included."""
        shapes = [chunk["input_ids"].shape for chunk in self]
        return sum(texts * (length + num_prompts) for texts, length in shapes)


def chunk_sizes(lengths: list[int], largest: int) -> list[int]:
    """How to cut texts of these ascending lengths into chunks.

    A chunk ends where it has `largest` texts, or where texts get longer and it has an eighth of that: padding costs as
    much as text, and a small chunk more than its share.
    """
    sizes = [0]
    for index, length in enumerate(lengths):
        grows = index > 0 and length > lengths[index - 1]
        if sizes[-1] == largest or (grows and 8 * sizes[-1] >= largest):
            sizes.append(0)
        sizes[-1] += 1
    return sizes
