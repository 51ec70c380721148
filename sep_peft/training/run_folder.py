"""The folder of a training: whether there is room for what it leaves, and whether it begins there or goes on."""

from __future__ import annotations

import os

from torch import nn

from ..tuner.disk import try_folder
from .checkpoint import CHECKPOINT_FILE, history_in
from .optimizer import trained_bytes


def check_run_folder(folder: str | os.PathLike | None, resume: bool, model: nn.Module) -> None:
    """Find out before a training whether it can begin, or go on, in a folder.

    Args:
        folder: may be missing; None: the training leaves no files.
        resume: whether it goes on with what is there.
        model: whose trained parameters a checkpoint will hold.

    Raises:
        ValueError: there is no folder to resume from.
        FileExistsError: the folder has a training that is not finished, and `resume` was not asked for.
        OSError: nothing can be written in the folder, or its disk has no room.
    """
    if folder is None:
        if resume:
            raise ValueError("resume=True needs folder, where the training that is gone on with has its checkpoint.")
        return
    try_folder(folder, needed=checkpoint_bytes(model))
    if not resume and (history := history_in(folder, unfinished=True)) is not None:
        raise FileExistsError(
            f"{os.fspath(folder)} has a training that ended {history}. Pass resume=True to go on with it, or remove "
            f"{CHECKPOINT_FILE} there to begin anew."
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """Room that a training's checkpoint needs: weights, those of the best epoch, an average and two moments of AdamW,
    twice because a file is written before it replaces the other."""
    return 10 * trained_bytes(model)
