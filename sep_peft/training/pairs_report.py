"""A report of a training on images with captions: one HTML file that asks nobody for anything."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from . import plots
from .evaluation import main_part
from .findings import Finding, of_unreadable
from .history import History
from .recall import RANKS
from .report import curves_of, file_name, write_page
from .retrieval import PairEvaluation
from .thumbnails import thumbnail


TEMPLATE = "pairs_report_template.html"
#: Name in the page -> attribute of `Recall`.
WAYS = {"image to text": "image_to_text", "text to image": "text_to_image"}


def write_pairs_report(
    path: str | os.PathLike,
    evaluations: Mapping[str, PairEvaluation],
    *,
    title: str = "SEP adapter",
    training_images: int | None = None,
    history: History | None = None,
    unreadable: Mapping[Any, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an HTML file with recall in both directions beside the frozen model, curves and the hardest captions.

    Args:
        path, title, history, unreadable, facts: as for `write_report`.
        evaluations: part of the data, such as "test", -> what `evaluate_pairs` found. Empty: nothing was measured.
        training_images: how many were trained on; None: not known.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    part = main_part(evaluations)
    page = {
        "title": title,
        "evaluations": evaluations,
        "ways": WAYS,
        "ranks": RANKS,
        "part": part,
        "training_images": training_images,
        "findings": [*_findings(evaluations, history), *of_unreadable(unreadable or {})],
        "hardest": [] if part is None else [_shown(each) for each in evaluations[part].hardest],
        "history": history,
        "drawings": curves_of(history, plots.pair_curves),
        "facts": facts or {},
    }
    write_page(path, TEMPLATE, page, plots.pair_curves)


def _shown(each) -> tuple[str, str, str, str, Any]:
    """Data of the caption's image and of the one found first, their names, and the caption."""
    return thumbnail(each.image), thumbnail(each.first), file_name(each.image), file_name(each.first), each


def _findings(evaluations: Mapping[str, PairEvaluation], history: History | None) -> Iterable[Finding]:
    """What to know before a result is trusted, what weighs most first."""
    for part, each in evaluations.items():
        worse = [
            f"{name}: {', '.join(f'{frozen[rank] - adapted[rank]:.1f} points at {rank}' for rank in RANKS)}"
            for name, way in WAYS.items()
            if sum((adapted := getattr(each.adapted, way)).values())
            < sum((frozen := getattr(each.frozen, way)).values())
        ]
        if worse:
            yield Finding(f"On {part} the adapter finds less than the model without it.", worse)
    if not evaluations:
        yield Finding("There were no pairs to measure on, so nobody knows how often the adapter finds what is right.")
    if history is not None and history.stopped is not None:
        yield Finding(f"The training was stopped by {history.stopped} {history}.")
