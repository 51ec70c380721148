"""``sep-peft evaluate``: measures an adapter on test images, or by k folds."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import PeftModel

from ..method.recipe import Recipe
from ..training import evaluation
from ..training.cross_validation import cross_validate
from ..training.folders import has_no_test, read_folder, read_test
from ..training.label_evaluation import evaluate_labels
from ..training.label_files import is_label_file, read_labelled_test
from ..training.label_report import write_label_report
from ..training.report import write_report
from ..training.run_log import RUN_FOLDER, SETTINGS_FILE
from ..tuner.json_files import read_json
from ..tuner.messages import shown
from . import measured_labels
from .measured import draw, in_full, in_lines
from .options import SHOTS
from .saving import check_file
from .session import AdapterSource, Result, Session, check_images, listed, load_classifier


#: Parts of the training images where there is nothing to test on, unless told otherwise.
FOLDS = 4


def evaluate(
    source: AdapterSource,
    folder: Path,
    session: Session,
    *,
    base_model: str | None = None,
    new_classes: bool = False,
    zero_shot_margin: float | None = None,
    zero_shot: bool = True,
    batch_size: int = 32,
    plots: Path | None = None,
    report: Path | None = None,
    command: str | None = None,
    folds: int | None = None,
) -> Result:
    """Measure an adapter beside zero-shot, or without test images by k folds what such adapters are worth.

    Args:
        source: of the adapter.
        folder: of images; see `read_test`. Where it has ``train/`` alone, these are measured on by k folds. Or a file
            of labels, see `read_label_file`, for an adapter of which an image may have several classes.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        new_classes: tell apart the classes of `folder` in place of the trained ones.
        zero_shot_margin: for `new_classes`; see `SEPClassifier.set_classes`.
        zero_shot: measure the base model as well.
        batch_size: images at a time.
        plots: folder to draw into, made where it is missing; None: nothing is drawn.
        report: HTML file to write; see `write_report`; None: none.
        command: that was given, for the report; None: not known.
        folds: parts that the training images of `folder` are dealt into; see `cross_validate`. None: 4 where there is
            nothing to test on, else none.

    Raises:
        FileNotFoundError: there is no such adapter.
        NotADirectoryError: there is no such folder, or `report` lies below a file.
        IsADirectoryError: `report` is a folder.
        OSError: `report` cannot be written.
        ValueError: no images, a class that the classifier does not have, or k folds of new classes.
    """
    if report is not None:
        check_file(report, "--report")
    if is_label_file(folder):
        if new_classes or folds is not None or plots is not None:
            raise ValueError(
                f"--new-classes, --folds and --plots are for class folders, but {folder} is a file of labels. Leave "
                "them out."
            )
        return _evaluate_labels(source, folder, session, base_model, zero_shot, batch_size, report, command)
    if folds is not None or has_no_test(folder):
        if new_classes:
            raise ValueError("k folds train anew on the trained classes. Leave out --new-classes.")
        recipe, shots = _trained_by(source.name)
        samples, broken = check_images(read_folder(folder, shots, recipe.seed).train, session)
        classifier = load_classifier(source, base_model, session)
        adapted = cross_validate(classifier, samples, recipe, folds=folds or FOLDS, quiet=session.quiet)
    else:
        samples, broken = check_images(read_test(folder), session)
        classifier = load_classifier(source, base_model, session)
        if new_classes:
            classifier.set_classes(sorted({name for _, name in samples}), zero_shot_margin=zero_shot_margin)
        adapted = evaluation.evaluate(classifier, samples, batch_size, session.progress("SEP"))
    base = None
    if zero_shot:
        with cast(PeftModel, classifier.model).disable_adapter():
            base = evaluation.evaluate(classifier, samples, batch_size, session.progress("zero-shot"))
    if plots is not None:
        draw(adapted, plots)
    found = {"unreadable": listed(broken)}
    result = Result(in_full(adapted, base, classifier) | found, in_lines(adapted, base, classifier))
    if report is None:
        return result
    part = "test" if adapted.folds is None else f"{adapted.folds} folds"
    bases = {} if base is None else {part: base}
    facts = {"command": command, "adapter": source.name, "data": str(folder.resolve())}
    parts = {"title": Path(source.name).name, "unreadable": broken, "facts": facts}
    write_report(report, classifier, {part: adapted}, bases, **parts)
    return result.with_file("report", report)


def _evaluate_labels(
    source: AdapterSource,
    file: Path,
    session: Session,
    base_model: str | None,
    zero_shot: bool,
    batch_size: int,
    report: Path | None,
    command: str | None,
) -> Result:
    """The same where an image may have several classes; arguments as for `evaluate`."""
    samples, broken = check_images(read_labelled_test(file), session)
    classifier = load_classifier(source, base_model, session)
    adapted, base = evaluate_labels(classifier, samples, batch_size, session.progress("SEP")), None
    if zero_shot:
        with cast(PeftModel, classifier.model).disable_adapter():
            base = evaluate_labels(classifier, samples, batch_size, session.progress("zero-shot"))
    data = measured_labels.in_full(adapted, base, classifier) | {"unreadable": listed(broken)}
    result = Result(data, measured_labels.in_lines(adapted, base))
    if report is None:
        return result
    facts = {"command": command, "adapter": source.name, "data": str(file.resolve())}
    parts = {"title": Path(source.name).name, "unreadable": broken, "facts": facts}
    write_label_report(report, classifier, {"test": adapted}, {} if base is None else {"test": base}, **parts)
    return result.with_file("report", report)


def _trained_by(adapter: str) -> tuple[Recipe, int]:
    """The recipe of an adapter and its training images a class, as its run's settings have them; else the defaults.

    Raises:
        ValueError: the settings are damaged; the message names the file.
    """
    file = Path(adapter, RUN_FOLDER, SETTINGS_FILE)
    if not file.is_file():
        return Recipe(), SHOTS
    settings = read_json(file)
    try:
        recipe, shots = Recipe(**settings["recipe"]), settings.get("shots", SHOTS)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold the settings of a training ({shown(str(error))}).") from error
    if type(shots) is not int or shots < 1:
        raise ValueError(f"{file} does not hold the settings of a training (shots is {shown(shots)}).")
    return recipe, shots
