"""A report where an image may have several classes: one HTML file that asks nobody for anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..classifier.classifier import SEPClassifier
from ..classifier.label_calibration import LabelCalibration
from ..words import are, counted
from . import plots
from .evaluation import main_part
from .findings import Finding, of_unreadable
from .history import History
from .label_evaluation import ClassMeasures, LabelEvaluation
from .label_files import LabelSamples
from .report import SHOWN_IMAGES, curves_of, file_name, write_page
from .thumbnails import marked_thumbnail


TEMPLATE = "label_report_template.html"
#: Name in the page -> property of an evaluation.
MEASURES = {"mAP": "mean_average_precision", "micro F1": "micro_f1", "macro F1": "macro_f1"}


@dataclass(frozen=True)
class LabelRow:
    """A class in the page.

    Args:
        name: of the class.
        counts: images of each part that have it, in the order of the parts.
        measures: on the test images; None: nothing was tested.
        zero_shot: average precision of the base model in percent; None: not measured.
        threshold: from which score on it is named; None: not known.
        rare: whether that is the threshold of all.
    """

    name: str
    counts: list[int]
    measures: ClassMeasures | None
    zero_shot: float | None
    threshold: float | None
    rare: bool


def write_label_report(
    path: str | os.PathLike,
    classifier: SEPClassifier,
    evaluations: Mapping[str, LabelEvaluation],
    zero_shot: Mapping[str, LabelEvaluation] | None = None,
    *,
    title: str = "SEP adapter",
    training: LabelSamples = (),  # pyright: ignore[reportArgumentType]  # read alone
    history: History | None = None,
    unreadable: Mapping[Any, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an HTML file with mean average precision and F1 beside zero-shot, each class and what was most wrong.

    Args:
        path, title, history, unreadable, facts: as for `write_report`.
        classifier: that was measured, as it was measured.
        evaluations: part of the data, such as "test", -> what `evaluate_labels` found. Empty: nothing was measured.
        zero_shot: the same without the adapter, for parts on which that was measured; None: on none.
        training: images that were trained on and the names of their classes. Empty: not known.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    zero_shot, part = zero_shot or {}, main_part(evaluations)
    page = {
        "title": title,
        "evaluations": evaluations,
        "zero_shot": zero_shot,
        "measures": MEASURES,
        "calibration": classifier.classes.calibration,
        "findings": [
            *_findings(classifier, evaluations, zero_shot, history),
            *of_unreadable(unreadable or {}),
        ],
        "part": part,
        "parts": [*(["training"] if training else []), *evaluations],
        "rows": _rows(classifier, evaluations, zero_shot, training, part),
        "wrong": [] if part is None else _wrong(classifier, evaluations[part]),
        "history": history,
        "drawings": curves_of(history, plots.curves),
        "facts": facts or {},
    }
    write_page(path, TEMPLATE, page, plots.curves)


def _rows(
    classifier: SEPClassifier,
    evaluations: Mapping[str, LabelEvaluation],
    zero_shot: Mapping[str, LabelEvaluation],
    training: LabelSamples,
    part: str | None,
) -> list[LabelRow]:
    """Of all classes, those with the least average precision first, then those that were not tested."""
    counts = [_counts(samples) for samples in ([training] if training else [])]
    counts += [_counts(each.samples) for each in evaluations.values()]
    measured = {} if part is None else evaluations[part].per_class
    base = zero_shot[part].per_class if part is not None and part in zero_shot else {}
    calibration, rows = classifier.classes.calibration, []
    for place, name in enumerate(classifier.class_names):
        threshold, rare = None, False
        if isinstance(calibration, LabelCalibration):
            threshold, rare = calibration.trained.only([place]).thresholds[0], place in calibration.rare
        own_base = base[name].average_precision if name in base else None
        own = [count[name] for count in counts], measured.get(name), own_base, threshold, rare
        rows.append(LabelRow(name, *own))
    return sorted(rows, key=_order)


def _order(row: LabelRow) -> tuple[bool, float]:
    tested = row.measures is not None and row.measures.images > 0
    return not tested, row.measures.average_precision if row.measures is not None and tested else 0.0


def _counts(samples: LabelSamples) -> Counter[str]:
    return Counter(name for _, own in samples for name in own)


def _wrong(classifier: SEPClassifier, found: LabelEvaluation) -> list[tuple[str, Any, str]]:
    """Data of an image, what was wrong with it, and the name of its file."""
    seen: dict[int, str] = {}
    for each in found.wrong[:SHOWN_IMAGES]:
        if id(each.image) not in seen:
            seen[id(each.image)] = marked_thumbnail(classifier, each.image)
    return [(seen[id(each.image)], each, file_name(each.image)) for each in found.wrong[:SHOWN_IMAGES]]


def _findings(
    classifier: SEPClassifier,
    evaluations: Mapping[str, LabelEvaluation],
    zero_shot: Mapping[str, LabelEvaluation],
    history: History | None,
) -> Iterable[Finding]:
    """What to know before a result is trusted, what weighs most first."""
    for part, each in evaluations.items():
        base = zero_shot.get(part)
        if base is not None and each.mean_average_precision < base.mean_average_precision:
            yield Finding(
                f"On {part} the adapter is worse than zero-shot: its mean average precision is "
                f"{each.mean_average_precision:.1f} %, that of the base model {base.mean_average_precision:.1f} %."
            )
    if not evaluations:
        yield Finding("There were no images to test on, so nobody knows how often the adapter is right.")
    if history is not None and history.stopped is not None:
        yield Finding(f"The training was stopped by {history.stopped} {history}.")
    tested = {name for each in evaluations.values() for name in each.names if name not in each.not_tested}
    missing = [name for name in classifier.class_names if name not in tested]
    if evaluations and missing:
        yield Finding(
            f"{len(missing)} of {counted(len(classifier.classes), 'class', 'classes')} "
            f"{are(len(missing))} on no image that was tested.",
            missing,
        )
    calibration = classifier.classes.calibration
    if isinstance(calibration, LabelCalibration) and calibration.rare:
        names = [classifier.class_names[place] for place in calibration.rare]
        yield Finding(
            f"Of {counted(len(names), 'class', 'classes')} too few images were held out for thresholds of their own; "
            f"{'it has' if len(names) == 1 else 'they have'} that of all.",
            names,
        )
