"""Tokenized texts as a task keeps them: checked, and as lists in JSON."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..tuner.messages import printable, shown


#: What text towers read of tokenized texts.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
#: Longest class name, template or description, in characters.
MAX_TEXT = 10_000


def check_text(text: str, what: str) -> None:
    """
    Args:
        text: a class name, template or description.
        what: it is, for the message.

    Raises:
        ValueError: it is too long, or UTF-8 cannot hold it.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"{what} must have at most {MAX_TEXT} characters, but got {len(text)}: {shown(text)}.")
    if any(
        "\ud800" <= letter <= "\udfff" for letter in text
    ):  # halves of characters, as in file names of other encodings
        raise ValueError(f"{what} must be a text that UTF-8 can hold, but got {shown(text)}. Rename it.")


def check_inputs(inputs: Mapping[str, torch.Tensor], count: int) -> None:
    """
    Raises:
        ValueError: tokenized texts without ids, with values that are no ids, of another number than `count`, or one
            without a token.
    """
    for key, value in inputs.items():
        if key not in TEXT_INPUTS:
            raise ValueError(f"Tokenized texts may hold {', '.join(TEXT_INPUTS)}, but got {shown(key)}.")
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{key} must be a tensor, but got {shown(value)}.")
        if value.ndim != 2 or len(value) != count:
            raise ValueError(f"{key} must have shape ({count}, tokens), but got {tuple(value.shape)}.")
    if "input_ids" not in inputs:
        raise ValueError(f"Tokenized texts must hold input_ids, but got {sorted(inputs)}.")
    ids = inputs["input_ids"]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers, but got {ids.dtype}.")
    if ids.shape[1] == 0:
        raise ValueError("input_ids must hold a token for every text, but their length is 0.")
    if ids.min() < 0:
        raise ValueError(f"input_ids must be at least 0, but got {int(ids.min())}.")
    mask = inputs.get("attention_mask")
    if mask is None:
        return
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, not {tuple(mask.shape)}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask must hold 1 for tokens and 0 for padding, but has other values.")
    if len(empty := (mask.sum(1) == 0).nonzero().flatten()):
        raise ValueError(f"attention_mask must leave every text a token, but has none for text {int(empty[0])}.")


def token_rows(inputs: Mapping[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The ids of each text, without padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return [tuple(row) for row in ids.tolist()]
    return [tuple(row[seen.bool()].tolist()) for row, seen in zip(ids, mask, strict=True)]


def to_lists(inputs: Mapping[str, torch.Tensor]) -> dict[str, list]:
    """Tokenized texts as JSON holds them."""
    return {key: value.tolist() for key, value in inputs.items()}


def to_tensors(lists: Mapping[str, list], source: str) -> dict[str, torch.Tensor]:
    """The inverse of `to_lists`.

    Raises:
        ValueError: not a dict of lists of integers of one length; the message names `source` and the key.
    """
    if not isinstance(lists, Mapping):
        raise ValueError(f"{source} of the class list must hold dicts of token ids, but got {shown(lists)}.")
    tensors = {}
    for key, value in lists.items():
        rows = value if isinstance(value, list) else [value]
        if not all(isinstance(row, list) and all(type(i) is int and abs(i) < 2**31 for i in row) for row in rows):
            raise ValueError(
                f"{printable(key)} in {source} of the class list must hold lists of integers, but got {shown(value)}."
            )
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"{printable(key)} in {source} of the class list must hold lists of one length, but they differ."
            )
        tensors[key] = torch.tensor(value, dtype=torch.long)
    return tensors
