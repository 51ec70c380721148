"""What was measured, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..classifier.calibration import Calibration
from ..classifier.card import ClassScore
from ..classifier.classifier import SEPClassifier
from ..classifier.label_calibration import LabelCalibration
from ..training.data import names_of
from ..training.evaluation import Evaluation, Mistake, Sets, main_part
from ..training.folders import ImageFolder
from ..training.label_files import LabelFile
from ..words import counted


#: Wrong and suspected images that people are shown.
SHOWN_IMAGES = 5
#: Promises of sets that are measured, and the one of them that people are shown.
COVERAGES, SHOWN_COVERAGE = (0.8, 0.9, 0.95), 0.9


def in_full(adapted: Evaluation, base: Evaluation | None, classifier: SEPClassifier) -> dict[str, Any]:
    """All that was measured, for JSON.

    Args:
        adapted: with the adapter.
        base: without it; None: not measured.
        classifier: that was measured.
    """
    return {
        "images": adapted.images,
        "folds": adapted.folds,
        "classes": len(classifier.classes),
        "accuracy": adapted.accuracy,
        "interval": adapted.interval,
        "zero_shot": base and base.accuracy,
        "zero_shot_interval": base and base.interval,
        "class_mean": adapted.class_mean,
        "class_mean_interval": adapted.class_mean_interval,
        "calibration_error": adapted.calibration_error,
        "error_by_chance": adapted.error_by_chance,
        "nll": adapted.nll,
        "sets": [_sets(found) for coverage in COVERAGES if (found := adapted.sets(coverage)) is not None],
        "per_class": adapted.per_class,
        "count": adapted.count,
        "names": adapted.names,
        "confusion": adapted.confusion.tolist(),
        "wrong": [_entry(mistake) for mistake in adapted.wrong],
        "mislabelled": [_entry(mistake) for mistake in adapted.mislabelled],
        "not_tested": adapted.not_tested,
    }


def in_lines(adapted: Evaluation, base: Evaluation | None, classifier: SEPClassifier) -> list[str]:
    """What of it people read at a glance; arguments as for `in_full`."""
    beside = "" if base is None else f", {base.accuracy:.1f} %{between(base.interval)} zero-shot"
    lines = [
        f"{adapted.accuracy:.1f} %{between(adapted.interval)} with SEP{beside}, {counted(adapted.images, 'image')} of "
        f"{counted(len(adapted.count), 'class', 'classes')}",
        f"{adapted.class_mean:.1f} %{between(adapted.class_mean_interval)} mean over classes; calibration error "
        f"{adapted.calibration_error:.1f} %, NLL {adapted.nll:.3f}",
    ]
    if (sets := adapted.sets(SHOWN_COVERAGE)) is not None:
        lines.append(
            f"sets for {sets.promise:.0f} % hold the class of {sets.held:.1f} %, with {sets.classes:.1f} classes on "
            "average"
        )
    if adapted.folds is not None:
        lines.insert(
            0, f"{adapted.folds} folds, no test: each image was told by an adapter that was trained on the others"
        )
    counts = adapted.count
    width = max(len(str(count)) for count in counts.values())
    lines += [f"{accuracy:6.1f} % of {counts[name]:{width}}  {name}" for name, accuracy in adapted.per_class.items()]
    lines += [f"not tested: {name}" for name in adapted.not_tested]
    lines += _listed("surest mistakes", adapted.wrong) + _listed("labels that may be wrong", adapted.mislabelled)
    return lines


def untested(folder: ImageFolder | LabelFile, calibration: Calibration | LabelCalibration | None) -> list[str]:
    """Lines on classes whose images were all trained on, and without any test image what cross-fitting found."""
    counts = Counter(name for _, own in folder.train for name in names_of(own))
    lines = []
    if not folder.tests and isinstance(calibration, Calibration) and calibration.accuracy is not None:
        lines.append(
            f"{calibration.source}, no test: {calibration.accuracy:.1f} % with SEP, "
            f"{counted(calibration.images, 'training image')}, each told after a shorter training on others"
        )
    return lines + [
        f"not tested: {name}: {counted(counts[name], 'image')}, all used for training" for name in not_tested(folder)
    ]


def not_tested(folder: ImageFolder | LabelFile) -> list[str]:
    """Classes without an image to test on."""
    tested = {name for samples in folder.tests.values() for _, own in samples for name in names_of(own)}
    return [name for name in folder.names if name not in tested]


def class_scores(
    folder: ImageFolder, adapted: Mapping[str, Evaluation], zero_shot: Mapping[str, Evaluation]
) -> list[ClassScore]:
    """For the model card: of each class what was found on test/, else on val/; empty where there is neither."""
    part = main_part(adapted)
    if part is None:
        return []
    trained = Counter(name for _, name in folder.train)
    found, base = adapted[part], zero_shot[part]
    return [
        ClassScore(name, trained[name], found.count.get(name, 0), found.per_class.get(name), base.per_class.get(name))
        for name in folder.names
    ]


def between(interval: tuple[float, float] | None) -> str:
    """An interval in brackets, after a space; nothing where there is none."""
    return "" if interval is None else f" ({interval[0]:.1f} to {interval[1]:.1f})"


def draw(evaluation: Evaluation, folder: Path) -> None:
    """Write confusion.png, reliability.png, and wrong.png where an image was wrong.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    evaluation.plot_confusion(folder / "confusion.png")
    evaluation.plot_reliability(folder / "reliability.png")
    if evaluation.wrong:
        evaluation.plot_wrong(folder / "wrong.png")


def _sets(found: Sets) -> dict[str, float]:
    return {"promise": found.promise, "held": found.held, "classes": found.classes}


def _entry(mistake: Mistake) -> dict[str, Any]:
    return {
        "image": str(mistake.image),
        "label": mistake.label,
        "said": mistake.said,
        "score": mistake.score,
        "label_score": mistake.label_score,
    }


def _listed(title: str, mistakes: list[Mistake]) -> list[str]:
    """The first of them, one a line below a title that counts all; nothing where there are none."""
    if not mistakes:
        return []
    shown = [
        f"  {mistake.image}: {mistake.said} {mistake.score:.1%}, is {mistake.label} {mistake.label_score:.1%}"
        for mistake in mistakes[:SHOWN_IMAGES]
    ]
    return [f"{title}, {len(shown)} of {len(mistakes)}:", *shown]
