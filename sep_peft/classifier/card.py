"""The model card of a classifier: what people and the Hub read first.

The card's text is made anew with each save, between two marks; what its owner wrote around them, and metadata that is
not ours, stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import peft
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..tuner.config import SEPConfig
from ..version import __version__
from .classes import TaskClasses


START = "<!-- sep_peft: from here to the end mark made anew with each save; write your own text around it -->"
END = "<!-- sep_peft: end mark -->"
PAPER = "https://arxiv.org/abs/2405.15549"
TASK = "zero-shot-image-classification"
TAGS = ("sep", "sep_peft", "clip", "few-shot", "prompt-learning")
#: Name of our metric in the card's metadata; entries of any other name are their owner's.
METRIC = "Accuracy with SEP"
#: Class names in the card; the others are in the class file.
SHOWN_CLASSES = 100

CITATION = """\
```bibtex
@article{yao2024sep,
  title   = {SEP: Self-Enhanced Prompt Tuning for Visual-Language Model},
  author  = {Yao, Hantao and Zhang, Rui and Yu, Lu and Zhang, Yongdong and Xu, Changsheng},
  journal = {arXiv preprint arXiv:2405.15549},
  year    = {2024}
}
```"""
LIMITS = """\
- It answers with one of its classes, whatever the image shows; scores are probabilities among these classes alone.
- What the base model does not see, or sees with a bias, the adapter inherits.
- Its prompts are computed from each input, so it cannot be merged into the base model."""


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

    Raises:
        ValueError: an accuracy outside of 0 to 100.
    """

    dataset: str
    accuracy: float
    zero_shot: float | None = None
    spread: float | None = None
    images: int | None = None
    split: str = "test"
    dataset_id: str | None = None

    def __post_init__(self):
        for name in ("accuracy", "zero_shot"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name} must be in percent, between 0 and 100, but got {value!r}.")


@dataclass(frozen=True)
class CardDetails:
    """What only the owner of an adapter knows about it; everything may be left out.

    Args:
        title: heading of the card; None: the last part of `repo_id`.
        description: a few sentences.
        base_model: name of the base model on the Hub; None: where it was loaded from, unless that is a folder.
        repo_id: name that the adapter will have on the Hub; `push_to_hub` fills it in.
        shots: training images per class.
        seeds: of all runs that `scores` are over.
        protocol: how was trained and tested, in a sentence.
        scores: measured accuracies.
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
    datasets: Sequence[str] = ()
    license: str | None = None
    limits: str | None = None

    def __post_init__(self):
        named = [("base_model", self.base_model), ("repo_id", self.repo_id)]
        for field, name in (*named, *(("datasets", name) for name in self.datasets)):
            if name is not None and not _is_repo_id(name):
                raise ValueError(f'{field} must be a name on the Hub such as "user/name", but got {name!r}.')


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
    classes: TaskClasses,
    config: SEPConfig,
    base_class: str,
    details: CardDetails,
    *,
    subfolder: str | None = None,
    old: ModelCard | None = None,
) -> ModelCard:
    """
    Args:
        classes: of the task.
        config: of the adapter.
        base_class: class of the base model, as transformers calls it.
        details: what else is known.
        subfolder: of the adapter in its repository.
        old: the card that this one replaces.

    Returns:
        the card, with the metadata and the text of `old` that its owner wrote.
    """
    text = f"{START}\n\n{_text(classes, config, base_class, details, subfolder)}\n\n{END}"
    before, after = _own_text(old)
    data = _metadata(details, old.data if old else ModelCardData())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{before or chr(10)}{text}{after or chr(10)}")


def read_card(path: str | os.PathLike) -> ModelCard:
    """The card in a file.

    Raises:
        ValueError: its metadata cannot be read; the message names the file.
    """
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"The metadata of the model card {os.fspath(path)} cannot be read ({error}). Mend or delete it."
        ) from error


# metadata


def _metadata(details: CardDetails, data: ModelCardData) -> ModelCardData:
    data.library_name = "peft"
    data.pipeline_tag = TASK
    data.base_model = details.base_model or (data.base_model if _is_name(data.base_model) else None)
    data["base_model_relation"] = "adapter" if data.base_model else None
    data.license = details.license or data.license
    # PEFT writes the place that the base model was loaded from into a tag
    data.tags = _joined([tag for tag in data.tags or () if not tag.startswith("base_model:")], TAGS)
    data.datasets = _joined(data.datasets, details.datasets)
    data.metrics = _joined(data.metrics, ["accuracy"] if details.scores else [])
    results = [result for result in data.eval_results or () if result.metric_name != METRIC]
    data.eval_results = [*results, *map(_result, details.scores)] or None
    data.model_name = (data.model_name or _title(details)) if data.eval_results else None
    return data


def _is_name(base_model) -> bool:
    return isinstance(base_model, str) and is_hub_name(base_model)


def _joined(first: str | Sequence[str] | None, second: Sequence[str]) -> list[str] | None:
    """Both, each once, in order; None for nothing."""
    first = [first] if isinstance(first, str) else list(first or ())
    return list(dict.fromkeys([*first, *second])) or None


def _result(score: Score) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=score.dataset_id or score.dataset,
        dataset_name=score.dataset,
        dataset_split=score.split,
        metric_type="accuracy",
        metric_name=METRIC,
        metric_value=round(score.accuracy, 2),
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


def _text(classes: TaskClasses, config: SEPConfig, base_class: str, details: CardDetails, subfolder: str | None) -> str:
    parts = [
        f"# {_title(details)}",
        _usage(base_class, details, subfolder),
        details.description,
        _about(classes, config, details),
        _results(details),
        _training(details),
        _classes(classes),
        f"## Limits\n\n{LIMITS}" + (f"\n\n{details.limits}" if details.limits else ""),
        f"## Versions\n\n{_versions()}",
        f"## Paper\n\n[SEP: Self-Enhanced Prompt Tuning for Visual-Language Model]({PAPER})\n\n{CITATION}",
    ]
    return "\n\n".join(part for part in parts if part)


def _title(details: CardDetails) -> str:
    return details.title or (details.repo_id or "SEP adapter").split("/")[-1]


def _usage(base_class: str, details: CardDetails, subfolder: str | None) -> str:
    source = details.repo_id or "path/to/this/folder"
    arguments = f'"{source}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    return f"""\
```bash
pip install sep_peft
```

```python
import sep_peft  # registers the method; without it loaders only say KeyError: 'SEP'

classifier = sep_peft.SEPClassifier.from_pretrained({arguments})
print(classifier.predict("image.jpg", top_k=1))  # [{{"label": ..., "score": ...}}]; a path, a URL or a PIL.Image
```

As a model of PEFT, without the class list:

```python
import sep_peft
from peft import PeftModel
from transformers import {base_class}

base = {base_class}.from_pretrained("{details.base_model or "path/to/the/base/model"}")
model = PeftModel.from_pretrained(base, {arguments})
```"""


def _about(classes: TaskClasses, config: SEPConfig, details: CardDetails) -> str:
    base = f"[{details.base_model}](https://huggingface.co/{details.base_model})" if details.base_model else "a CLIP"
    prompts = f"{config.num_text_prompts} text and {config.num_vision_prompts} image prompts"
    return (
        f"It tells {len(classes)} classes apart: an adapter of {base}, made with SEP, Self-Enhanced Prompt Tuning "
        f"([arXiv 2405.15549]({PAPER})), with {prompts}."
    )


def _results(details: CardDetails) -> str | None:
    if not details.scores:
        return None
    lines = ["| accuracy (%) | images | with SEP | zero-shot |", "|---|---|---|---|"]
    for score in details.scores:
        accuracy = f"{score.accuracy:.1f}" + (f" ± {score.spread:.1f}" if score.spread is not None else "")
        zero_shot = "not measured" if score.zero_shot is None else f"{score.zero_shot:.1f}"
        images = "" if score.images is None else score.images
        lines.append(f"| {score.dataset}, {score.split} | {images} | {accuracy} | {zero_shot} |")
    table = "\n".join(lines)
    return f"## Results\n\n{table}\n\nZero-shot is the base model alone, on the same images, classes and template."


def _training(details: CardDetails) -> str | None:
    seeds = ", ".join(map(str, details.seeds))
    rows = [("Shots", details.shots), ("Seeds", seeds), ("Protocol", details.protocol)]
    lines = [f"- {name}: {value}" for name, value in rows if value not in (None, "")]
    if details.datasets:
        lines.append(
            "- Data: " + ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in details.datasets)
        )
    return "## Training\n\n" + "\n".join(lines) if lines else None


def _classes(classes: TaskClasses) -> str:
    shown = ", ".join(f"`{name}`" for name in classes.names[:SHOWN_CLASSES])
    if more := len(classes) - SHOWN_CLASSES:
        shown += f" and {more} more, see sep_classes.json" if more > 0 else ""
    templates = ", ".join(f"`{text}`" for text in classes.templates) or "made from tensors"
    return f"## Classes\n\n{shown}\n\nTemplate of the frozen text branch: {templates}"


def _versions() -> str:
    versions = {module.__name__: module.__version__ for module in (peft, transformers, torch)}
    return ", ".join(f"{name} {version}" for name, version in ({"sep_peft": __version__} | versions).items())
