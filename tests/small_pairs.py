"""Images with captions over the tiny CLIP, and a processor that reads them; nothing is downloaded."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from bundled import shallow_clip
from peft import PeftModel, get_peft_model
from PIL import Image
from small_clip import perturb
from transformers import AutoModel, AutoProcessor, CLIPModel, set_seed

from sep_peft import SEPConfig
from sep_peft.training import Pair


#: Colour -> what an image of it is called.
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (40, 40, 200), "gray": (120, 120, 120)}


def make_pairs(count: int = 7, negatives: bool = False) -> list[Pair]:
    """Images of a colour and noise, of two captions each but for the first, which has one."""
    rng, pairs = np.random.default_rng(0), []
    for index in range(count):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
        captions = (f"a photo of a {name} thing {index}.", f"something {name} and large, number {index}")
        against = (f"a photo of a white thing {index}.",) if negatives and index % 2 else ()
        pairs.append(Pair(Image.fromarray(pixels), captions[: 1 if index == 0 else 2], against))
    return pairs


def make_model(layers: int = 2, **config) -> PeftModel:
    """The small CLIP's first layers with an adapter that has moved."""
    clip = copy.deepcopy(_clip(layers))
    set_seed(1)
    model = get_peft_model(clip, SEPConfig(**config))
    perturb(model)
    return model


@functools.cache
def _clip(layers: int) -> CLIPModel:
    return AutoModel.from_pretrained(shallow_clip(layers))


def make_processor():
    return AutoProcessor.from_pretrained(shallow_clip(2))


def gradients(model: PeftModel) -> torch.Tensor:
    """Of all that is trained, after each other."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
