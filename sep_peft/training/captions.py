"""`Captions`: the texts of images, each tokenized once, and what becomes of those that are too long."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..classifier.class_encoder import padding_of
from ..classifier.embeddings import max_text_length, too_long
from ..classifier.processors import processor_part
from ..tuner.messages import shown
from ..tuner.model import find_towers
from ..words import are, counted
from .pairs import Pair, place_of


#: What becomes of captions that have more tokens than the text tower has room for beside the prompts.
LongCaptions = Literal["refuse", "cut"]


class Captions:
    """Distinct texts, in the order in which they come first, with their tokens.

    Args:
        model: with a SEP adapter on its text tower.
        processor: of transformers, with a tokenizer.
        pairs: whose captions and negatives they are.
        long: "refuse" those that are too long, or "cut" their ends and warn of how many.

    Attributes:
        inputs: tensors (M, L), padded to the longest, in integers of 32 bits.

    Raises:
        ValueError: the processor has no tokenizer, a caption is too long and `long` is "refuse", or `long` is neither.
    """

    def __init__(self, model: nn.Module, processor: Any, pairs: Sequence[Pair], long: LongCaptions = "refuse"):
        if long not in ("refuse", "cut"):
            raise ValueError(f'long_captions must be "refuse" or "cut", but got {long!r}.')
        texts = (text for pair in pairs for text in (*pair.captions, *pair.negatives))
        self.numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        tokenizer = processor_part(processor, "tokenizer", PreTrainedTokenizerBase, "to read captions")
        options = padding_of(model)
        longest = options.setdefault("max_length", max_text_length(model))
        lengths = too_long(model, processor, list(self.numbers))
        if lengths and long == "refuse":
            raise ValueError(_refusal(lengths, list(self.numbers), pairs, longest))
        if lengths:
            ends = "its end is" if len(lengths) == 1 else "their ends are"
            warnings.warn(
                f"{len(lengths)} of {counted(len(self.numbers), 'caption')} {are(len(lengths))} longer than {longest} "
                f"tokens; {ends} not read.",
                stacklevel=3,
            )
        encoded = tokenizer(list(self.numbers), return_tensors="pt", truncation=True, **options)
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}  # each (M, L)
        rules = find_towers(model)["text"].texts
        rules.check_ids(inputs)
        self.inputs = {key: value.to(torch.int32) for key, value in rules.trim(inputs).items()}

    def __len__(self) -> int:
        return len(self.numbers)

    def numbers_of(self, texts: Iterable[str]) -> list[int]:
        """Of texts that are among them."""
        return [self.numbers[text] for text in texts]

    def tokens(self, number: int) -> dict[str, torch.Tensor]:
        """Of one text, tensors (L,)."""
        return {key: value[number].long() for key, value in self.inputs.items()}


def _refusal(lengths: dict[int, int], texts: Sequence[str], pairs: Sequence[Pair], longest: int) -> str:
    """
    Args:
        lengths: index among `texts` -> tokens, of those that are too long.
    """
    number, length = next(iter(lengths.items()))
    text = texts[number]
    index = next(index for index, pair in enumerate(pairs) if text in (*pair.captions, *pair.negatives))
    return (
        f"{len(lengths)} of {counted(len(texts), 'caption')} {are(len(lengths))} longer than the {longest} tokens that "
        "the text tower has room for beside the prompts (BOS and EOS included). The first is "
        f"{shown(text)} of {place_of(pairs[index], index)}, "
        f'with {length}. Shorten them, use fewer prompts (num_text_prompts), or pass long_captions="cut"; on the '
        "command line --text-prompts and --cut."
    )
