"""Where an adapter goes: the folder is tried before training, and another one is found where saving fails after it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME

from ..classifier.card import CardDetails
from ..classifier.classifier import SEPClassifier
from ..classifier.files import try_output


@dataclass(frozen=True)
class Saved:
    """Where an adapter was saved.

    Args:
        folder: that holds it.
        error: why that is not the folder that was asked for; None: it is.
    """

    folder: Path
    error: str | None = None


def check_output(folder: Path, overwrite: bool, needed: int = 0) -> None:
    """
    Args:
        folder: may be missing.
        overwrite: whether an adapter in it may be replaced.
        needed: bytes that its disk must have room for.

    Raises:
        FileExistsError: `folder` has an adapter, and `overwrite` was not asked for.
        OSError, ValueError: nothing can be saved there; see `try_output`.
    """
    try_output(folder, needed)
    if (folder / CONFIG_NAME).exists() and not overwrite:
        raise FileExistsError(f"{folder} has an adapter already. Pass --overwrite to replace it.")


def save_somewhere(
    classifier: SEPClassifier, output: Path, details: CardDetails, save_dtype: torch.dtype = torch.float32
) -> Saved:
    """Save into `output`, and where that fails into a new temporary folder, in full precision.

    Raises:
        OSError: both failed; the message has both reasons.
    """
    try:
        classifier.save_pretrained(output, details, save_dtype)
        return Saved(output)
    except Exception as error:  # whatever it is, what was trained must not be lost
        reason = str(error).strip() or type(error).__name__
        try:
            rescue = Path(tempfile.mkdtemp(prefix="sep-peft-"))
            classifier.save_pretrained(rescue, details)
        except Exception as second:
            raise OSError(f"Nothing could be saved: {reason} In a temporary folder: {second}") from error
        return Saved(rescue, reason)


def saved_bytes(classifier: SEPClassifier) -> int:
    """Room that saving needs: what is trained twice, because files are written before they replace others, and a bit
    for the classes and the card."""
    trained = sum(p.numel() * p.element_size() for p in classifier.parameters() if p.requires_grad)
    return 2 * trained + 1_000_000
