"""Tells transformers' `pipeline` of adapters: ``pipeline("image-classification", model="adapter")`` loads a classifier.

By itself it would load the base model with a new head that nobody has trained, and call its guesses an answer. Its
table of tasks says which classes may load a model, and which one is the pipeline; both get one in front that knows
adapters of SEP and lets everything else through. What loads a classifier is imported when one is met.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import pipelines


#: Task of transformers -> the name of its pipeline there.
TASKS = {
    "image-classification": "ImageClassificationPipeline",
    "zero-shot-image-classification": "ZeroShotImageClassificationPipeline",
}
#: What `pipeline` asks of the class of a pipeline before it has a model: which parts of a processor to load. Older
#: releases of transformers do not ask for all of them.
PARTS = ("_load_tokenizer", "_load_image_processor", "_load_video_processor")
PARTS += ("_load_feature_extractor", "_load_processor")


def register() -> None:
    """Put them in front, once."""
    for task, name in TASKS.items():
        _, entry, _ = pipelines.PIPELINE_REGISTRY.check_task(task)
        if AdapterModel not in entry["pt"]:
            original = getattr(pipelines, name)
            parts = {part: getattr(original, part) for part in PARTS if hasattr(original, part)}
            entry["pt"] = (AdapterModel, *entry["pt"])
            entry["impl"] = type(name, (AdapterPipeline,), {"original": original, **parts})


class AdapterModel:
    """Loads adapters of SEP as a pipeline's model, and nothing else."""

    @classmethod
    def from_pretrained(cls, path: str, *, _from_pipeline: str, **options: Any) -> Any:
        """
        Raises:
            ValueError: `path` is no such adapter, so that transformers goes on to its own classes.
        """
        return _ours().load_for_pipeline(path, _from_pipeline, **options)


class AdapterPipeline:
    """Makes the pipeline that suits a model: ours for what `AdapterModel` loaded, transformers' for all others."""

    original: type

    def __new__(cls, model: Any, task: str, **options: Any) -> Any:
        ours = type(model).__module__ == f"{__package__}.classifier.pipelines"
        make = _ours().pipeline_class(model, task) if ours else cls.original
        return make(model=model, task=task, **options)


def _ours() -> Any:
    return import_module(f"{__package__}.classifier.pipelines")
