"""How well images and captions find each other: by SEP, and beside it by the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.image_processing_base import ImageProcessingMixin

from ..classifier.class_encoder import TEXT_CHUNK_SIZE
from ..classifier.embeddings import check_batch_size
from ..classifier.images import read_image
from ..classifier.prediction import image_embeds
from ..classifier.processors import processor_part
from ..classifier.text_chunks import TextChunks
from ..method.mix import mix_embeddings, unit, wide
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from .captions import Captions, LongCaptions
from .hard_captions import HardCaption, hardest_captions
from .pairs import Pair, as_pairs, fingerprint_of
from .recall import Recall, measure_recall


Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class PairEvaluation:
    """What was found among images with captions.

    Args:
        adapted: by SEP.
        frozen: by the model without the adapter.
        images: how many there were.
        captions: how many different ones they had.
        hardest: captions by which SEP finds another image first, those whose own is found last first.
    """

    adapted: Recall
    frozen: Recall
    images: int
    captions: int
    hardest: tuple[HardCaption, ...] = ()


def evaluate_pairs(
    model: nn.Module,
    pairs: Iterable[Any],
    processor: Any,
    *,
    batch_size: int = 32,
    long_captions: LongCaptions = "refuse",
    progress: Progress = iter,
) -> PairEvaluation:
    """Recall at 1, 5 and 10 in both directions, of a model with an adapter and without it, in evaluation.

    Args:
        model: with a SEP adapter on both towers.
        pairs: N images, each with a caption or a list of them; see `as_pairs`. Each image is looked for among all, each
            caption among all different ones.
        processor: of transformers, with a tokenizer and an image processor.
        batch_size: images encoded at a time.
        long_captions: "refuse" or "cut", as for `fit_pairs`.
        progress: wraps the batches of images.

    Raises:
        TypeError, ValueError: as `as_pairs` and `Captions`, an image cannot be read, or `batch_size` is below 1.
    """
    found = PairValidation(model, as_pairs(pairs, "measure"), processor, batch_size, long_captions, progress)
    embeds = found.adapted_embeds()
    hardest = hardest_captions(*embeds, found.pairs, found.numbers)
    adapted = measure_recall(*embeds, found.numbers)
    return PairEvaluation(adapted, found.frozen(), len(found.pairs), len(found.captions), hardest)


class PairValidation:
    """Measures a model while it trains; what its frozen branches make of the pairs is computed once.

    Args:
        model, processor, batch_size, long_captions, progress: as for `evaluate_pairs`.
        pairs: images with captions, checked.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[Pair],
        processor: Any,
        batch_size: int,
        long_captions: LongCaptions,
        progress: Progress = iter,
    ):
        check_batch_size(batch_size)
        self._model, self._batch_size, self._progress = model, batch_size, progress
        self._processor = processor_part(processor, "image_processor", ImageProcessingMixin, "to read images")
        self.pairs = [Pair(pair.image, pair.captions, (), pair.source) for pair in pairs]
        self.captions = Captions(model, processor, self.pairs, long_captions)
        self.numbers = [self.captions.numbers_of(pair.captions) for pair in self.pairs]
        self._frozen: tuple[torch.Tensor, torch.Tensor] | None = None  # embeddings of images and texts, of unit length

    @property
    def fingerprint(self) -> str:
        """What tells these pairs from others, for a training that is gone on with."""
        return fingerprint_of(self.pairs)

    def zero_shot(self) -> float:
        """The mean recall of the frozen model, in percent."""
        return self.frozen().mean

    def measure(self) -> dict[str, float]:
        """What is noted of an epoch: "val_recall", the mean of six, each of them, and the frozen model's."""
        adapted, frozen = self.adapted(), self.frozen()
        row = {f"val_{name}": share for name, share in adapted.named().items()}
        return {"val_recall": adapted.mean, **row, **{f"frozen_{name}": x for name, x in frozen.named().items()}}

    @torch.no_grad()
    def frozen(self) -> Recall:
        """Of the model without the adapter."""
        return measure_recall(*self.frozen_embeds(), self.numbers)

    def adapted(self) -> Recall:
        """Of SEP."""
        return measure_recall(*self.adapted_embeds(), self.numbers)

    @torch.no_grad()
    def adapted_embeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """SEP's embeddings of all images, (N, E), and of all captions, (M, E), of unit length."""
        frozen_images, frozen_texts = self.frozen_embeds()
        towers = find_towers(self._model)
        with evaluating(self._model):
            images = []
            for start, batch in self._batches():
                known = {"frozen_embeds": frozen_images[start : start + len(batch)]}
                images.append(image_embeds(towers["vision"], self._pixels(batch) | known)[0])
            prompted = self._chunks().encode(towers["text"].embed_prompted)
            texts = mix_embeddings(wide(prompted), frozen_texts, towers["text"].frozen_weight)
        return torch.cat(images), texts

    @torch.no_grad()
    def frozen_embeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the frozen model, computed once: (N, E) and (M, E)."""
        if self._frozen is None:
            towers = find_towers(self._model)
            with evaluating(self._model):
                encode = towers["vision"].embed_frozen
                images = [unit(wide(encode(**self._pixels(images)))) for _, images in self._batches()]
                texts = self._chunks().encode(towers["text"].embed_frozen)
            self._frozen = torch.cat(images), unit(wide(texts))
        return self._frozen

    def _batches(self) -> Iterable[tuple[int, list[Any]]]:
        """Where each batch of images begins, and the images."""
        for start in self._progress(range(0, len(self.pairs), self._batch_size)):
            yield start, [pair.image for pair in self.pairs[start : start + self._batch_size]]

    def _pixels(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        read = [read_image(image) for image in images]
        return dict(self._processor(read, return_tensors="pt").to(compute_device(self._model)))

    def _chunks(self) -> TextChunks:
        tower = find_towers(self._model)["text"]
        inputs = {key: value.long() for key, value in self.captions.inputs.items()}
        return TextChunks(tower, inputs, TEXT_CHUNK_SIZE).to(compute_device(self._model))
