"""Embeddings of any images and texts by SEP, which can be compared by cosine: for search, clusters, duplicates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import ImageProcessingMixin, PreTrainedTokenizerBase

from ..method.mix import mix_embeddings, wide
from ..method.whitening import Whitening
from ..tuner.current import chosen_adapters
from ..tuner.messages import shown
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from ..words import are, counted
from .class_encoder import TEXT_CHUNK_SIZE, padding_of
from .images import as_images, read_image
from .prediction import image_embeds
from .processors import processor_part
from .text_chunks import TextChunks


@torch.no_grad()
def embed_images(
    model: nn.Module, processor: Any, images: Sequence[Any], batch_size: int, adapter: str | None = None
) -> torch.Tensor:
    """SEP's image embeddings (N, E), of unit length, in fp32 or wider, on the CPU, in evaluation.

    Args:
        model: with a SEP adapter on its image tower.
        processor: of transformers, with an image processor.
        images: N images as `read_image` takes them; a batch of them is in memory at a time.
        batch_size: images encoded at a time.
        adapter: that embeds; None: the active one.

    Raises:
        ValueError: an image cannot be read, there is none, or the processor reads no images.
    """
    if not images:
        raise ValueError("There is no image to embed.")
    processor = processor_part(processor, "image_processor", ImageProcessingMixin, "to read images")
    tower, device, found = find_towers(model)["vision"], compute_device(model), []
    with evaluating(model), chosen_adapters.set(adapter):
        for start in range(0, len(images), batch_size):
            batch = [read_image(image) for image in images[start : start + batch_size]]
            found.append(image_embeds(tower, processor(batch, return_tensors="pt").to(device))[0].cpu())
    return torch.cat(found)


def embed_given_images(
    model: nn.Module,
    processor: Any,
    images: Any,
    batch_size: int,
    adapter: str | None = None,
    whitening: Whitening | None = None,
) -> torch.Tensor:
    """As `embed_images`, of one image alone too, (E,), and by a whitening.

    Raises:
        ValueError: as there, or `batch_size` is below 1.
    """
    check_batch_size(batch_size)
    images, single = as_images(images)
    found = embed_images(model, processor, images, batch_size, adapter)
    found = found if whitening is None else whitening(found)
    return found[0] if single else found


def max_text_length(model: nn.Module, adapter: str | None = None) -> int:
    """How many tokens a text may have beside the prompts, those that begin and end it included.

    Args:
        model: with a SEP adapter.
        adapter: whose prompts they are; None: the active one's.

    Raises:
        ValueError: SEP has not wrapped the model's text tower.

    Example:
        >>> tokenizer(captions, truncation=True, max_length=sep_peft.max_text_length(model), padding=True)
    """
    tower = find_towers(model).get("text")
    if tower is None:
        raise ValueError("The model has no text tower with a SEP adapter.")
    with chosen_adapters.set(adapter):
        if tower.spec.positions is not None:
            return tower.texts.room(tower.active_settings)
    return cast(Any, tower.base_layer).config.max_position_embeddings  # the prompts take none of its positions


def too_long(model: nn.Module, processor: Any, texts: Sequence[str], adapter: str | None = None) -> dict[int, int]:
    """Index -> tokens, of the texts that have more than `max_text_length`.

    Args:
        model, processor, texts, adapter: as for `embed_texts`.

    Raises:
        ValueError: the processor has no tokenizer.
    """
    tokenizer = processor_part(processor, "tokenizer", PreTrainedTokenizerBase, "to read texts")
    longest = padding_of(model).get("max_length", max_text_length(model, adapter))
    lengths = map(len, tokenizer([*texts], verbose=False)["input_ids"])
    return {index: length for index, length in enumerate(lengths) if length > longest}


@torch.no_grad()
def embed_texts(
    model: nn.Module, processor: Any, texts: Sequence[str], adapter: str | None = None, truncate: bool = False
) -> torch.Tensor:
    """SEP's text embeddings (N, E), of unit length, in fp32 or wider, on the CPU, in evaluation.

    Both branches read the text as it is; for classes the frozen one reads a template.

    Args:
        model: with a SEP adapter on its text tower.
        processor: of transformers, with a tokenizer.
        texts: N texts.
        adapter: that embeds; None: the active one.
        truncate: cut texts that do not fit at their end, and warn of how many.

    Raises:
        TypeError: one is no text.
        ValueError: there is none, one does not fit beside the prompts, or the processor has no tokenizer.
    """
    check_texts(texts)
    tokenizer = processor_part(processor, "tokenizer", PreTrainedTokenizerBase, "to read texts")
    options = padding_of(model)
    if truncate:
        longest = options.setdefault("max_length", max_text_length(model, adapter))
        options["truncation"] = True
        _warn_of_cuts(len(too_long(model, processor, texts, adapter)), len(texts), longest)
    encoded: Mapping[str, torch.Tensor] = tokenizer([*texts], return_tensors="pt", **options)
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}  # each (N, L)
    tower = find_towers(model)["text"]
    tower.texts.check_ids(inputs)
    inputs = tower.texts.trim(inputs)
    with evaluating(model), chosen_adapters.set(adapter):
        tower.texts.check_room(inputs, tower.active_settings)
        tower.texts.check_length(inputs)
        chunks = TextChunks(tower, inputs, TEXT_CHUNK_SIZE).to(compute_device(model))
        prompted, frozen = (chunks.encode(embed) for embed in (tower.embed_prompted, tower.embed_frozen))
        return mix_embeddings(wide(prompted), wide(frozen), tower.frozen_weight).cpu()


def embed_given_texts(
    model: nn.Module, processor: Any, texts: str | Sequence[str], adapter: str | None, truncate: bool
) -> torch.Tensor:
    """As `embed_texts`, of one text alone too, (E,)."""
    several = [texts] if isinstance(texts, str) else texts
    found = embed_texts(model, processor, several, adapter, truncate)
    return found[0] if isinstance(texts, str) else found


def _warn_of_cuts(cut: int, count: int, longest: int) -> None:
    """
    Args:
        cut: texts that are longer than `longest` tokens.
        count: of all texts.
        longest: tokens that are read.
    """
    if cut:
        ends = "its end is" if cut == 1 else "their ends are"
        message = f"{cut} of {counted(count, 'text')} {are(cut)} longer than {longest} tokens; {ends} not read."
        warnings.warn(message, stacklevel=6)  # where `SEPClassifier.embed_texts` was called


def check_texts(texts: Iterable[Any]) -> None:
    """
    Raises:
        TypeError: one is no text.
        ValueError: there is none, or one is blank.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("There is no text to embed.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"Texts must be strings, but got {shown(text)}.")
        if not text.strip():
            raise ValueError("A text is blank. Write what an image shows.")


def check_batch_size(batch_size: Any, name: str = "batch_size") -> None:
    """
    Args:
        batch_size: how many at a time.
        name: of the option.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but got {batch_size!r}.")
