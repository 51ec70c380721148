"""A classifier as transformers' pipelines expect a model to look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

from ..tuner.modes import evaluating
from .prediction import image_logits


if TYPE_CHECKING:
    from .classifier import SEPClassifier


class ImageClassifier(nn.Module):
    """For `pipeline("image-classification", ...)`: a `SEPClassifier` with the classes that it has when it is asked.

    The pipeline says in its log that it does not know this class; it works all the same. Files it opens with its own
    reader, which shows gray of 16 bits as white and what is transparent as it is below; `images.read_image` reads both
    as they look, and the pipeline takes what it returns.

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
        self._config = PreTrainedConfig(problem_type="single_label_classification")

    @property
    def config(self) -> PreTrainedConfig:
        """With the labels of the classifier's present classes."""
        names = dict(enumerate(self.classifier.class_names))
        if self._config.id2label != names:
            self._config.id2label, self._config.label2id = names, {name: index for index, name in names.items()}
        return self._config

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
        with evaluating(classifier.model):
            weights = classifier.encoder.weights(training=False)
            return ImageClassifierOutput(logits=image_logits(classifier.vision_tower, inputs, weights))
