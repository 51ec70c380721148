"""What a run's classifier made of its images and class texts, in one file; heads and margins are tried on it later.

Every part ("train", "val" and each evaluation) has the tensors

    part.images, part.frozen_images (N, E), part.labels (N,), part.texts, part.frozen_texts (C, E)

of unit length, with the adapter and without; "scale" is the model's and "prototypes" (C, E) are those that were
trained. Images that cannot be read are left out. The validation images are those that were drawn beside the training
images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from baselines import AdaptedClassifier, PlainClassifier
from images import batches
from readers import ImageSet, Sample
from safetensors.torch import load_file, save_file

from sep_peft import SEPClassifier
from sep_peft.classifier.logits import class_logits


#: Names of the tensors of each part.
TENSORS = ("images", "frozen_images", "labels", "texts", "frozen_texts")
FILE = "embeddings.safetensors"


class Embeddings:
    """Collects what `embeddings.safetensors` holds, while a run is measured.

    Args:
        classifier: trained; of the package or of `baselines`.
    """

    def __init__(self, classifier):
        prototypes = getattr(classifier, "prototypes", None)
        self._found = {"scale": classifier.model.logit_scale.exp().detach().float().cpu()}
        if prototypes is not None:
            self._found["prototypes"] = prototypes.detach().float().cpu()

    def add(self, part: str, classifier, images: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Batches of embeddings, with the adapter and without, and labels, for the classes that the classifier has."""
        values = *(torch.cat(column) for column in zip(*images, strict=True)), *both_texts(classifier)
        self._found |= {f"{part}.{name}": value.cpu() for name, value in zip(TENSORS, values, strict=True)}

    @torch.no_grad()
    def add_images(self, part: str, classifier, data: ImageSet, samples: list[Sample], image_processor) -> None:
        """Embed images that are not measured."""
        device = next(classifier.parameters()).device
        found = [
            (*both_images(classifier, pixels.to(device)), labels)
            for pixels, labels, _ in batches(data, samples, image_processor)
            if pixels is not None
        ]
        if found:
            self.add(part, classifier, found)

    def write(self, path: Path) -> None:
        """Written to a temporary name and renamed."""
        temporary = path.with_suffix(".tmp")
        save_file({name: value.detach().clone() for name, value in self._found.items()}, temporary)
        temporary.replace(path)


def has_embeddings(classifier) -> bool:
    """Whether a classifier compares images with class texts."""
    return isinstance(classifier, SEPClassifier) or type(classifier) in (PlainClassifier, AdaptedClassifier)


def both_images(classifier, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) -> embeddings with the adapter and without, both (B, E)."""
    if isinstance(classifier, SEPClassifier):
        return classifier.image_embeds(pixels)
    return classifier.both_embeds(pixels)


def both_texts(classifier) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the classes with the adapter and without, both (C, E)."""
    if isinstance(classifier, SEPClassifier):
        weights = classifier.encoder.weights(training=False)
        return weights.text_embeds, weights.frozen_text_embeds
    return classifier.text_embeds(), classifier.frozen_text_embeds()


def combined_logits(classifier, image: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) of embeddings (B, E) with the adapter and without: what the classifier gives for their images."""
    if isinstance(classifier, SEPClassifier):
        weights = classifier.encoder.weights(training=False)
        return class_logits(classifier.vision_tower, image, frozen, weights)
    return classifier.combined(image, frozen)


def read_embeddings(path: Path) -> dict[str, Any]:
    """Part -> its tensors by name, as they were written, beside "scale" and "prototypes"."""
    found: dict[str, Any] = {}
    for key, value in load_file(path).items():
        part, _, name = key.partition(".")
        if name:
            found.setdefault(part, {})[name] = value
        else:
            found[part] = value.item() if part == "scale" else value
    return found
