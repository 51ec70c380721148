"""A report of a training or an evaluation for people: one HTML file that asks nobody for anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..classifier.calibration import Calibration
from ..classifier.card import package_versions
from ..classifier.classifier import SEPClassifier
from ..tuner.files import replace_files
from ..tuner.messages import printable
from ..words import counted
from . import plots
from .duplicates import Duplicate, near_duplicates
from .evaluation import Evaluation, Mistake, main_part
from .findings import find
from .folders import Samples
from .history import History
from .run_log import CURVES_FILE
from .thumbnails import data_uri, marked_thumbnail, thumbnail


TEMPLATE_FILE = Path(__file__).with_name("report_template.html")
#: Images of each kind that are shown, pairs of duplicates and pairs of classes.
SHOWN_IMAGES, SHOWN_PAIRS, SHOWN_CONFUSIONS = 12, 6, 10


@dataclass(frozen=True)
class Shown:
    """An image in the page.

    Args:
        uri: its data.
        mistake: what was said of it, and what it is.
        name: of its file; empty where it has none.
    """

    uri: str
    mistake: Mistake
    name: str


@dataclass(frozen=True)
class Row:
    """A class in the page.

    Args:
        name: of the class.
        counts: of its images in each part, in the order of the parts.
        accuracy, zero_shot: shares of its test images that were told, in percent; None: not measured.
        taken_for: the class that its other images are taken for most often, and how many are; None: none is.
    """

    name: str
    counts: list[int]
    accuracy: float | None
    zero_shot: float | None
    taken_for: tuple[str, int] | None


def write_report(
    path: str | os.PathLike,
    classifier: SEPClassifier,
    evaluations: Mapping[str, Evaluation],
    zero_shot: Mapping[str, Evaluation] | None = None,
    *,
    title: str = "SEP adapter",
    training: Samples = (),  # pyright: ignore[reportArgumentType]  # read alone
    history: History | None = None,
    unreadable: Mapping[Any, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an HTML file with everything to look at: no scripts, nothing from elsewhere, images in the file itself.

    Accuracy beside zero-shot with intervals, each class, the confusion matrix, reliability before and after
    calibration, the most wrong and the least sure images with the patches that SEP selected, images that are nearly the
    same in training and test, and what else to know before the result is trusted. With `history` its curves, which are
    written beside the file as well. Drawings need matplotlib, the extra ``[plot]``; without it the page says so.

    Args:
        path: of the file; its folder is made where it is missing.
        classifier: that was measured, as it was measured.
        evaluations: part of the data, such as "test", -> what `evaluate` found. The details are those of "test", or of
            the last one. Empty: nothing was measured.
        zero_shot: the same without the adapter, for parts on which that was measured; None: on none.
        title: heading.
        training: images that were trained on and names of their classes; their embeddings are compared with those of
            the test images. Empty: not known.
        history: of the training; None: not known.
        unreadable: image -> what is wrong with it, of those that were left out; None: none were.
        facts: what else to say, such as {"command": "sep-peft train ..."}, without those that are None; None: nothing.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.

    Example:
        >>> found = evaluate(classifier, images.tests["test"])
        >>> write_report("report.html", classifier, {"test": found}, training=images.train, history=history)
    """
    zero_shot, unreadable = zero_shot or {}, unreadable or {}
    duplicates = near_duplicates(classifier, evaluations, training) if training else {}
    calibration = _calibration(classifier)
    part = main_part(evaluations)
    page = {
        "title": title,
        "evaluations": evaluations,
        "zero_shot": zero_shot,
        "before": {name: _uncalibrated(each, classifier) for name, each in evaluations.items()},
        "calibration": calibration,
        "findings": find(
            classifier.class_names, evaluations, zero_shot, training, calibration, history, unreadable, duplicates
        ),
        "part": part,
        "parts": [*(["training"] if training else []), *evaluations],
        "rows": _rows(classifier.class_names, evaluations, zero_shot, training, part),
        "duplicates": [
            (thumbnail(each.image), thumbnail(each.other), each, file_name(each.image), file_name(each.other))
            for each in _strongest(duplicates)
        ],
        "history": history,
        "facts": facts or {},
        "drawn": has_drawings(),
        **_of_part(classifier, evaluations.get(part or "")),
    }
    page["drawings"] = _drawings(page, history)
    write_page(path, TEMPLATE_FILE.name, page, plots.curves)


def write_page(
    path: str | os.PathLike,
    template: str,
    page: Mapping[str, Any],
    curves: Callable[[History, Path], Any] | None = None,
) -> None:
    """Write an HTML file from a template of this folder, and beside it the curves of a training.

    Args:
        path: of the file; its folder is made where it is missing.
        template: name of its file.
        page: what the template names, without the versions of packages.
        curves: draws those of ``page["history"]`` into a file; None: there are none.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    path = Path(path)
    text = environment().get_template(template).render(page, versions=package_versions())
    with replace_files(path.parent) as temporary:
        Path(temporary, path.name).write_text(text, encoding="utf-8")
        if curves is not None and has_curves(page["history"]):
            curves(page["history"], Path(temporary, CURVES_FILE))


def curves_of(history: History | None, curves: Callable[[History, None], Any]) -> dict[str, str]:
    """{"curves": drawing}, empty where there are none to draw."""
    return {"curves": data_uri("png", plots.png(curves(history, None)))} if has_curves(history) else {}


def has_curves(history: History | None) -> TypeGuard[History]:
    """Whether a training has epochs to draw, and there is what draws them."""
    return history is not None and bool(history.rows) and has_drawings()


def has_drawings() -> bool:
    """Whether matplotlib is there, which draws."""
    return find_spec("matplotlib") is not None


def environment() -> Environment:
    """Of templates in which every value is escaped, for HTML and for what acts on a reader, and none may be missing."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATE_FILE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    made.globals["counted"] = counted
    return made


def _plain(value: Any) -> Any:
    """Text from outside so that it acts on nothing; what a macro made is HTML already."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _of_part(classifier: SEPClassifier, evaluation: Evaluation | None) -> dict[str, Any]:
    """The images and pairs of classes that are shown of an evaluation."""
    if evaluation is None:
        return {"wrong": [], "unsure": [], "mislabelled": [], "confused": []}
    kinds = {"wrong": evaluation.wrong, "unsure": evaluation.unsure, "mislabelled": evaluation.mislabelled}
    seen: dict[int, str] = {}  # many an image is of two kinds
    shown: dict[str, Any] = {}
    for kind, found in kinds.items():
        shown[kind] = []
        for each in found[:SHOWN_IMAGES]:
            if id(each.image) not in seen:
                seen[id(each.image)] = marked_thumbnail(classifier, each.image)
            shown[kind].append(Shown(seen[id(each.image)], each, file_name(each.image)))
    return {**shown, "confused": _confused(evaluation)}


def _confused(evaluation: Evaluation) -> list[tuple[str, str, int]]:
    """Class, what its images were taken for, and how many were, the most frequent first."""
    counts, names = evaluation.confusion, evaluation.names
    pairs = [
        (names[row], names[column], int(counts[row, column]))
        for row, column in counts.nonzero().tolist()
        if row != column
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:SHOWN_CONFUSIONS]


def _drawings(page: Mapping[str, Any], history: History | None) -> dict[str, str]:
    """Name -> drawing; empty without matplotlib."""
    found: dict[str, str] = {}
    if not page["drawn"]:
        return found
    found |= curves_of(history, plots.curves)
    if page["part"] is not None:
        evaluation, before = page["evaluations"][page["part"]], page["before"][page["part"]]
        found["confusion"] = data_uri("png", evaluation.confusion_png)
        found["reliability"] = data_uri("png", plots.png(evaluation.plot_reliability()))
        if page["calibration"] is not None:
            found["before"] = data_uri("png", plots.png(before.plot_reliability()))
    return found


def _rows(
    names: Sequence[str],
    evaluations: Mapping[str, Evaluation],
    zero_shot: Mapping[str, Evaluation],
    training: Samples,
    part: str | None,
) -> list[Row]:
    """Of all classes, those that are told least often first, then those that were not tested."""
    counts = [Counter(name for _, name in training)] if training else []
    counts += [Counter(each.count) for each in evaluations.values()]
    found = evaluations.get(part or "")
    base = zero_shot.get(part or "")
    rows = []
    for name in names:
        taken_for = None if found is None else _taken_for(found, name)
        accuracy = None if found is None else found.per_class.get(name)
        base_accuracy = None if base is None else base.per_class.get(name)
        rows.append(Row(name, [count[name] for count in counts], accuracy, base_accuracy, taken_for))
    return sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy))


def _taken_for(found: Evaluation, name: str) -> tuple[str, int] | None:
    place = found.names.index(name)
    others = found.confusion[place].clone()
    others[place] = 0
    return (found.names[int(others.argmax())], int(others.max())) if others.any() else None


def _uncalibrated(found: Evaluation, classifier: SEPClassifier) -> Evaluation:
    """The same as scores were without a calibration: softmax of logits that are not divided by its temperature."""
    calibration = _calibration(classifier)
    if calibration is None:
        return found
    scores = (found.scores.double().log() * calibration.temperature).softmax(dim=1)
    return replace(found, scores=scores, calibration=None)


def _calibration(classifier: SEPClassifier) -> Calibration | None:
    """That of the classes, of which an image has one."""
    calibration = classifier.classes.calibration
    return calibration if isinstance(calibration, Calibration) else None


def _strongest(duplicates: Mapping[str, Sequence[Duplicate]]) -> list[Duplicate]:
    """Those with another label first, then the most similar."""
    every = [each for found in duplicates.values() for each in found]
    return sorted(every, key=lambda each: (each.label == each.other_label, -each.similarity))[:SHOWN_PAIRS]


def file_name(image: Any) -> str:
    """The last two parts of a file's path; an address as it is."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return image
    return "/".join(Path(image).parts[-2:]) if isinstance(image, (str, os.PathLike)) else ""
