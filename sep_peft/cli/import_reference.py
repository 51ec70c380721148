"""``sep-peft import-reference``: turns a checkpoint of the authors' code into an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from ..classifier.classes import TEMPLATE
from ..classifier.classifier import SEPClassifier
from ..tuner.convert import convert_reference_checkpoint
from ..words import counted
from .saving import check_output
from .session import Result, Session, load_base, load_base_model


def import_reference(
    checkpoint: Path,
    base_model: str,
    output: Path,
    session: Session,
    *,
    text_layers: Sequence[int] | None = None,
    vision_layers: Sequence[int] | None = None,
    classes: Path | None = None,
    template: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Result:
    """Convert a checkpoint of the authors' code, with the classes that it was trained on if they are given.

    Args:
        checkpoint: their file.
        base_model: name or folder of the model that it adapts.
        output: folder to save into.
        session: how to work.
        text_layers, vision_layers: layers before which prompts are fused, counted from 0; None: all but the first.
        classes: file of class names, one a line; None: the adapter is saved without classes.
        template: texts of the frozen text branch, which are averaged; None: `TEMPLATE`.
        overwrite: replace an adapter in `output`.

    Raises:
        FileNotFoundError: there is no checkpoint or file of names.
        FileExistsError: `output` has an adapter, and `overwrite` was not asked for.
        ValueError: the names do not fit; `output` is left as it is.
    """
    check_output(output, overwrite)
    names = [] if classes is None else [line.strip() for line in classes.read_text("utf-8").splitlines()]
    names = [name for name in names if name]
    base, processor = load_base(base_model, session) if names else (load_base_model(base_model, session), None)
    with tempfile.TemporaryDirectory() as temporary:  # names that do not fit are found out before `output` changes
        folder = temporary if names else output
        report = convert_reference_checkpoint(checkpoint, base, folder, text_layers, vision_layers)
        if names:
            model = session.place(PeftModel.from_pretrained(base, folder))
            classifier = SEPClassifier.from_class_names(model, processor, names, template=template or TEMPLATE)
            classifier.save_pretrained(output)
    data = {
        "adapter": str(output),
        "epoch": report.epoch,
        "text_prompts": report.config.num_text_prompts,
        "vision_prompts": report.config.num_vision_prompts,
        "classes": names,
        "unused": report.unused,
    }
    found, unused = counted(len(names), "class", "classes") if names else "no class list", len(report.unused)
    unneeded = f"{counted(unused, 'entry', 'entries')} of the checkpoint {'was' if unused == 1 else 'were'} not needed"
    line = f"saved {output}, {found}; {unneeded}"
    return Result(data, [line])
