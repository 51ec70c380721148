"""The model card of a classifier: what people and the Hub read first.

The card's text is made anew with each save, between two marks; what its owner wrote around them, and metadata that is
not ours, stays.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from ..tuner.config import SEPConfig
from ..tuner.messages import one_line
from ..version import __version__
from ..words import counted
from .card_data import PrintableCard, PrintableCardData
from .classes import TaskClasses
from .label_scores import LabelClassScore, LabelScore


START = "<!-- sep_peft: from here to the end mark made anew with each save; write your own text around it -->"
END = "<!-- sep_peft: end mark -->"
#: Largest card that is read, in bytes, and longest metadata, in characters.
MAX_BYTES, MAX_METADATA = 2**22, 2**17
PAPER = "https://arxiv.org/abs/2405.15549"
#: Where the package is installed from, also before an index has it.
REPOSITORY = "https://github.com/sep-peft/sep_peft"
#: `library_name` of a card on the Hub, which with "peft" would show PEFT's own lines to load, without the import of
#: sep_peft; and of one in a folder, where Trainer keeps a model's card around its own only if it reads "peft".
HUB_LIBRARY, FOLDER_LIBRARY = "sep_peft", "peft"
#: Heading where nothing is known.
UNTITLED = "SEP adapter"
#: File beside the card with the drawing of the confusion matrix.
CONFUSION_FILE = "sep_confusion.png"
TASK = "zero-shot-image-classification"
TAGS = ("sep", "sep_peft", "peft", "clip", "few-shot", "prompt-learning")
#: Name of our metric in the card's metadata; entries of any other name are their owner's.
METRIC = "Accuracy with SEP"
#: The same for the recall of images and captions, before the direction and the rank.
RECALL_METRIC = "Recall with SEP"
#: Those where an image may have several classes: the type that the Hub knows, its name in the card, and the measure.
LABEL_METRICS = (
    ("mean_average_precision", "Mean average precision with SEP", "mean_average_precision"),
    ("f1", "Micro F1 with SEP", "micro_f1"),
    ("f1", "Macro F1 with SEP", "macro_f1"),
)
OUR_METRICS = (METRIC, RECALL_METRIC, *(name for _, name, _ in LABEL_METRICS))
#: Class names in the card; the others are in the class file.
SHOWN_CLASSES = 100
#: Classes up to which their results stand in the card unfolded.
UNFOLDED_CLASSES = 12

TEMPLATE_FILE = Path(__file__).with_name("card_template.md")
#: For adapters that have no classes.
PAIRS_TEMPLATE_FILE = Path(__file__).with_name("pairs_card_template.md")


@dataclass(frozen=True)
class Score:
    """Accuracy on one set of images.

    Args:
        dataset: name of the set, for people.
        accuracy: of the adapter, in percent; the mean over the seeds.
        zero_shot: of the base model without the adapter on the same images, classes and template, in percent. None:
            not measured.
        spread: standard deviation of `accuracy` over the seeds, in percent points.
        images: how many there were.
        split: such as "test".
        dataset_id: name of the data set on the Hub.
        interval: both ends of a 95 % bootstrap interval of `accuracy`.
        calibration_error: expected calibration error of the scores, in percent; None: not measured.

    Raises:
        ValueError: a share outside of 0 to 100.
    """

    dataset: str
    accuracy: float
    zero_shot: float | None = None
    spread: float | None = None
    images: int | None = None
    split: str = "test"
    dataset_id: str | None = None
    interval: tuple[float, float] | None = None
    calibration_error: float | None = None

    def __post_init__(self):
        _check_shares(self, "accuracy", "zero_shot", "calibration_error")


@dataclass(frozen=True)
class ClassScore:
    """What is known of one class.

    Args:
        name: of the class.
        training_images, images: how many there were to train and to test on.
        accuracy: share of the test images that were told, in percent; None: not tested.
        zero_shot: the same of the base model without the adapter; None: not measured.

    Raises:
        ValueError: a share outside of 0 to 100.
    """

    name: str
    training_images: int
    images: int = 0
    accuracy: float | None = None
    zero_shot: float | None = None

    def __post_init__(self):
        _check_shares(self, "accuracy", "zero_shot")


@dataclass(frozen=True)
class RecallScore:
    """Recall on one set of images with captions, in percent.

    Args:
        dataset: name of the set, for people.
        split: such as "test".
        images, captions: how many images there were, and how many different captions.
        adapted: "image_to_text_1" and so on -> of the adapter.
        frozen: the same of the base model without the adapter.
    """

    dataset: str
    split: str
    images: int
    captions: int
    adapted: Mapping[str, float]
    frozen: Mapping[str, float]


@dataclass(frozen=True)
class CardDetails:
    """What only the owner of an adapter knows about it; everything may be left out.

    Args:
        title: heading of the card; None: the last part of `repo_id`, or the name of the folder.
        description: a few sentences.
        base_model: name of the base model on the Hub; None: where it was loaded from, unless that is a folder.
        repo_id: name that the adapter will have on the Hub; `push_to_hub` fills it in.
        shots: training images per class.
        seeds: of all runs that `scores` are over.
        protocol: how was trained and tested, in a sentence.
        scores: measured accuracies.
        recall_scores: measured recalls of an adapter that was trained on images with captions.
        class_scores: what was measured of each class, in the order in which the card names them.
        label_scores, label_class_scores: the same two where an image may have several classes.
        confusion: PNG of the confusion matrix, which is saved beside the card; None: none.
        datasets: names of the training data on the Hub.
        license: of the adapter, as the Hub abbreviates it, such as "apache-2.0".
        limits: what else to know before using it.

    Raises:
        ValueError: `base_model`, `repo_id` or one of `datasets` is no name on the Hub.
    """

    title: str | None = None
    description: str | None = None
    base_model: str | None = None
    repo_id: str | None = None
    shots: int | None = None
    seeds: Sequence[int] = ()
    protocol: str | None = None
    scores: Sequence[Score] = ()
    recall_scores: Sequence[RecallScore] = ()
    class_scores: Sequence[ClassScore] = ()
    label_scores: Sequence[LabelScore] = ()
    label_class_scores: Sequence[LabelClassScore] = ()
    confusion: bytes | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    limits: str | None = None

    def __post_init__(self):
        named = [("base_model", self.base_model), ("repo_id", self.repo_id)]
        for field, name in (*named, *(("datasets", name) for name in self.datasets)):
            if name is not None and not _is_repo_id(name):
                raise ValueError(f'{field} must be a name on the Hub such as "user/name", but got {name!r}.')


def _check_shares(holder: Score | ClassScore, *names: str) -> None:
    for name in names:
        value = getattr(holder, name)
        if value is not None and not 0 <= value <= 100:
            raise ValueError(f"{name} must be in percent, between 0 and 100, but got {value!r}.")


def is_hub_name(name: str | None) -> bool:
    """Whether `name`, from which something was loaded, is that of a repository on the Hub and no folder here."""
    return bool(name) and not os.path.exists(name) and _is_repo_id(name)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def make_card(
    classes: TaskClasses | None,
    config: SEPConfig,
    base_class: str,
    details: CardDetails,
    *,
    folder: str | None = None,
    subfolder: str | None = None,
    old: ModelCard | None = None,
) -> ModelCard:
    """
    Args:
        classes: of the task; None: the adapter was trained on images with captions.
        config: of the adapter.
        base_class: class of the base model, as transformers calls it.
        details: what else is known.
        folder: name of the folder that it is saved in; None: not known.
        subfolder: of the adapter in its repository.
        old: the card that this one replaces.

    Returns:
        the card, with the metadata and the text of `old` that its owner wrote.
    """
    before, after = _own_text(old)
    data = _metadata(details, PrintableCardData(**(old.data.to_dict() if old else {})), folder)
    return PrintableCard.from_template(
        data,
        template_path=str(PAIRS_TEMPLATE_FILE if classes is None else TEMPLATE_FILE),
        before=before or "\n",
        after=after or "\n",
        start=START,
        end=END,
        heading=_title(details, folder),
        source=_source(details, folder, subfolder),
        local=details.repo_id is None,
        license=data.license,
        repository=REPOSITORY,
        confusion_file=CONFUSION_FILE,
        unfolded_classes=UNFOLDED_CLASSES,
        base_class=base_class,
        classes=classes,
        shown_classes=SHOWN_CLASSES,
        config=config,
        details=details,
        paper=PAPER,
        versions=", ".join(f"{name} {version}" for name, version in package_versions().items()),
        plain=plain,
        code=code,
        own_words=own_words,
        counted=counted,
    )


def read_card(path: str | os.PathLike) -> ModelCard:
    """The card in a file.

    Raises:
        ValueError: its metadata cannot be read or refer to parts of themselves, or it is larger than `MAX_BYTES`; the
            message names the file.
    """
    if (size := os.path.getsize(path)) > MAX_BYTES:
        raise ValueError(f"The model card {os.fspath(path)} has {size} bytes, but at most {MAX_BYTES} are read.")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            _check_metadata(file.read())
        return ModelCard.load(Path(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise ValueError(
            f"The metadata of the model card {os.fspath(path)} cannot be read ({reason}). Mend or delete it."
        ) from error


def _check_metadata(text: str) -> None:
    """Refuse what takes YAML more time and memory than its length: parts that stand for others, again and again."""
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return
    if len(block[2]) > MAX_METADATA:
        raise ValueError(f"they have {len(block[2])} characters, but at most {MAX_METADATA} are read")
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(block[2], Loader=yaml.SafeLoader)):
        raise ValueError("they refer to parts of themselves by *")


def card_for_hub(card: ModelCard, repo_id: str, base_model: str, old: ModelCard | None = None) -> ModelCard:
    """A card that was made for a folder as it is right on the Hub.

    Args:
        card: of a folder; its scores, text and metadata stay.
        repo_id: name of the adapter there.
        base_model: name of its base model there.
        old: the card that is there; what its owner wrote stays, where `card` says nothing else.
    """
    text = card.text
    if START in text and END in text:
        before, rest = text.split(START, 1)
        ours, after = rest.split(END, 1)
        if old is not None and not before.strip() and not after.strip():
            before, after = (own or "\n" for own in _own_text(old))
        text = f"{before}{START}{_renamed(ours, repo_id, base_model)}{END}{after}"
    data = PrintableCardData(**{**(old.data.to_dict() if old else {}), **card.data.to_dict()})
    data.library_name, data.base_model = HUB_LIBRARY, base_model
    data["base_model_relation"] = "adapter"
    return PrintableCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _renamed(ours: str, repo_id: str, base_model: str) -> str:
    """Our part of a card with other names in its lines of Python and in its first sentence."""
    literal, name = r'"(?:[^"\\]|\\.)*"', json.dumps(repo_id)
    for pattern, replacement in (
        (rf"(SEPClassifier\.from_pretrained\(){literal}\)(  # run it where .*)?", rf"\g<1>{name})"),
        (rf"(PeftModel\.from_pretrained\(base, ){literal}", rf"\g<1>{name}"),
        (rf"sep_peft\.SEPConfig\.from_pretrained\({literal}\)\.base_model_name_or_path", json.dumps(base_model)),
        (
            r"an adapter of a CLIP, made",
            f"an adapter of [{plain(base_model)}](https://huggingface.co/{base_model}), made",
        ),
    ):
        ours = re.sub(pattern, replacement, ours)
    return ours


# metadata


def _metadata(details: CardDetails, data: ModelCardData, folder: str | None) -> ModelCardData:
    data.library_name = HUB_LIBRARY if details.repo_id else FOLDER_LIBRARY
    data.pipeline_tag = TASK
    data.base_model = details.base_model or (data.base_model if _is_name(data.base_model) else None)
    data["base_model_relation"] = "adapter" if data.base_model else None
    data.license = details.license or data.license
    # PEFT writes the place that the base model was loaded from into a tag
    data.tags = _joined([tag for tag in data.tags or () if not tag.startswith("base_model:")], TAGS)
    data.datasets = _joined(data.datasets, details.datasets)
    kinds = dict.fromkeys(kind for kind, _, _ in LABEL_METRICS) if details.label_scores else ()
    measured = [*(["accuracy"] if details.scores else []), *(["recall"] if details.recall_scores else []), *kinds]
    data.metrics = _joined(data.metrics, measured)
    results = [result for result in data.eval_results or () if not (result.metric_name or "").startswith(OUR_METRICS)]
    recalls = [result for score in details.recall_scores for result in _recall_results(score)]
    of_labels = [result for score in details.label_scores for result in _label_results(score)]
    data.eval_results = [*results, *map(_result, details.scores), *recalls, *of_labels] or None
    named = None if data.model_name == UNTITLED else data.model_name
    data.model_name = (named or _title(details, folder)) if data.eval_results else None
    return data


def _is_name(base_model) -> bool:
    return isinstance(base_model, str) and is_hub_name(base_model)


def _joined(first: str | Sequence[str] | None, second: Sequence[str]) -> list[str] | None:
    """Both, each once, in order; None for nothing."""
    first = [first] if isinstance(first, str) else list(first or ())
    return list(dict.fromkeys([*first, *second])) or None


def _result(score: Score) -> EvalResult:
    return _eval_result(score, "accuracy", METRIC, score.accuracy, score.dataset_id)


def _recall_results(score: RecallScore) -> list[EvalResult]:
    names = {name: f"{RECALL_METRIC}, {name.replace('_', ' ')}" for name in score.adapted}
    return [_eval_result(score, "recall", names[name], share) for name, share in score.adapted.items()]


def _label_results(score: LabelScore) -> list[EvalResult]:
    return [_eval_result(score, kind, name, getattr(score.adapted, measure)) for kind, name, measure in LABEL_METRICS]


def _eval_result(
    score: Score | RecallScore | LabelScore, kind: str, name: str, value: float, dataset_id: str | None = None
) -> EvalResult:
    """One number of a score, as the Hub lists it."""
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset_id or score.dataset,
        dataset_name=score.dataset,
        dataset_split=score.split,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 2),
    )


# text


def _own_text(old: ModelCard | None) -> tuple[str, str]:
    """What the owner wrote before and after our part."""
    if old is None or _is_untouched_template(old.text):
        return "", ""
    if START in old.text and END in old.text:
        before, rest = old.text.split(START, 1)
        return before, rest.split(END, 1)[1]
    return "", f"\n\n{old.text.strip()}\n"


def _is_untouched_template(text: str) -> bool:
    """Whether it is the card with blanks to fill in that PEFT writes, as it wrote it."""
    template = ModelCard.from_template(ModelCardData()).text
    rest = text.strip().removeprefix(template.strip())
    return rest != text.strip() and re.fullmatch(r"\s*(### Framework versions\s+- PEFT \S+)?", rest) is not None


def _title(details: CardDetails, folder: str | None) -> str:
    return details.title or (details.repo_id or "").split("/")[-1] or folder or UNTITLED


def _source(details: CardDetails, folder: str | None, subfolder: str | None) -> str:
    """Where to load from, as arguments in Python; a folder by its name, without where it lies on this machine."""
    arguments = _string(details.repo_id or folder or "path/to/this/folder")
    return arguments + (f", subfolder={_string(subfolder)}" if subfolder else "")


def _string(text: str) -> str:
    """A literal of Python on one line, without what could be read as one of our marks."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")


def package_versions() -> dict[str, str]:
    """Package -> version, of those that an adapter depends on."""
    versions = {module.__name__: str(module.__version__) for module in (peft, transformers, torch)}
    return {"sep_peft": __version__} | versions


# escapes


def plain(text: str) -> str:
    """A name as Markdown that shows it as it is, on one line, in a cell of a table as well."""
    text = html.escape(one_line(text), quote=False)  # no tag, comment or entity is left
    text = re.sub(r"[\\`*\[\]|~]", r"\\\g<0>", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word an underscore stands for itself


def code(text: str) -> str:
    """A name as code; with what a code span cannot hold, as HTML."""
    if re.search("[`<]|^$", text) or text != one_line(text):
        return f"<code>{plain(text)}</code>"
    return f"`{text}`"


def own_words(text: str) -> str:
    """Markdown of the owner, in which our marks are no marks."""
    return text.replace(START, html.escape(START)).replace(END, html.escape(END))
