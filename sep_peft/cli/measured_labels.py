"""What was measured where an image may have several classes, for people, as JSON and for the model card."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..classifier.classifier import SEPClassifier
from ..classifier.label_calibration import LabelCalibration
from ..classifier.label_scores import LabelClassScore, LabelMeasures, LabelScore
from ..training.evaluation import main_part
from ..training.label_evaluation import LabelEvaluation, LabelMistake
from ..training.label_files import LabelFile
from ..words import counted
from .measured import SHOWN_IMAGES, between


def measures_of(found: LabelEvaluation) -> LabelMeasures:
    """The measures of all classes together, with their intervals."""
    return LabelMeasures(found.mean_average_precision, found.micro_f1, found.macro_f1, found.intervals)


def label_scores(
    name: str, adapted: Mapping[str, LabelEvaluation], zero_shot: Mapping[str, LabelEvaluation]
) -> list[LabelScore]:
    """For the model card: part of the data -> what was found on it, with the adapter and without.

    Args:
        name: of the data.
        adapted, zero_shot: part -> what was found.
    """
    return [
        LabelScore(name, measures_of(found), measures_of(zero_shot[part]), found.images, part)
        for part, found in adapted.items()
    ]


def label_class_scores(
    file: LabelFile, adapted: Mapping[str, LabelEvaluation], zero_shot: Mapping[str, LabelEvaluation]
) -> list[LabelClassScore]:
    """For the model card: of each class what was found on the part test, else on val; empty where there is neither."""
    part = main_part(adapted)
    if part is None:
        return []
    trained = Counter(name for _, own in file.train for name in own)
    rows = []
    for name, own in adapted[part].per_class.items():
        base = zero_shot[part].per_class[name]
        measured = [_known(each) for each in (own.average_precision, own.f1, base.average_precision)]
        rows.append(LabelClassScore(name, trained[name], own.images, *measured))
    return rows


def in_full(found: LabelEvaluation, base: LabelEvaluation | None, classifier: SEPClassifier) -> dict[str, Any]:
    """All that was measured, for JSON; what is not known is null.

    Args:
        found: with the adapter.
        base: without it; None: not measured.
        classifier: that was measured.
    """
    calibration = classifier.classes.calibration
    rare = calibration.rare if isinstance(calibration, LabelCalibration) else ()
    return {
        "images": found.images,
        "classes": len(classifier.classes),
        "multi_label": True,
        **_totals(found),
        "zero_shot": None if base is None else _totals(base),
        "per_class": {
            name: {key: _known(value) for key, value in asdict(own).items()} for name, own in found.per_class.items()
        },
        "thresholds": dict(zip(found.names, found.thresholds.tolist(), strict=True)),
        "rare": [classifier.class_names[place] for place in rare],
        "not_tested": found.not_tested,
        "wrong": [{**asdict(each), "image": str(each.image)} for each in found.wrong],
    }


def in_lines(found: LabelEvaluation, base: LabelEvaluation | None) -> list[str]:
    """What of it people read at a glance; arguments as for `in_full`."""
    lines = [total_line(measures_of(found), None if base is None else measures_of(base), found.images)]
    tested = {name: own for name, own in found.per_class.items() if own.images}
    width = max((len(str(own.images)) for own in tested.values()), default=1)
    lines += [
        f"AP {own.average_precision:5.1f} %, F1 {own.f1:5.1f} %, {own.images:{width}} "
        f"{'image ' if own.images == 1 else 'images'}  {name}"
        for name, own in tested.items()
    ]
    lines += [f"not tested: {name}" for name in found.not_tested]
    if wrong := found.wrong[:SHOWN_IMAGES]:
        lines += [f"most wrong, {len(wrong)} of {len(found.wrong)}:", *map(_mistake_line, wrong)]
    return lines


def total_line(adapted: LabelMeasures, base: LabelMeasures | None, images: int | None) -> str:
    """Of all classes together, such as "mAP 81.2 % (77.9 to 84.0) with SEP, ... zero-shot; ..., 80 images"."""
    names = {"mAP": "mean_average_precision", "micro F1": "micro_f1", "macro F1": "macro_f1"}
    parts = [
        f"{name} {_share(adapted, measure)} with SEP" + ("" if base is None else f", {_share(base, measure)} zero-shot")
        for name, measure in names.items()
    ]
    return "; ".join([*parts, *([] if images is None else [counted(images, "image")])])


def _share(measures: LabelMeasures, name: str) -> str:
    """Such as "81.2 % (77.9 to 84.0)"."""
    return f"{getattr(measures, name):.1f} %{between(measures.intervals.get(name))}"


def _totals(found: LabelEvaluation) -> dict[str, Any]:
    return asdict(measures_of(found))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mistake_line(each: LabelMistake) -> str:
    return f"  {each.image}: {'missed' if each.missed else 'named'} {each.label} {each.score:.1%}"
