"""Classifiers to compare SEP with: any CLIP-like model as it is or under LoRA, a linear probe, and Tip-Adapter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from sep_peft.classifier.classes import TaskClasses
from sep_peft.classifier.logits import head_features, more_confident
from sep_peft.method.fit_heads import fit_head
from sep_peft.method.heads import HeadLogits
from sep_peft.method.losses import PROTOTYPE_SCALE, prototype_loss


class PlainClassifier(nn.Module):
    """Classifies by the model's own embeddings of images and of the template with the class names.

    Trains whatever of the model requires gradients, by cross entropy.

    Args:
        model: with `get_image_features`, `get_text_features` and `logit_scale`, or a PEFT model around one.
        processor: of transformers, with a tokenizer.
        classes: C class names.
        template: text with ``{}`` in place of the name.
    """

    def __init__(self, model: nn.Module, processor, classes: tuple[str, ...], template: str):
        super().__init__()
        self.model = model
        self.processor = processor
        self.template = template
        self.head: tuple[list[str], HeadLogits] | None = None  # its classes, and what it adds to their logits
        self.set_classes(classes)

    @property
    def class_names(self) -> list[str]:
        return list(self.classes.names)

    def set_classes(self, classes) -> PlainClassifier:
        """Swap in other classes, by names or as `TaskClasses`."""
        if not isinstance(classes, TaskClasses):
            classes = TaskClasses.from_names(classes, self.processor, self.template)
        self.classes = classes
        self._text: torch.Tensor | None = None
        return self

    def train(self, mode: bool = True) -> PlainClassifier:
        self._text = None
        return super().train(mode)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        """(B, 3, H, W) -> logits (B, C), and with labels (B,) the cross entropy."""
        logits = self.combined(*self.both_embeds(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)

    def image_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, E), of unit length."""
        return unit_features(self.model.get_image_features(pixel_values=pixel_values))

    def text_embeds(self) -> torch.Tensor:
        """(C, E), of unit length; in evaluation encoded once."""
        if self.training:
            return self.encode_texts()
        if self._text is None:
            self._text = self.encode_texts()
        return self._text

    def encode_texts(self) -> torch.Tensor:
        """(C, E), of unit length."""
        device = next(self.model.parameters()).device
        inputs = {key: value.to(device) for key, value in self.classes.template_inputs[0].items()}
        return unit_features(self.model.get_text_features(**inputs))

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """(B, E) -> (B, C), of the texts alone."""
        return self.scaled(image @ self.text_embeds().T)

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        """Cosines (B, C) of images and texts, as the model scales them."""
        return self.model.logit_scale.exp() * cosines + getattr(self.model, "logit_bias", 0.0)

    def both_embeds(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> embeddings with the adapter and without, both (B, E)."""
        embeds = self.image_embeds(pixel_values)
        return embeds, embeds

    def frozen_text_embeds(self) -> torch.Tensor:
        """(C, E), of unit length, without an adapter."""
        return self.text_embeds()

    def combined(self, image: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of embeddings (B, E) with the adapter and without, by texts and what else predicts."""
        return self.logits(image) + self.head_logits(image, frozen)

    def head_logits(self, image: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor | float:
        """What the head adds, (B, C); 0 while training, without one, and for other classes than its own."""
        if self.head is None or self.training or self.head[0] != self.class_names:
            return 0.0
        return self.head[1](head_features(image, frozen))

    @torch.no_grad()
    def keep_head(self, kind: str, batches: Iterable[dict[str, torch.Tensor]]) -> float:
        """Let a head predict beside the texts; see `SEPClassifier.keep_prototypes`. Returns its weight."""
        self.eval()
        device = next(self.parameters()).device
        found = [(*self.both_embeds(batch["pixel_values"].to(device)), batch["labels"].to(device)) for batch in batches]
        image, frozen, labels = (torch.cat(column) for column in zip(*found, strict=True))
        zero_shot = self.scaled(frozen @ self.frozen_text_embeds().T)
        head = fit_head(
            kind, head_features(image, frozen), labels, self.text_embeds(), zero_shot, None, self.logits(image)
        )
        self.head = self.class_names, HeadLogits(kind, head.tensors, head.logit_weight, len(self.class_names))
        return head.logit_weight


class AdaptedClassifier(PlainClassifier):
    """CLIP with an adapter of PEFT.

    With `prototype_weight` it has all that `SEPClassifier` has beside SEP itself: class prototypes W in the loss, which
    predict once they are kept, and zero-shot beside it for classes that were not trained. ::

        loss = CE(logits, y) + prototype_weight [CE(10 cos(v, W), y) + CE(10 cos(v0, W), y)]

    with embeddings v of the image, and v0 without the adapter.
    """

    def __init__(self, model, processor, classes, template: str, prototype_weight: float = 0.0):
        super().__init__(model, processor, classes, template)
        self.prototype_weight, self.prototypes = prototype_weight, None
        self.kept: tuple[list[str], torch.Tensor] | None = None  # classes, and what their prototypes add to logits
        if prototype_weight:
            self.reset_prototypes([])

    @torch.no_grad()
    def frozen(self, compute: Callable[..., torch.Tensor], *args) -> torch.Tensor:
        """What the model computes without its adapter."""
        with self.model.disable_adapter():
            return compute(*args)

    def reset_prototypes(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """W (C, E) is the mean frozen embedding of a class's images, or its frozen text embedding without any."""
        prototypes = self.frozen_text_embeds()
        sums, counts = torch.zeros_like(prototypes), prototypes.new_zeros(len(prototypes), 1)
        for batch in batches:
            labels = batch["labels"].to(sums.device)
            sums.index_add_(0, labels, self.frozen(self.image_embeds, batch["pixel_values"].to(sums.device)))
            counts.index_add_(0, labels, torch.ones_like(labels[:, None], dtype=counts.dtype))
        self.prototypes = nn.Parameter(torch.where(counts > 0, sums / counts.clamp(min=1), prototypes))

    def keep_prototypes(self, logit_weight: float) -> None:
        """See `SEPClassifier.keep_prototypes`."""
        weights = logit_weight * PROTOTYPE_SCALE * F.normalize(self.prototypes.detach(), dim=-1)
        self.kept = self.class_names, weights

    def set_classes(self, classes, zero_shot_margin: float = 0.0) -> AdaptedClassifier:
        """See `SEPClassifier.set_classes`."""
        super().set_classes(classes)
        self.zero_shot_margin = zero_shot_margin
        self.register_buffer("_frozen_text", None, persistent=False)  # so that it follows the model to its device
        return self

    def frozen_text_embeds(self) -> torch.Tensor:
        """(C, E), without the adapter; encoded once, because training does not change them."""
        if self._frozen_text is None:
            self._frozen_text = self.frozen(self.encode_texts)
        return self._frozen_text

    @property
    def needs_frozen(self) -> bool:
        """Whether the frozen embedding of an image takes part in its logits."""
        return self.prototypes is not None or bool(self.zero_shot_margin) or self.head is not None

    def both_embeds(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frozen = self.frozen(self.image_embeds, pixel_values)
        return self.image_embeds(pixel_values), frozen

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        """As `PlainClassifier`, with the loss above while training."""
        image, frozen = self.both_embeds(pixel_values) if self.needs_frozen else 2 * (self.image_embeds(pixel_values),)
        logits = self.combined(image, frozen)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if loss is not None and self.training and self.prototypes is not None:
            terms = [prototype_loss(embeds, self.prototypes, labels) for embeds in (image, frozen)]
            loss = loss + self.prototype_weight * sum(terms)
        return ModelOutput(loss=loss, logits=logits)

    def combined(self, image: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of embeddings (B, E) with the adapter and without, by texts, prototypes, head and zero-shot."""
        logits = super().combined(image, frozen)
        if self.kept is not None and not self.training and self.class_names == self.kept[0]:
            logits = logits + head_features(image, frozen) @ self.kept[1].T
        if self.zero_shot_margin:
            zero_shot = self.scaled(frozen @ self.frozen_text_embeds().T)
            logits = more_confident(logits, zero_shot, self.zero_shot_margin)
        return logits


class LinearProbe(PlainClassifier):
    """Logistic regression on the frozen image embeddings; it knows the classes of its images only.

    The strength of the regularization is chosen on validation images.
    """

    strengths = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

    def can_classify(self, names: list[str]) -> bool:
        return names == self.trained_classes

    @torch.enable_grad()
    def fit(self, features, labels, val_features, val_labels) -> dict[str, float]:
        """Features (N, E) and labels (N,), and the same of validation images; returns what was chosen."""
        self.trained_classes = self.class_names
        probes = {}
        for strength in self.strengths:
            probe = self._solve(features, labels, strength)
            probes[strength] = (probe(val_features).argmax(dim=1) == val_labels).float().mean().item(), probe
        strength = max(probes, key=lambda s: probes[s][0])
        self.probe = probes[strength][1].requires_grad_(False)
        return {"l2": strength, "validation accuracy": 100 * probes[strength][0]}

    def _solve(self, features: torch.Tensor, labels: torch.Tensor, strength: float) -> nn.Linear:
        probe = nn.Linear(features.shape[1], len(self.classes), device=features.device)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(probe(features), labels) + strength * probe.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return probe

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        return self.probe(image)


class TipAdapter(PlainClassifier):
    """Tip-Adapter (arXiv 2111.03930): a cache of the training images' embeddings beside zero-shot, without training.

    ::

        logits = scale f W^T + alpha exp(-beta (1 - f F^T)) Y

    with frozen embeddings f of the image, W of the class texts, F of the cached images and their one-hot labels Y.
    alpha and beta are chosen on validation images. Classes without cached images are classified by zero-shot.
    """

    alphas = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    betas = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

    @torch.no_grad()
    def fit(self, features, labels, val_features, val_labels) -> dict[str, float]:
        """Features (N, E) and labels (N,), and the same of validation images; returns what was chosen."""
        self.keys = features
        self.values = F.one_hot(labels, len(self.classes)).to(features.dtype)  # (N, C)
        self.trained_classes = self.class_names
        scores = {}
        for alpha, beta in itertools.product(self.alphas, self.betas):
            self.alpha, self.beta = alpha, beta
            right = self.logits(val_features).argmax(dim=1) == val_labels
            scores[alpha, beta] = right.float().mean().item()
        self.alpha, self.beta = max(scores, key=scores.get)
        return {"alpha": self.alpha, "beta": self.beta, "validation accuracy": 100 * scores[self.alpha, self.beta]}

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        logits = super().logits(image)
        if self.class_names != self.trained_classes:
            return logits
        affinity = (-self.beta * (1 - image @ self.keys.T)).exp()  # (B, N)
        return logits + self.alpha * affinity @ self.values


def unit_features(features) -> torch.Tensor:
    """Embeddings of unit length in fp32, from a tensor or an output that holds them."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
