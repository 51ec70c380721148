"""`Pair`: an image with its captions, and lists of them as people hand them over."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..tuner.messages import shown


@dataclass(frozen=True)
class Pair:
    """An image and what is said of it.

    Args:
        image: as `sep_peft.classifier.images.read_image` takes it, such as a path.
        captions: one text or more that describe it.
        negatives: texts that nearly describe it and do not, of which a step draws one for it; none: the captions of
            the other images are its only negatives.
        source: where it was read, such as "pairs.jsonl, line 7", for messages; None: not from a file.
    """

    image: Any
    captions: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    source: str | None = field(default=None, compare=False)


def as_pairs(pairs: Iterable[Any], purpose: str = "train on") -> list[Pair]:
    """Pairs that have been checked.

    Args:
        pairs: each a `Pair`, or an image with its caption or a list of its captions, as a tuple.
        purpose: what they are for, in the message where there are none.

    Raises:
        TypeError: they are no list of such, or an image or a text is none.
        ValueError: there are none, or a text is missing, blank, or both caption and negative of its image.
    """
    if isinstance(pairs, (str, os.PathLike)) or not isinstance(pairs, Iterable):
        raise TypeError(
            f"Pairs must be a list of images with captions, but got {shown(pairs)}. Read a file or a folder with "
            "sep_peft.training.read_pairs."
        )
    found = [_as_pair(pair, index) for index, pair in enumerate(pairs)]
    if not found:
        raise ValueError(f"There are no images with captions to {purpose}.")
    return found


def _as_pair(pair: Any, index: int) -> Pair:
    if not isinstance(pair, Pair):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"A pair is an image and its captions, but pair {index} is {shown(pair)}.")
        image, captions = pair
        pair = Pair(image, (captions,) if isinstance(captions, str) else captions)
    name = place_of(pair, index)
    if isinstance(pair.image, (int, float)) or pair.image is None:
        raise TypeError(f"A pair is an image and its captions, but {name} has {shown(pair.image)} for an image.")
    texts = {part: _texts(getattr(pair, part), part, name) for part in ("captions", "negatives")}
    if not texts["captions"]:
        raise ValueError(f"{name[0].upper()}{name[1:]} has no caption.")
    if both := [text for text in texts["negatives"] if text in texts["captions"]]:
        raise ValueError(f"{shown(both[0])} is both a caption and a negative of {name}. Keep one of them.")
    return Pair(pair.image, texts["captions"], texts["negatives"], pair.source)


def place_of(pair: Pair, index: int) -> str:
    """How a message calls a pair: by where it was read, else by its number from 0 and its file."""
    if pair.source is not None:
        return f"the pair of {pair.source}"
    named = isinstance(pair.image, (str, os.PathLike)) and not isinstance(pair.image, Image.Image)
    return f"pair {index} ({shown(os.fspath(pair.image))})" if named else f"pair {index}"


def fingerprint_of(pairs: Sequence[Pair]) -> str:
    """A digest of all texts, and of the file names where the images are files, in their order."""
    files = [os.path.basename(pair.image) if isinstance(pair.image, (str, os.PathLike)) else "" for pair in pairs]
    named = [[file, pair.captions, pair.negatives] for file, pair in zip(files, pairs, strict=True)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text; with half of a pair of surrogates, as JSON may have, it cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _texts(texts: Any, part: str, name: str) -> tuple[str, ...]:
    """Captions or negatives, without white space around them, each once."""
    if not isinstance(texts, (tuple, list)):
        raise TypeError(f"The {part} of {name} must be a list of texts, but are {shown(texts)}.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"The {part} of {name} must be texts, but one is {shown(text)}.")
        if not text.strip():
            raise ValueError(f"One of the {part} of {name} is blank. Write what the image shows, or leave it out.")
        if not is_unicode(text):
            raise ValueError(
                f"One of the {part} of {name} is no text that UTF-8 can hold: {shown(text)}. Leave it out."
            )
    return tuple(dict.fromkeys(text.strip() for text in texts))
