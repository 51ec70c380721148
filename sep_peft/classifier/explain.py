"""What SEP made its prompts from in an image, and what in it decided for a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.image_processing_base import BatchFeature

from ..tuner.current import chosen_adapters
from ..tuner.messages import listed, shown
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from ..tuner.passes import FusionTrace
from ..tuner.tower import SEPTower
from .answers import Answers
from .attribution import attribute
from .explanation import Explanation, LayerExplanation
from .images import read_image
from .logits import class_logits
from .patches import PatchGrid
from .prediction import Task, image_embeds


@torch.no_grad()
def explain(model: nn.Module, processor, image: Any) -> Explanation:
    """Which tokens of an image the active adapter selects; `SEPClassifier.explain` says what decided as well.

    Evaluation mode is used whatever the model's own is.

    Args:
        model: with a SEP adapter on its image tower.
        processor: a processor or image processor of transformers.
        image: one image as `sep_peft.classifier.images.read_image` takes it.

    Returns:
        an `Explanation` without a class.

    Raises:
        ValueError: the adapter selects no tokens in the image tower, that tower has no grid of patches, or the image
            cannot be read.
    """
    tower = find_towers(model).get("vision")
    settings = None if tower is None else tower.active_settings
    if tower is None or settings is None or not settings.selects_tokens:
        raise ValueError("There is nothing to explain: no active SEP adapter selects tokens in the image tower.")
    processor = getattr(processor, "image_processor", processor)
    inputs = _read(image, processor, tower)
    grid, trace = PatchGrid.of(tower, inputs), {}
    with evaluating(model):
        tower.embed(**inputs, trace=trace)
    return Explanation(_displayed(inputs, grid, processor), (grid.rows, grid.columns), _layers(trace, grid, tower))


def explain_label(model: nn.Module, task: Task, processor, image: Any, label: str | None) -> Explanation:
    """What decided for a class, and which tokens were selected meanwhile; in evaluation.

    Args:
        model: with SEP adapters on its towers.
        task: whose classes and adapter predict.
        processor: an image processor of transformers.
        image: as for `explain`.
        label: name of a class; None: the best one.

    Raises:
        ValueError: there is no such class, the image tower has no grid of patches, or the image cannot be read.
        FloatingPointError: the logits are not finite.
    """
    names = task.classes.names
    if label is not None and label not in names:
        raise ValueError(f"label must be one of the classes, {listed(names)}, but got {shown(label)}.")
    tower, trace = find_towers(model)["vision"], {}
    # tensors of inference mode take part in no backward pass
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), chosen_adapters.set(task.adapter):
        inputs = _read(image, processor, tower)
        grid, weights = PatchGrid.of(tower, inputs), task.encoder.weights(training=False)
        logits = class_logits(tower, *image_embeds(tower, inputs, trace=trace), weights)
        every = Answers(min_score=0.0).of(logits, task.classes, None, task.encoder.label_scale)[0]
        scores = {each["label"]: each["score"] for each in every}
        label = next(iter(scores)) if label is None else label
        effects = attribute(tower, inputs, grid, weights, names.index(label))
    shape, layers = (grid.rows, grid.columns), _layers(trace, grid, tower)
    return Explanation(_displayed(inputs, grid, processor), shape, layers, label, scores[label], effects)


def _read(image: Any, processor, tower: SEPTower) -> BatchFeature:
    """What a tower takes of one image, on its device."""
    return processor(read_image(image), return_tensors="pt").to(compute_device(tower))


def _layers(trace: Mapping[int, FusionTrace], grid: PatchGrid, tower: SEPTower) -> list[LayerExplanation]:
    """What every fusion saw of one image, in order."""
    return [
        LayerExplanation(
            layer=index,
            patches=[grid.place(position, seen.tokens, tower) for position in seen.token_positions[0].tolist()],
            weights=seen.weights[0].float().cpu(),
        )
        for index, seen in sorted(trace.items())
    ]


def _displayed(inputs: Mapping[str, torch.Tensor], grid: PatchGrid, processor) -> torch.Tensor:
    """Normalized pixel values of one image -> (H, W, 3) in 0..1."""
    mean = torch.tensor(getattr(processor, "image_mean", None) or [0.0] * 3)
    std = torch.tensor(getattr(processor, "image_std", None) or [1.0] * 3)
    return (grid.image(inputs["pixel_values"]).float().cpu() * std + mean).clamp(0, 1)
