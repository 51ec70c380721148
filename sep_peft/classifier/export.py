"""Pixels in, one tensor out: modules for torch.export, ONNX, and for embedding many images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..method.heads import HeadLogits
from ..method.whitening import Whitening, apply_whitening
from ..tuner.current import chosen_adapters
from ..tuner.mixed_batch import check_adapter_names
from ..tuner.model import find_towers
from ..tuner.tower import SEPTower
from .answers import Answers
from .label_calibration import Sigmoids
from .logits import ClassWeights, class_logits
from .prediction import Task, check_answers, image_embeds, image_embeds_by


if TYPE_CHECKING:
    from .classifier import SEPClassifier


class ImageEmbedder(nn.Module):
    """The prompted image tower with mixing: SEP's image embedding of the active adapter, (B, E), of unit length.

    Args:
        model: with a SEP adapter on an image tower. An export keeps the adapter that is active then.
        whitening: of its embeddings, which then compare with images alone; None: as they are.

    Raises:
        ValueError: there is no such tower.

    Example:
        >>> batch = {"pixel_values": {0: torch.export.Dim("batch")}}
        >>> program = torch.export.export(ImageEmbedder(model).eval(), (pixel_values,), dynamic_shapes=batch)
    """

    white_mean: torch.Tensor | None
    white_matrix: torch.Tensor | None

    def __init__(self, model: nn.Module, whitening: Whitening | None = None):
        super().__init__()
        if "vision" not in find_towers(model):
            raise ValueError(
                "The model needs a SEP adapter on an image tower. Make one with peft.get_peft_model(model, "
                "SEPConfig())."
            )
        self.model = model
        self.register_buffer("white_mean", None if whitening is None else whitening.mean.clone(), persistent=False)
        self.register_buffer("white_matrix", None if whitening is None else whitening.matrix.clone(), persistent=False)

    def by_adapters(self, pixel_values: torch.Tensor, adapters: Sequence[str]) -> list[torch.Tensor]:
        """Embeddings of several adapters of the model in one go, which share the frozen branch.

        Args:
            pixel_values: (B, channels, height, width).
            adapters: their names, or "__base__" for the model without one.

        Returns:
            for each adapter what `forward` gives while it is active, (B, E), without a whitening.

        Raises:
            ValueError: there is no such adapter, or one has `modules_to_save`.
        """
        check_adapter_names(adapters, cast(Any, self.model).peft_config)
        return image_embeds_by(find_towers(self.model)["vision"], {"pixel_values": pixel_values}, adapters)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width) -> (B, E) in fp32 or wider."""
        embeds = image_embeds(find_towers(self.model)["vision"], {"pixel_values": pixel_values})[0]
        if self.white_mean is None or self.white_matrix is None:
            return embeds
        return apply_whitening(embeds, self.white_mean, self.white_matrix)


class ConstantWeights(nn.Module):
    """What classes give to their logits, as constants of a graph.

    Args:
        weights: as they are; later classes and adapters do not reach into them.
    """

    text_embeds: torch.Tensor
    frozen_text_embeds: torch.Tensor
    prototype_weights: torch.Tensor | None
    slopes: torch.Tensor | None
    biases: torch.Tensor | None

    def __init__(self, weights: ClassWeights):
        super().__init__()
        self.register_buffer("text_embeds", weights.text_embeds.clone(), persistent=False)
        self.register_buffer("frozen_text_embeds", weights.frozen_text_embeds.clone(), persistent=False)
        self.register_buffer("prototype_weights", weights.prototypes, persistent=False)
        self._zero_shot_margin, self._temperature = weights.zero_shot_margin, weights.temperature
        sigmoids = weights.sigmoids
        self.register_buffer("slopes", None if sigmoids is None else sigmoids.slopes.clone(), persistent=False)
        self.register_buffer("biases", None if sigmoids is None else sigmoids.biases.clone(), persistent=False)
        self._head = weights.head
        for name, tensor in ({} if weights.head is None else weights.head.tensors).items():
            self.register_buffer(f"head_{name}", tensor.clone(), persistent=False)

    def class_weights(self) -> ClassWeights:
        head = self._head
        if head is not None:
            own = {name: self.get_buffer(f"head_{name}") for name in head.tensors}
            head = HeadLogits(head.kind, own, head.logit_weight, head.num_classes)
        return ClassWeights(
            self.text_embeds,
            self.frozen_text_embeds,
            self.prototype_weights,
            self._zero_shot_margin,
            self._temperature,
            head,
            sigmoids=None if self.slopes is None or self.biases is None else Sigmoids(self.slopes, self.biases),
        )

    def scores(self, tower: SEPTower, embeds: torch.Tensor, frozen_embeds: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, C): one class an image, or each class by itself where it may have several.

        Args:
            tower: of the images.
            embeds, frozen_embeds: SEP's and the frozen embeddings of images, (B, E), of unit length.
        """
        weights = self.class_weights()
        logits = class_logits(tower, embeds, frozen_embeds, weights)
        return logits.softmax(dim=-1) if weights.sigmoids is None else logits.sigmoid()


class ImageScorer(ConstantWeights):
    """A classifier with its present classes as one graph from pixels to probabilities, (B, C).

    The class texts are encoded once, here, and with kept prototypes are constant from then on.

    Args:
        classifier: its classes and its model's active adapter are taken. The model is shared, not copied.

    Raises:
        ValueError: an image may have several of the classes, and they have no calibration.

    Example:
        >>> scorer = ImageScorer(classifier).eval()
        >>> torch.onnx.export(scorer, (pixel_values,), "task.onnx", dynamo=True, dynamic_shapes=batch)
    """

    def __init__(self, classifier: SEPClassifier):
        check_answers(Answers(), [Task(None, classifier.encoder)])
        with torch.no_grad():
            super().__init__(classifier.encoder.weights(training=False))
        self.model = classifier.model
        self.class_names = classifier.class_names

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width) -> (B, C), in the order of `class_names`."""
        tower = find_towers(self.model)["vision"]
        return self.scores(tower, *image_embeds(tower, {"pixel_values": pixel_values}))


class ImageTasks(nn.Module):
    """Several tasks of one model as one graph, which runs the frozen pass once, and the prompted one once an adapter.

    Args:
        model: with the adapters on its image tower. It is shared, not copied.
        tasks: for each its adapter, and what its classes give to logits; None in the place of that: the adapter's
            embedding is given out.

    Raises:
        ValueError: there is no SEP adapter on an image tower.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[tuple[str, ClassWeights | None]]):
        super().__init__()
        self.embedder = ImageEmbedder(model)
        self.adapters = [adapter for adapter, _ in tasks]
        kept = [None if weights is None else ConstantWeights(weights) for _, weights in tasks]
        self.weights = nn.ModuleList(weights or nn.Identity() for weights in kept)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, channels, height, width) -> for each task probabilities (B, C) or an embedding (B, E)."""
        tower = find_towers(self.embedder.model)["vision"]
        inputs = {"pixel_values": pixel_values, "frozen_embeds": tower.embed_frozen(pixel_values=pixel_values)}
        embeds: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        found = []
        for adapter, weights in zip(self.adapters, self.weights, strict=True):
            with chosen_adapters.set(adapter):
                if adapter not in embeds:
                    embeds[adapter] = image_embeds(tower, inputs)
                if isinstance(weights, ConstantWeights):
                    found.append(weights.scores(tower, *embeds[adapter]))
                else:
                    found.append(embeds[adapter][0].clone())  # each output is a tensor of its own
        return tuple(found)
