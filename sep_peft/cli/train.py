"""``sep-peft train``: trains an adapter, measures it beside zero-shot and saves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from ..classifier.calibration import Calibration
from ..classifier.card import CardDetails, Score
from ..classifier.classes import TEMPLATE
from ..classifier.classifier import SEPClassifier
from ..classifier.label_calibration import LabelCalibration
from ..method.recipe import Recipe
from ..training import evaluation
from ..training.checkpoint import CHECKPOINT_FILE
from ..training.data import names_of
from ..training.fit import fit
from ..training.folders import ImageFolder, read_folder
from ..training.history import History, TrainingInterrupted
from ..training.label_evaluation import evaluate_labels
from ..training.label_files import LabelFile, check_trainable, is_label_file, read_label_file
from ..training.label_report import write_label_report
from ..training.report import has_drawings, write_report
from ..training.run_log import REPORT_FILE, RUN_FOLDER
from ..tuner.config import SEPConfig
from ..words import counted
from .ending import interrupted, protocol, saved_result, with_report
from .measured import between, class_scores, not_tested, untested
from .measured_labels import label_class_scores, label_scores, total_line
from .options import SHOTS
from .saving import Saved, check_output, save_somewhere, saved_bytes
from .session import Result, Session, check_images, listed, load_base


def train(
    folder: Path,
    base_model: str,
    output: Path,
    config: SEPConfig,
    recipe: Recipe,
    session: Session,
    *,
    shots: int | None = None,
    cache: str | None = None,
    template: Sequence[str] | None = None,
    save_dtype: torch.dtype = torch.float32,
    save_processor: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    max_seconds: float | None = None,
    patience: int | None = None,
    keep: Literal["best", "last"] = "best",
    name: str | None = None,
    license: str | None = None,
    report: bool = True,
    command: str | None = None,
) -> Result:
    """Train an adapter, measure it beside zero-shot where there is something to test on, and save it with a card.

    Args:
        folder: of images, see `read_folder`; or a file of labels, of which an image may have several, see
            `read_label_file`.
        base_model: name or folder of the model to adapt.
        output: folder to save into.
        config, recipe: the adapter and how to train it.
        session: how to work.
        shots: training images a class; None: 16. Of a file of labels all train.
        cache: as for `fit`.
        template: texts of the frozen text branch, which are averaged; None: `TEMPLATE`.
        save_dtype: of the weights in the file.
        save_processor: save the base model's processor with the adapter.
        overwrite: replace an adapter, or a training that was not finished, in `output`.
        resume: go on with the training in `output`; where there is none, begin.
        max_seconds, patience, keep: as for `fit`; validation images are those of val/.
        name: of the data in the model card; None: that of `folder`.
        license: of the adapter in the model card; None: none.
        report: write a page to look at beside the adapter; see `write_report`.
        command: that was given, for the settings in the run's folder; None: not known.

    Raises:
        NotADirectoryError: there is no `folder`, or `output` is a file.
        FileExistsError: `output` has an adapter or an unfinished training, and it was not said what to do with it.
        OSError: nothing can be saved in `output`, or its disk has too little room; found out before training.
        ValueError: images that cannot be trained on.
    """
    begun = time.monotonic()
    check_output(output, overwrite, resume)
    images, broken = _readable(_read(folder, shots, recipe.seed), session)
    several = isinstance(images, LabelFile)
    if patience is not None and "val" not in images.tests:
        lacks = "no row of the part val" if several else "no val/ with any"
        raise ValueError(f"--patience needs images to validate on, but {folder} has {lacks}.")
    set_seed(recipe.seed)
    base, processor = load_base(base_model, session)
    model = session.place(get_peft_model(base, config))
    classifier = SEPClassifier.from_class_names(
        model, processor, images.names, template=template or TEMPLATE, recipe=recipe, multi_label=several
    )
    check_output(output, overwrite, resume, needed=saved_bytes(classifier))
    if not resume:
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)  # it may be replaced
    held_out = images.tests.get("val")
    place = folder.resolve()
    name = name or (place.parent if place.is_file() else place).name  # of labels.csv that of its folder
    shots = None if several else shots or SHOTS
    notes = {"command": command, "data": str(folder.resolve()), "base_model": base_model, "shots": shots}
    details = CardDetails(shots=shots, seeds=[recipe.seed], protocol=str(recipe), license=license)
    save = partial(save_somewhere, classifier, output, save_dtype=save_dtype, save_processor=save_processor)
    try:
        history = fit(
            classifier,
            images.train,
            recipe,
            eval_samples=held_out,
            folder=output,
            resume=resume,
            notes=notes,
            max_seconds=max_seconds,
            patience=patience,
            keep=keep,
            quiet=session.quiet,
            cache=cache,
        )
    except TrainingInterrupted as interruption:
        return interrupted(
            interruption,
            save,
            details,
            lambda saved, details, history: _trained(saved, images, details, broken, history, None),
            report,
        )
    measure = partial(_evaluate_parts, classifier, images, recipe.batch_size, session)
    adapted = measure("SEP")
    with cast(PeftModel, classifier.model).disable_adapter():
        zero_shot = measure("zero-shot")
    details = replace(details, protocol=protocol(str(recipe), history, held_out, keep))
    details = _with_scores(details, name, images, adapted, zero_shot)
    part = evaluation.main_part(adapted)
    if report and part is not None and not several and has_drawings():
        details = replace(details, confusion=adapted[part].confusion_png)
    saved = save(details=details)
    result = _trained(saved, images, details, broken, history, classifier.classes.calibration)
    if report:
        parts = {"title": name, "training": images.train, "history": history, "unreadable": broken}
        took = f"{sum(history.seconds):.0f} s in epochs, {time.monotonic() - begun:.0f} s in all"
        facts = {**notes, "recipe": str(recipe), "time": took}
        path = saved.folder / RUN_FOLDER / REPORT_FILE
        write = write_label_report if several else write_report
        told = partial(write, classifier=classifier, evaluations=adapted, zero_shot=zero_shot, facts=facts, **parts)
        result = with_report(result, path, told)
    if history.stopped == "time":
        return replace(result, lines=[*result.lines, f"stopped by time {history}; --resume goes on"])
    if saved.error is None:
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return result


def _with_scores(
    details: CardDetails,
    name: str,
    images: ImageFolder | LabelFile,
    adapted: Mapping[str, Any],
    zero_shot: Mapping[str, Any],
) -> CardDetails:
    """What was measured, for the model card."""
    if isinstance(images, LabelFile):
        scores = label_scores(name, adapted, zero_shot)
        return replace(details, label_scores=scores, label_class_scores=label_class_scores(images, adapted, zero_shot))
    scores = [
        Score(
            name,
            found.accuracy,
            zero_shot[part].accuracy,
            images=found.images,
            split=part,
            interval=found.interval,
            calibration_error=found.calibration_error,
        )
        for part, found in adapted.items()
    ]
    return replace(details, scores=scores, class_scores=class_scores(images, adapted, zero_shot))


def _trained(
    saved: Saved,
    folder: ImageFolder | LabelFile,
    details: CardDetails,
    broken: dict[Path, str],
    history: History,
    calibration: Calibration | LabelCalibration | None,
) -> Result:
    size = (saved.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    data = {
        "adapter": str(saved.folder),
        "error": saved.error,
        "bytes": size,
        "classes": folder.names,
        "training_images": len(folder.train),
        "calibration": calibration and asdict(calibration),
        "scores": [asdict(score) for score in (*details.scores, *details.label_scores)],
        "not_tested": not_tested(folder),
        "unreadable": listed(broken),
        "history": history.to_json(),
    }
    lines = [f"saved {saved.folder} ({size / 1e6:.1f} MB), {counted(len(folder.names), 'class', 'classes')}"]
    lines += [
        f"{score.split}: {score.accuracy:.1f} %{between(score.interval)} with SEP, {score.zero_shot:.1f} % zero-shot, "
        f"{counted(score.images or 0, 'image')}"
        for score in details.scores
    ]
    lines += [
        f"{score.split}: {total_line(score.adapted, score.zero_shot, score.images)}" for score in details.label_scores
    ]
    if history.stopped == "patience":
        lines.append(f"stopped by patience {history}")
    lines += untested(folder, calibration)
    return saved_result(saved, data, lines)


def _evaluate_parts(
    classifier: SEPClassifier, folder: ImageFolder | LabelFile, batch_size: int, session: Session, title: str
) -> dict[str, Any]:
    """Part of the data -> an `Evaluation`, or a `LabelEvaluation` where an image may have several classes."""
    measure: Callable[..., Any] = evaluate_labels if isinstance(folder, LabelFile) else evaluation.evaluate
    return {
        part: measure(classifier, samples, batch_size, session.progress(f"{title}, {part}"))
        for part, samples in folder.tests.items()
    }


def _read(folder: Path, shots: int | None, seed: int) -> ImageFolder | LabelFile:
    """
    Raises:
        NotADirectoryError, ValueError: as `train`.
    """
    if not is_label_file(folder):
        return read_folder(folder, shots or SHOTS, seed)
    if shots is not None:
        raise ValueError(f"--shots counts images of class folders, but {folder} is a file, of which all train.")
    found = read_label_file(folder)
    check_trainable(found, folder)
    return found


def _readable(folder: ImageFolder | LabelFile, session: Session) -> tuple[ImageFolder | LabelFile, dict[Path, str]]:
    """Without images that cannot be read, which are named on standard error."""
    train, broken = check_images(folder.train, session)
    if lost := sorted(set(folder.names) - {name for _, own in train for name in names_of(own)}):
        raise ValueError(f"No training image can be read of {', '.join(lost)}.")
    tests = {}
    for part, samples in folder.tests.items():
        samples, more = check_images(samples, session)
        broken |= more
        if samples:
            tests[part] = samples
    return type(folder)(folder.names, train, tests), broken
