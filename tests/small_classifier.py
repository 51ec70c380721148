"""A `SEPClassifier` of four classes over the tiny CLIP, and what tests ask of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from copies import made_once
from peft import PeftModel, get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.tuner.model import find_towers


SMALL = {"num_text_prompts": 3, "num_vision_prompts": 2}
LENGTHS = [5, 3, 7, 4]
CLASSES = make_texts(LENGTHS)
TEMPLATES = make_texts([9, 7, 11, 8], seed=5)
OTHER_TEMPLATES = make_texts([6, 4, 8, 5], seed=6)
IMAGES = make_images(5)
LABELS = torch.tensor([3, 0, 2, 2, 1])


def make_model(
    adapter: str = "default",
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
    clip: torch.nn.Module | None = None,
    **config,
) -> PeftModel:
    """Of `clip`, by default the tiny CLIP."""
    return _make_new(adapter, seed, dtype, **config) if clip is None else _adapt(clip, adapter, seed, dtype, **config)


@made_once
def _make_new(*settings, **config) -> PeftModel:
    return _adapt(make_clip(), *settings, **config)


def _adapt(clip: torch.nn.Module, adapter: str, seed: int, dtype: torch.dtype, **config) -> PeftModel:
    if clip.dtype != dtype:  # one that is offloaded cannot be moved
        clip = clip.to(dtype)
    torch.manual_seed(seed)
    model = get_peft_model(clip, SEPConfig.published(**(SMALL | config)), adapter)
    perturb(model, adapter, seed=seed)
    return model


def make_classifier(class_inputs=CLASSES, template_inputs=TEMPLATES, *, config=None, **options) -> SEPClassifier:
    """Four classes over the tiny CLIP; in training mode, as new."""
    return SEPClassifier(make_model(**(config or {})), class_inputs, template_inputs, **options)


def with_prototypes(weight: float | None = 1.5, **options) -> SEPClassifier:
    """A classifier whose prototypes point anywhere; kept unless `weight` is None."""
    classifier = make_classifier(**options)
    classifier.prototypes.data = torch.randn(4, 24, generator=torch.Generator().manual_seed(8))
    return classifier if weight is None else classifier.keep_prototypes(weight)


@torch.no_grad()
def logits_of(classifier: SEPClassifier) -> torch.Tensor:
    """In evaluation."""
    return classifier.eval()(IMAGES).logits


def mix(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float) -> torch.Tensor:
    prompted, frozen = F.normalize(prompted, dim=-1), F.normalize(frozen, dim=-1)
    return F.normalize(frozen_weight * frozen + (1 - frozen_weight) * prompted, dim=-1)


class EncoderCalls:
    """Counts the runs of the text tower's first encoder layer."""

    def __init__(self, classifier: SEPClassifier):
        self.count = 0
        layers = find_towers(classifier.model)["text"].base_layer.encoder.layers
        layers[0].register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    def take(self) -> int:
        """Runs since the last call."""
        count, self.count = self.count, 0
        return count


def contents(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> bytes, of all files; empty folders count as well."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def raises(message: str, error: type[Exception] = ValueError):
    """The whole message."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")
