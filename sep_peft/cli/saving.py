"""Where an adapter goes: the folder is tried before training, and another one is found where saving fails after it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME

from ..classifier.adapter import Adapter
from ..classifier.card import CardDetails
from ..classifier.classifier import SEPClassifier
from ..classifier.files import try_output
from ..training.checkpoint import history_in
from ..training.optimizer import trained_bytes
from ..training.run_folder import checkpoint_bytes
from ..tuner.disk import try_folder


@dataclass(frozen=True)
class Saved:
    """Where an adapter was saved.

    Args:
        folder: that holds it.
        error: why that is not the folder that was asked for; None: it is.
    """

    folder: Path
    error: str | None = None


def check_output(folder: Path, overwrite: bool, resume: bool = False, needed: int = 0) -> None:
    """
    Args:
        folder: may be missing.
        overwrite: whether an adapter or a training that was not finished may be replaced.
        resume: whether such a training is to be gone on with.
        needed: bytes that its disk must have room for.

    Raises:
        FileExistsError: `folder` has an adapter or an unfinished training, and nothing says what to do with it.
        OSError, ValueError: nothing can be saved there; see `try_output`.
    """
    try_output(folder, needed)
    history = None if overwrite and not resume else history_in(folder)
    if history is not None and not resume:
        raise FileExistsError(
            f"{folder} has a training that ended {history}. Pass --resume to go on with it, or --overwrite to begin "
            "anew."
        )
    if history is None and (folder / CONFIG_NAME).exists() and not overwrite:
        raise FileExistsError(f"{folder} has an adapter already. Pass --overwrite to replace it.")


def check_file(path: Path, option: str) -> None:
    """Find out before long work whether a file can be written.

    Args:
        path: of the file, as `option` of the command line has it.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: nothing can be written in its folder; see `try_folder`.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} takes the name of a file, but {path} is a folder.")
    try_folder(path.parent)


def save_somewhere(
    classifier: SEPClassifier | Adapter,
    output: Path,
    details: CardDetails,
    save_dtype: torch.dtype = torch.float32,
    save_processor: bool = False,
) -> Saved:
    """Save into `output`, and where that fails into a new temporary folder, in full precision.

    Args:
        classifier: or an adapter without classes.

    Raises:
        OSError: both failed; the message has both reasons.
    """
    try:
        classifier.save_pretrained(output, details, save_dtype, save_processor=save_processor)
        return Saved(output)
    except Exception as error:  # whatever it is, what was trained must not be lost
        reason = str(error).strip() or type(error).__name__
        try:
            rescue = Path(tempfile.mkdtemp(prefix="sep-peft-"))
            classifier.save_pretrained(rescue, details)
        except Exception as second:
            raise OSError(f"Nothing could be saved: {reason} In a temporary folder: {second}") from error
        return Saved(rescue, reason)


def saved_bytes(trained: torch.nn.Module) -> int:
    """Room that a training needs: for its checkpoints, for the adapter, which is written before it replaces another,
    and a bit for the classes and the card."""
    return checkpoint_bytes(trained) + 2 * trained_bytes(trained) + 1_000_000
