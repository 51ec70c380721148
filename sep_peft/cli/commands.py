"""What the commands of ``sep-peft`` do; each returns a `Result`. `app` reads the arguments."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, set_seed

from ..classifier.calibration import Calibration
from ..classifier.card import METRIC, CardDetails, Score, read_card
from ..classifier.classes import TEMPLATE
from ..classifier.classifier import SEPClassifier
from ..classifier.files import MissingClassesError, load_classes, naming_base_model
from ..classifier.image_index import ImageIndex
from ..classifier.images import find_images, other_endings, read_image, warn_left_out
from ..classifier.sharing import push_folder
from ..method.recipe import Recipe
from ..training import evaluation
from ..training.checkpoint import CHECKPOINT_FILE
from ..training.cross_validation import cross_validate
from ..training.fit import fit
from ..training.folders import ImageFolder, Samples, has_no_test, read_folder, read_test, without_unreadable
from ..training.history import History, TrainingInterrupted
from ..training.report import write_report
from ..training.run_log import REPORT_FILE, RUN_FOLDER, SETTINGS_FILE
from ..tuner.config import SEPConfig
from ..tuner.convert import convert_reference_checkpoint
from ..tuner.disk import try_folder
from ..tuner.files import WeightsOrigin, read_shapes
from ..tuner.find_file import check_path, find_file
from ..tuner.json_files import read_json
from ..tuner.messages import shown
from .measured import between, class_scores, draw, in_full, in_lines, not_tested, untested
from .saving import Saved, check_output, save_somewhere, saved_bytes
from .text import one_line


#: Training images a class, and parts of them where there is nothing to test on, unless told otherwise.
SHOTS, FOLDS = 16, 4

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Result:
    """What a command found.

    Args:
        data: for ``--json``.
        lines: for people; they may hold text from outside as it is.
        code: exit code; 1 where something was left out.
    """

    data: Any
    lines: list[str]
    code: int = 0


@dataclass(frozen=True)
class Session:
    """How a command works, whatever it does.

    Args:
        device: where to compute; None: a GPU if there is one.
        token: of the Hub; None: that of ``hf auth login``.
        quiet: without progress.
    """

    device: str | None = None
    token: str | None = None
    quiet: bool = False

    def place(self, model: Model) -> Model:
        """Move a model to the device; returns it."""
        return model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def progress(self, title: str):
        """Wraps what is iterated over, to show progress on standard error."""
        return partial(tqdm, desc=title, disable=self.quiet, file=sys.stderr)


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter is.

    Args:
        name: a folder, or a repository on the Hub.
        revision: branch, tag or commit on the Hub; None: the main branch.
        subfolder: of the folder or repository; None: none.
    """

    name: str
    revision: str | None = None
    subfolder: str | None = None

    def hub_options(self, session: Session) -> dict[str, Any]:
        """Those that were given."""
        options = {"token": session.token, "revision": self.revision}
        return {key: value for key, value in options.items() if value is not None}


# train


def train(
    folder: Path,
    base_model: str,
    output: Path,
    config: SEPConfig,
    recipe: Recipe,
    session: Session,
    *,
    shots: int = SHOTS,
    cache: str | None = None,
    template: Sequence[str] | None = None,
    save_dtype: torch.dtype = torch.float32,
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
        folder: of images; see `read_folder`.
        base_model: name or folder of the model to adapt.
        output: folder to save into.
        config, recipe: the adapter and how to train it.
        session: how to work.
        shots: training images a class.
        cache: as for `fit`.
        template: texts of the frozen text branch, which are averaged; None: `TEMPLATE`.
        save_dtype: of the weights in the file.
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
    images, broken = _readable(read_folder(folder, shots, recipe.seed), session)
    if patience is not None and "val" not in images.tests:
        raise ValueError(f"--patience needs images to validate on, but {folder} has no val/ with any.")
    set_seed(recipe.seed)
    base, processor = _load_base(base_model, session)
    model = session.place(get_peft_model(base, config))
    classifier = SEPClassifier.from_class_names(
        model, processor, images.names, template=template or TEMPLATE, recipe=recipe
    )
    check_output(output, overwrite, resume, needed=saved_bytes(classifier))
    if not resume:
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)  # it may be replaced
    held_out = images.tests.get("val")
    name = name or folder.resolve().name
    notes = {"command": command, "data": str(folder.resolve()), "base_model": base_model, "shots": shots}
    details = CardDetails(shots=shots, seeds=[recipe.seed], protocol=str(recipe), license=license)
    save = partial(save_somewhere, classifier, output, save_dtype=save_dtype)
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
        return _interrupted(interruption, save, details, images, broken)
    measure = partial(_evaluate_parts, classifier, images, recipe.batch_size, session)
    adapted = measure("SEP")
    with cast(PeftModel, classifier.model).disable_adapter():
        zero_shot = measure("zero-shot")
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
    protocol, by_class = _protocol(recipe, history, held_out, keep), class_scores(images, adapted, zero_shot)
    details = replace(details, protocol=protocol, scores=scores, class_scores=by_class)
    part = evaluation.main_part(adapted)
    if report and part is not None and find_spec("matplotlib") is not None:
        details = replace(details, confusion=adapted[part].confusion_png)
    saved = save(details=details)
    result = _trained(saved, images, scores, broken, history, classifier.classes.calibration)
    if report:
        parts = {"title": name, "training": images.train, "history": history, "unreadable": broken}
        took = f"{sum(history.seconds):.0f} s in epochs, {time.monotonic() - begun:.0f} s in all"
        facts = {**notes, "recipe": str(recipe), "time": took}
        path = saved.folder / RUN_FOLDER / REPORT_FILE
        result = _with_report(result, path, classifier, adapted, zero_shot, facts=facts, **parts)
    if history.stopped == "time":
        return replace(result, lines=[*result.lines, f"stopped by time {history}; --resume goes on"])
    if saved.error is None:
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return result


def _with_report(result: Result, path: Path, *measured: Any, **parts: Any) -> Result:
    """A result with the report that was written, if any: what was trained is worth more than a page about it."""
    try:
        write_report(path, *measured, **parts)
    except Exception as error:
        warn(f"no report could be written: {str(error).strip() or type(error).__name__}")
        return replace(result, data=result.data | {"report": None})
    return replace(result, data=result.data | {"report": str(path)}, lines=[*result.lines, f"report: {path}"])


def _interrupted(
    interruption: TrainingInterrupted,
    save: Callable[..., Saved],
    details: CardDetails,
    images: ImageFolder,
    broken: dict[Path, str],
) -> Result:
    """Save what there is; nothing is measured, because whoever interrupts waits for the end."""
    code = 143 if interruption.history.stopped == "SIGTERM" else 130
    if not interruption.history.rows:
        data = {"adapter": None, "history": interruption.history.to_json()}
        return Result(data, [f"{interruption}, so there is nothing to save"], code)
    saved = save(details=replace(details, protocol=f"{details.protocol}; {interruption}"))
    result = _trained(saved, images, [], broken, interruption.history, None)
    return replace(result, code=code, lines=[*result.lines, f"{interruption}; --resume goes on"])


def _protocol(recipe: Recipe, history: History, held_out: Samples | None, keep: Literal["best", "last"]) -> str:
    """How it was trained, for the model card."""
    ended = "" if history.stopped is None else f"; stopped by {history.stopped} {history}"
    if held_out is None or keep == "last":
        return f"{recipe}{ended}"
    return f"{recipe}{ended}; the weights of epoch {history.best}, the best on {len(held_out)} images of val"


def _trained(
    saved: Saved,
    folder: ImageFolder,
    scores: list[Score],
    broken: dict[Path, str],
    history: History,
    calibration: Calibration | None,
) -> Result:
    size = (saved.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    data = {
        "adapter": str(saved.folder),
        "error": saved.error,
        "bytes": size,
        "classes": folder.names,
        "training_images": len(folder.train),
        "calibration": calibration and asdict(calibration),
        "scores": [asdict(score) for score in scores],
        "not_tested": not_tested(folder),
        "unreadable": _listed(broken),
        "history": history.to_json(),
    }
    lines = [f"saved {saved.folder} ({size / 1e6:.1f} MB), {len(folder.names)} classes"]
    lines += [
        f"{score.split}: {score.accuracy:.1f} %{between(score.interval)} with SEP, {score.zero_shot:.1f} % zero-shot, "
        f"{score.images} images"
        for score in scores
    ]
    if history.stopped == "patience":
        lines.append(f"stopped by patience {history}")
    lines += untested(folder, calibration)
    if saved.error is not None:
        warn(f"the adapter is in {saved.folder}, because saving where it was asked for failed: {saved.error}")
    return Result(data, lines, code=0 if saved.error is None else 1)


def _evaluate_parts(
    classifier: SEPClassifier, folder: ImageFolder, batch_size: int, session: Session, title: str
) -> dict[str, evaluation.Evaluation]:
    return {
        part: evaluation.evaluate(classifier, samples, batch_size, session.progress(f"{title}, {part}"))
        for part, samples in folder.tests.items()
    }


def _readable(folder: ImageFolder, session: Session) -> tuple[ImageFolder, dict[Path, str]]:
    """Without images that cannot be read, which are named on standard error."""
    train, broken = _check_images(folder.train, session)
    if lost := sorted(set(folder.names) - {name for _, name in train}):
        raise ValueError(f"No training image can be read of {', '.join(lost)}.")
    tests = {}
    for part, samples in folder.tests.items():
        samples, more = _check_images(samples, session)
        broken |= more
        if samples:
            tests[part] = samples
    return ImageFolder(folder.names, train, tests), broken


# predict


def predict(
    source: AdapterSource,
    images: Sequence[str],
    session: Session,
    *,
    base_model: str | None = None,
    classes: Sequence[str] | None = None,
    zero_shot_margin: float | None = None,
    top_k: int | None = None,
    batch_size: int = 32,
    **asked: Any,
) -> Result:
    """Classify images; those that cannot be read are named, and the others classified all the same.

    Args:
        source: of the adapter.
        images: files, folders or addresses.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        classes: names in place of the trained ones.
        zero_shot_margin: for `classes`; see `SEPClassifier.set_classes`.
        top_k: classes to name for each image; None: all, but at most 5.
        batch_size: images at a time.
        asked: `min_score`, `unknown` and `coverage`, as for `SEPClassifier.predict`.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: there are no images, or what is asked for is not allowed or not known.
    """
    paths = [path for given in images for path in _images(given)]
    if not paths:
        raise ValueError(f"There are no images in {', '.join(images)}.")
    classifier = _load(source, base_model, session)
    if classes:
        classifier.set_classes(classes, zero_shot_margin=zero_shot_margin)
    if asked.get("coverage") is None:
        top_k = top_k or min(5, len(classifier.classes))
    data = []
    for start in session.progress("batches")(range(0, len(paths), batch_size)):
        data += _predict_batch(classifier, paths[start : start + batch_size], {"top_k": top_k, **asked})
    broken = {entry["image"]: entry["error"] for entry in data if "error" in entry}
    _warn(broken)
    lines = [_prediction_line(entry) for entry in data if "error" not in entry]
    return Result(data, lines, code=1 if broken else 0)


def _images(given: str) -> list[str]:
    if not os.path.isdir(given):
        return [given]
    warn_left_out(given, other_endings(given))
    return [str(path) for path in find_images(given)]


def _predict_batch(classifier: SEPClassifier, images: list[str], asked: dict[str, Any]) -> list[dict]:
    """For each image an entry with its prediction or with what is wrong with it."""
    entries, read = [{"image": path} for path in images], []
    for entry in entries:
        try:
            read.append((entry, read_image(entry["image"])))
        except ValueError as error:
            entry["error"] = str(error)
    predictions = classifier.predict([image for _, image in read], batch_size=len(entries), **asked)
    for (entry, _), prediction in zip(read, predictions, strict=True):
        entry["prediction"] = prediction
    return entries


def _prediction_line(entry: dict) -> str:
    said = ", ".join(f"{top['label']} {top['score']:.1%}" for top in entry["prediction"])
    return f"{entry['image']}: {said or 'none of these'}"


# search


def search(
    source: AdapterSource,
    folder: Path,
    query: str,
    session: Session,
    *,
    base_model: str | None = None,
    top_k: int = 10,
    index: Path | None = None,
    batch_size: int = 32,
) -> Result:
    """Find the images in a folder that are most similar to an image or a text.

    Args:
        source: of the adapter.
        folder: images in it and below are searched.
        query: a file, an address of an image, or a text.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        top_k: images to name.
        index: file that keeps the embeddings; None: one in the cache.
        batch_size: images embedded at a time.

    Raises:
        FileNotFoundError: there is no such adapter.
        NotADirectoryError: there is no such folder.
        ValueError: it holds no image that can be read, the image cannot be read, or the text does not fit.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}.")
    classifier = _load(source, base_model, session)
    warn_left_out(folder, other_endings(folder))
    shown = os.path.exists(query) or query.startswith(("http://", "https://"))
    embed = classifier.embed(query) if shown else classifier.embed_texts(query)
    found = ImageIndex.of_folder(
        folder,
        classifier.model,
        classifier.processor,
        file=index,
        batch_size=batch_size,
        progress=session.progress("batches"),
    )
    _warn(found.unreadable)
    best = [{"image": str(folder / name), "similarity": cosine} for name, cosine in found.search(embed, top_k)]
    data = {
        "query": {"image" if shown else "text": query},
        "found": best,
        "images": len(found.names),
        "embedded": found.embedded,
        "unreadable": _listed({folder / name: error for name, error in found.unreadable.items()}),
    }
    lines = [f"{entry['similarity']:.3f} {entry['image']}" for entry in best]
    return Result(data, lines, code=1 if found.unreadable else 0)


# evaluate


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
        folder: of images; see `read_test`. Where it has ``train/`` alone, these are measured on by k folds.
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
        if report.is_dir():
            raise IsADirectoryError(f"--report takes the name of a file, but {report} is a folder.")
        try_folder(report.parent)
    if folds is not None or has_no_test(folder):
        if new_classes:
            raise ValueError("k folds train anew on the trained classes. Leave out --new-classes.")
        recipe, shots = _trained_by(source.name)
        samples, broken = _check_images(read_folder(folder, shots, recipe.seed).train, session)
        classifier = _load(source, base_model, session)
        adapted = cross_validate(classifier, samples, recipe, folds=folds or FOLDS, quiet=session.quiet)
    else:
        samples, broken = _check_images(read_test(folder), session)
        classifier = _load(source, base_model, session)
        if new_classes:
            classifier.set_classes(sorted({name for _, name in samples}), zero_shot_margin=zero_shot_margin)
        adapted = evaluation.evaluate(classifier, samples, batch_size, session.progress("SEP"))
    base = None
    if zero_shot:
        with cast(PeftModel, classifier.model).disable_adapter():
            base = evaluation.evaluate(classifier, samples, batch_size, session.progress("zero-shot"))
    if plots is not None:
        draw(adapted, plots)
    found = {"unreadable": _listed(broken)}
    result = Result(in_full(adapted, base, classifier) | found, in_lines(adapted, base, classifier))
    if report is None:
        return result
    part = "test" if adapted.folds is None else f"{adapted.folds} folds"
    bases = {} if base is None else {part: base}
    facts = {"command": command, "adapter": source.name, "data": str(folder.resolve())}
    parts = {"title": Path(source.name).name, "unreadable": broken, "facts": facts}
    write_report(report, classifier, {part: adapted}, bases, **parts)
    return replace(result, data=result.data | {"report": str(report)}, lines=[*result.lines, f"report: {report}"])


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


# import-reference


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
    base, processor = _load_base(base_model, session) if names else (_load_base_model(base_model, session), None)
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
    found = f"{len(names)} classes" if names else "no class list"
    line = f"saved {output}, {found}; {len(report.unused)} entries of the checkpoint were not needed"
    return Result(data, [line])


# info


def info(source: AdapterSource, session: Session) -> Result:
    """Read an adapter's files, but neither its base model nor more of its weights than their header.

    Args:
        source: of the adapter.
        session: how to work.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is one of another method, or a file of it is missing or damaged.
    """
    options = source.hub_options(session)
    config = SEPConfig.of_adapter(source.name, source.subfolder, **options)
    weights = cast(WeightsOrigin, config.take_weights_origin()).find()  # it has just been read
    if weights is None:
        raise ValueError(f"{source.name} holds the configuration of an adapter, but no weights. Copy it again.")
    parameters = sum(shape.numel() for shape in read_shapes(weights).values())
    try:
        classes = load_classes(source.name, source.subfolder, options)
    except MissingClassesError:  # an adapter of a plain model
        classes = None
    data = {
        "adapter": source.name,
        "base_model": config.base_model_name_or_path,
        "model_type": (config.base_architecture or {}).get("model_type"),
        "text_prompts": config.num_text_prompts,
        "vision_prompts": config.num_vision_prompts,
        "fusion": config.fusion,
        "frozen_weight": config.frozen_weight,
        "batch_coupled": config.batch_coupled,
        "parameters": parameters,
        "bytes": os.path.getsize(weights),
        "classes": list(classes.names) if classes else [],
        "templates": list(classes.templates) if classes else [],
        "scores": _scores(source, options),
    }
    return Result(data, [f"{key.replace('_', ' '):<15}{_shown(value)}" for key, value in data.items()])


def _scores(source: AdapterSource, options: Mapping[str, Any]) -> list[dict]:
    """As the adapter's model card gives them."""
    try:
        card = read_card(find_file(source.name, REPOCARD_NAME, source.subfolder, options))
    except OSError:  # there is none
        return []
    except ValueError as error:
        warnings.warn(f"No scores are shown: {error}", stacklevel=2)
        return []
    results = [result for result in getattr(card.data, "eval_results", None) or () if result.metric_name == METRIC]
    return [{"dataset": r.dataset_name, "split": r.dataset_split, "accuracy": r.metric_value} for r in results]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        items = [" ".join(map(str, item.values())) if isinstance(item, dict) else str(item) for item in value]
        return "; ".join(items) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# push


def push(
    adapter: Path, repo_id: str, session: Session, *, private: bool | None = None, base_model: str | None = None
) -> Result:
    """Upload a saved adapter; arguments as for `push_folder`."""
    pushed = push_folder(adapter, repo_id, private=private, token=session.token, base_model=base_model)
    return Result(asdict(pushed), [pushed.url])


# what they share


def _load_base(name: str, session: Session) -> tuple[torch.nn.Module, Any]:
    model = _load_base_model(name, session)
    with naming_base_model(name):
        return model, AutoProcessor.from_pretrained(name, token=session.token, trust_remote_code=False)


def _load_base_model(name: str, session: Session) -> torch.nn.Module:
    with naming_base_model(name):
        return AutoModel.from_pretrained(name, token=session.token, trust_remote_code=False)


def _load(source: AdapterSource, base_model: str | None, session: Session) -> SEPClassifier:
    check_path(source.name)  # before a base model is loaded for it
    options = {"subfolder": source.subfolder, **source.hub_options(session)}
    if base_model is None:
        classifier = SEPClassifier.from_pretrained(source.name, **options)
    else:
        base, processor = _load_base(base_model, session)
        classifier = SEPClassifier.from_pretrained(source.name, model=base, processor=processor, **options)
    return session.place(classifier)


def _check_images(samples: Samples, session: Session) -> tuple[Samples, dict[Path, str]]:
    samples, broken = without_unreadable(samples, session.progress("reading images"))
    _warn(broken)
    return samples, broken


def _warn(broken: Mapping[Any, str]) -> None:
    """Name and count images on standard error."""
    for error in broken.values():
        warn(error)
    if broken:
        warn(f"{len(broken)} images cannot be read and are left out")


def warn(message: str) -> None:
    """Tell something that does not end the command, on standard error."""
    print(f"sep-peft: warning: {one_line(message)}", file=sys.stderr)


def _listed(broken: Mapping[Path, str]) -> list[dict[str, str]]:
    return [{"image": str(path), "error": error} for path, error in broken.items()]
