"""A classifier as transformers' pipelines expect a model to look, and what loads one for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.pipelines.base import Pipeline
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline
from transformers.utils.peft_utils import find_adapter_config_file

from ..tuner.json_files import read_json
from ..tuner.modes import evaluating
from .answers import Answers
from .classes import check_class_names
from .classifier import SEPClassifier
from .files import MissingClassesError, has_processor, load_base, load_base_image_processor, load_classes
from .images import read_image
from .prediction import Task, check_answers, image_logits
from .processors import processor_part


logger = logging.getLogger(__name__)

#: What an image processor says of its own class, which does not change an image.
CLASS_NAMES = ("image_processor_type", "processor_class", "feature_extractor_type")


class ImageClassifier(nn.Module):
    """For `pipeline("image-classification", ...)`: a `SEPClassifier` with the classes that it has when it is asked.

    Args:
        classifier: its classes and its model's active adapter are used. It is shared, not copied.

    Example:
        >>> from transformers import pipeline
        >>> classify = pipeline(
        ...     "image-classification", model=ImageClassifier(classifier), image_processor=processor.image_processor
        ... )
        >>> classify("image.jpg", top_k=1)
        [{'label': 'lobster', 'score': 0.98}]
    """

    def __init__(self, classifier: SEPClassifier):
        super().__init__()
        self.classifier = classifier
        self._config = PreTrainedConfig()
        self._own = self._asked = classifier.classes
        self._question: tuple[list[str], str | None] | None = None
        self.processors: Processors | None = None  # where the adapter was loaded by its name and has one beside it

    @property
    def config(self) -> PreTrainedConfig:
        """With the labels of the classifier's present classes."""
        several = self.classifier.classes.multi_label  # of which the pipeline takes the sigmoid
        self._config.problem_type = "multi_label_classification" if several else "single_label_classification"
        names = dict(enumerate(self.classifier.class_names))
        if self._config.id2label != names:
            self._config.id2label, self._config.label2id = names, {name: index for index, name in names.items()}
        return self._config

    def ask(self, names: Sequence[str], template: str | None) -> None:
        """Have the classifier tell these classes, by a template of the frozen branch; None: those that it came with."""
        classifier, question = self.classifier, (list(names), template)
        if question == self._question and classifier.classes is self._asked:  # which others may have set since
            return
        own = list(self._own.templates) or None
        if not template and not own:
            classifier.set_classes(self._own)  # `set_classes` keeps the template that it finds
        self._asked = classifier.set_classes(names, template or own).classes
        self._question = question

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model that adapters were added to; images are cast to it."""
        return next(self.classifier.vision_tower.base_layer.parameters()).dtype

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """(B, channels, height, width) -> logits (B, C), in evaluation whatever the mode of the classifier."""
        classifier, inputs = self.classifier, {"pixel_values": pixel_values}
        check_answers(Answers(), [Task(None, classifier.encoder)])  # what has no scores is no answer of a pipeline
        with evaluating(classifier.model):
            weights = classifier.encoder.weights(training=False)
            return ImageClassifierOutput(logits=image_logits(classifier.vision_tower, inputs, weights))


@dataclass(frozen=True)
class Processors:
    """Who makes of an image what a model takes, where an adapter has an image processor beside it.

    Args:
        beside: the adapter's image processor.
        of_base: what that of the base model says of itself, which `pipeline` takes unless it is told otherwise.
    """

    beside: ImageProcessingMixin
    of_base: dict[str, Any]

    def chosen(self, handed: Any) -> Any:
        """The image processor to take: the adapter's in the place of the base model's, or what the user handed in.

        Args:
            handed: what `pipeline` loaded or was given.
        """
        if not isinstance(handed, ImageProcessingMixin):
            return handed
        of_handed = _said_of(handed)
        if of_handed == _said_of(self.beside) or of_handed != self.of_base:
            return handed
        logger.warning(
            "The adapter's own image processor is used, which differs from that of its base model. Pass "
            "image_processor=... to use another one than both."
        )
        return self.beside


def _said_of(processor: ImageProcessingMixin) -> dict[str, Any]:
    """What an image processor does to an image, without the names of classes that do it."""
    return {name: value for name, value in processor.to_dict().items() if name not in CLASS_NAMES}


class OwnImageProcessor(Pipeline):
    """A pipeline of an adapter, which reads images as its classifier does."""

    def __init__(self, *, model: Any, image_processor: Any = None, **options: Any):
        if isinstance(model, ImageClassifier) and model.processors is not None:
            image_processor = model.processors.chosen(image_processor)
        super().__init__(model=cast(Any, model), image_processor=image_processor, **options)


class SEPImageClassification(OwnImageProcessor, ImageClassificationPipeline):
    """`pipeline("image-classification", model=adapter)`: the scores of `SEPClassifier.predict`, read by its reader."""

    def check_model_type(self, supported_models: Any) -> None:
        """The model is the one that this was made for, which transformers' list does not know."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        """One image as `read_image` takes it -> what the model takes; addresses have a time limit of their own."""
        return super().preprocess(read_image(image), timeout)


class SEPZeroShot(OwnImageProcessor, ZeroShotImageClassificationPipeline):
    """`pipeline("zero-shot-image-classification", model=adapter)`: the scores of a classifier with other classes.

    They are set by `SEPClassifier.set_classes`, so labels that were trained have their prototypes and calibration, and
    others the margin of zero-shot. Without a `hypothesis_template` the frozen branch reads the adapter's own.
    """

    _load_tokenizer = False

    def check_model_type(self, supported_models: Any) -> None:
        """The model is the one that this was made for, which transformers' list does not know."""

    def preprocess(
        self,
        image: Any,
        candidate_labels: Sequence[str] = (),
        hypothesis_template: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """One image as `read_image` takes it -> what the model takes, with what it is asked for."""
        processor = cast(Any, self.image_processor)  # which `pipeline` has loaded
        labels: Any = candidate_labels
        if not isinstance(labels, str):
            labels = list(dict.fromkeys(labels))  # a score for each, in this order
        check_class_names(labels)
        inputs = processor(images=[read_image(image)], return_tensors="pt").to(self.dtype)
        inputs["candidate_labels"], inputs["hypothesis_template"] = labels, hypothesis_template
        return inputs

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        labels, template = model_inputs.pop("candidate_labels"), model_inputs.pop("hypothesis_template")
        batched = bool(labels) and not isinstance(labels[0], str)  # then once for each image
        names, template = (labels[0], template[0]) if batched else (labels, template)
        model = cast(ImageClassifier, self.model)
        model.ask(names, template)
        return {"candidate_labels": labels, "logits": model(**model_inputs).logits}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The candidate labels with their scores, best first; where an image may have several, each has a sigmoid."""
        if not cast(ImageClassifier, self.model).classifier.classes.multi_label:
            return super().postprocess(model_outputs)
        scores = model_outputs["logits"][0].sigmoid().tolist()  # (1, C) -> C
        found = zip(scores, model_outputs["candidate_labels"], strict=True)
        return [{"score": score, "label": label} for score, label in sorted(found, key=lambda pair: -pair[0])]


class Refused:
    """In the place of a model that could not be loaded, because transformers would try another class."""

    config = PreTrainedConfig()
    device = torch.device("cpu")  # which `pipeline` asks for where it was given a device_map

    def __init__(self, error: Exception):
        self.error = error


PIPELINES: dict[str, type[Pipeline]] = {
    "image-classification": SEPImageClassification,
    "zero-shot-image-classification": SEPZeroShot,
}


def load_for_pipeline(path: str, task: str, **options: Any) -> ImageClassifier | Refused:
    """A saved classifier as a pipeline's model, or why it cannot be loaded.

    Args:
        path: of the adapter, a folder or the id of a repository.
        task: one of `PIPELINES`.
        options: those of `from_pretrained` that `pipeline` hands on.

    Raises:
        ValueError: it is no adapter of SEP, or for zero-shot one without classes, which a plain model serves as well.
    """
    hub_options = {name: options[name] for name in ("token", "local_files_only", "cache_dir") if options.get(name)}
    file = find_adapter_config_file(path, **hub_options)
    if file is None or read_json(file).get("peft_type") != "SEP":
        raise ValueError(f"{path} holds no adapter of SEP.")
    try:
        return _load(path, hub_options, options)
    except MissingClassesError as error:
        if task == "zero-shot-image-classification":
            raise
        return Refused(error)
    except Exception as error:  # `pipeline` would take any of them for a reason to try another class
        return Refused(error)


def _load(path: str, hub_options: dict[str, Any], options: dict[str, Any]) -> ImageClassifier:
    load_classes(path, None, hub_options)  # before the base model is loaded
    if options.get("device_map") is not None:
        raise ValueError("A pipeline of a SEP adapter takes device, but no device_map.")
    model, processor = load_base(path, None, hub_options, bool(options.get("trust_remote_code")))
    dtype = options.get("dtype")
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    classifier = SEPClassifier.from_pretrained(path, model=model, processor=processor, **hub_options).eval()
    found = ImageClassifier(classifier)
    if has_processor(path, None, hub_options):
        beside = processor_part(processor, "image_processor", ImageProcessingMixin, "to read images")
        found.processors = Processors(beside, _said_of(load_base_image_processor(path, None, hub_options)))
    return found


def pipeline_class(model: Any, task: str) -> type[Pipeline]:
    """What runs a model that is ours, whether `pipeline` loaded it or was handed it.

    Raises:
        Exception: why the model could not be loaded.
    """
    if isinstance(model, Refused):
        raise model.error
    return PIPELINES[task]
