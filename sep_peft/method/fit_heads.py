"""Fits classifier heads on the embeddings of training images; no gradient goes through a tower.

Sources:

- GDA: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv 2402.04087.
- probe: Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", arXiv 2404.02285.
- prototypes-gda: the mean of GDA and the prototypes of SEP's loss; compared in `examples/few_shot`.
- residual: Yu et al., "Task Residual for Tuning Vision-Language Models", arXiv 2211.10277; the second stage of Farina
  et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages" (2SFS), arXiv 2503.11609.
- Tip-Adapter-F: Zhang et al., "Tip-Adapter", arXiv 2111.03930.

Shapes: N training images, C classes, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .heads import ClassHead, cache_logits, check_kind
from .mix import wide


#: Least variance of embeddings around their class means, over all channels; images that are all alike have none.
MIN_VARIANCE = 1e-2
#: Parts of the training images that choose a head's strength: each is judged by what the others teach.
FOLDS = 4
#: What is tried for the penalty of a probe, and for the weight of a head's logits.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
WEIGHTS = tuple(2.0**k for k in range(-8, 5))
#: (embeddings (N, E), labels (N,), text embeddings (C, E)) -> weight (C, E) and bias (C,).
Fit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fit_head(
    kind: str,
    embeds: torch.Tensor,
    labels: torch.Tensor,
    text_embeds: torch.Tensor,
    zero_shot_logits: torch.Tensor,
    logit_weight: float | None = None,
    text_logits: torch.Tensor | None = None,
    prototype_weights: torch.Tensor | None = None,
) -> ClassHead:
    """Fit a head on the embeddings of training images.

    Args:
        kind: of the head.
        embeds: x, (N, E), of unit length.
        labels: (N,) class indices.
        text_embeds: t, (C, E), of unit length; a probe starts between them and the class means.
        zero_shot_logits: (N, C), of the frozen model. They were not trained on these images, so the head's strength can
            be weighed against them; Tip-Adapter-F trains beside them.
        logit_weight: of the head's logits; None: 1 for Tip-Adapter-F and a residual, and for the others that of
            `WEIGHTS` with which the sum of both logits has the least cross entropy on images that the head was not
            fitted on, in `FOLDS` turns; where a class has a single image, that with which both spread alike.
        text_logits: (N, C), of the class texts by the adapter, beside which a residual is trained; other heads do not
            read them.
        prototype_weights: (C, E), whose products with x are the logits of the trained prototypes, which those of GDA
            are averaged with in "prototypes-gda"; other heads do not read them.

    Raises:
        ValueError: an unknown kind, a class without an image, a residual without `text_logits`, or "prototypes-gda"
            without `prototype_weights`.
    """
    check_kind(kind)
    if empty := sorted(set(range(len(text_embeds))) - set(labels.tolist())):
        raise ValueError(f"A head needs an image of every class, but has none of classes {empty}.")
    embeds, text_embeds, zero_shot_logits = wide(embeds), wide(text_embeds), wide(zero_shot_logits)
    if kind == "tip-adapter-f":
        logit_weight = 1.0 if logit_weight is None else logit_weight
        keys = tip_adapter_keys(embeds, labels, zero_shot_logits, logit_weight)
        return ClassHead(kind, {"keys": keys, "labels": labels}, logit_weight)
    if kind == "residual":
        if text_logits is None:
            raise ValueError("A residual head needs text_logits, beside which it is trained.")
        weight = best_residual(embeds, labels, wide(text_logits))
        return ClassHead(kind, {"weight": weight, "bias": torch.zeros_like(weight[:, 0])}, logit_weight or 1.0)
    if kind == "prototypes-gda":
        if prototype_weights is None:
            raise ValueError("A prototypes-gda head needs prototype_weights, which it averages with GDA.")
        of_gda = fit_head("gda", embeds, labels, text_embeds, zero_shot_logits)
        return averaged(of_gda, wide(prototype_weights), 1.0 if logit_weight is None else logit_weight)
    fit: Fit = gda
    if kind == "probe":
        fit = partial(probe, penalty=_best_penalty(embeds, labels, text_embeds))
    weight, bias = fit(embeds, labels, text_embeds)
    if logit_weight is None and labels.bincount().min() > 1:
        held_out = _held_out_logits(fit, embeds, labels, text_embeds)
        logit_weight = min(
            WEIGHTS, key=lambda weight: F.cross_entropy(zero_shot_logits + weight * held_out, labels).item()
        )
    elif logit_weight is None:
        logit_weight = (zero_shot_logits.std() / F.linear(embeds, weight, bias).std().clamp(min=1e-6)).item()
    return ClassHead(kind, {"weight": weight, "bias": bias}, logit_weight)


def gda(embeds: torch.Tensor, labels: torch.Tensor, text_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian discriminant analysis with one covariance for all classes: weight (C, E) and bias (C,). ::

        W_c = P mu_c,   b_c = -mu_c^T P mu_c / 2,   P = E ((N - 1) S + tr(S) I)^-1

    with class means mu, the covariance S of the images around them, and its inverse P as the paper shrinks it. All
    classes are as likely. Where every class has a single image, S is the covariance around the mean of all.

    Args:
        embeds, labels: (N, E), (N,).
        text_embeds: (C, E), whose number of classes counts.
    """
    count, size = embeds.shape
    means = class_means(embeds, labels, len(text_embeds))  # (C, E)
    single = labels.bincount().max() == 1
    centred = (embeds - (embeds.mean(dim=0) if single else means[labels])).double()
    scatter = centred.T @ centred  # (E, E), (N - 1) S
    trace = (scatter.trace() / max(count - 1, 1)).clamp(min=MIN_VARIANCE)
    shrunk = scatter + trace * torch.eye(size, dtype=scatter.dtype, device=embeds.device)
    weight = size * torch.linalg.solve(shrunk, means.double().T).T  # (C, E)
    bias = -(weight * means).sum(dim=1) / 2
    return weight.to(embeds.dtype), bias.to(embeds.dtype)


def averaged(head: ClassHead, prototype_weights: torch.Tensor, logit_weight: float) -> ClassHead:
    """The mean of a linear head's logits and those of the trained prototypes: again a linear head.

    Prototypes learn what augmented images have in common and forget how channels spread; GDA knows only that. A softmax
    of the mean of logits is the geometric mean of both probabilities, so neither is sure where the other is not.

    Args:
        head: with `weight` (C, E) and `bias` (C,).
        prototype_weights: (C, E).
        logit_weight: of the mean.
    """
    weight = (prototype_weights + head.logit_weight * head.tensors["weight"]) / 2
    bias = head.logit_weight * head.tensors["bias"] / 2
    return ClassHead("prototypes-gda", {"weight": weight, "bias": bias}, logit_weight)


def probe(
    embeds: torch.Tensor, labels: torch.Tensor, text_embeds: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear probe that class texts take part in, as in LP++: weight (C, E) and bias (C,), which is 0. ::

        W_c = w_c + alpha_c t_c,   min CE(10 x W^T, y) + penalty |w - m|^2

    over w, which starts at the class means m, and one alpha a class, which starts at 1. It is solved by L-BFGS, where
    the paper takes block coordinate descent without a penalty.
    """
    means = class_means(embeds, labels, len(text_embeds))
    delta = torch.zeros_like(means, requires_grad=True)
    alpha = torch.ones_like(means[:, :1], requires_grad=True)
    optimizer = torch.optim.LBFGS([delta, alpha], max_iter=100, line_search_fn="strong_wolfe")

    def weight() -> torch.Tensor:
        return 10.0 * (means + delta + alpha * text_embeds)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(embeds @ weight().T, labels) + penalty * delta.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight().detach(), torch.zeros_like(means[:, 0])


def best_residual(embeds: torch.Tensor, labels: torch.Tensor, text_logits: torch.Tensor) -> torch.Tensor:
    """`residual` with that of `PENALTIES` with which images that it was not fitted on have the least cross entropy."""
    parts = _folds(labels)

    def loss(penalty: float) -> float:
        logits = text_logits.clone()
        for part in parts.unique():
            held = parts == part
            if not held.all():
                weight = residual(embeds[~held], labels[~held], text_logits[~held], penalty)
                logits[held] += embeds[held] @ weight.T
        return F.cross_entropy(logits, labels).item()

    return residual(embeds, labels, text_logits, min(PENALTIES, key=loss))


def residual(embeds: torch.Tensor, labels: torch.Tensor, text_logits: torch.Tensor, penalty: float) -> torch.Tensor:
    """What is added to the class texts, so that they are the start of a linear classifier: weight W (C, E). ::

        W = 10 w,   min CE(logits + x W^T, y) + penalty |w|^2

    over w, which starts at 0, by L-BFGS.

    Args:
        embeds, labels: (N, E), (N,).
        text_logits: (N, C).
        penalty: of the residual.
    """
    delta = embeds.new_zeros(text_logits.shape[1], embeds.shape[1]).requires_grad_()
    optimizer = torch.optim.LBFGS([delta], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = text_logits + 10.0 * embeds @ delta.T
        loss = F.cross_entropy(logits, labels) + penalty * delta.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return 10.0 * delta.detach()


def tip_adapter_keys(
    embeds: torch.Tensor, labels: torch.Tensor, zero_shot_logits: torch.Tensor, logit_weight: float, steps: int = 100
) -> torch.Tensor:
    """Keys (N, E) of the cache of Tip-Adapter-F: they start at the embeddings and are trained by AdamW on all images.

    ``min CE(zero_shot_logits + logit_weight cache_logits(x), y)``, where an image never finds its own entry: with it
    the cache would be right before it has learned anything.
    """
    keys = embeds.clone().requires_grad_()
    optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
    own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    with torch.enable_grad():
        for _ in range(steps):
            logits = zero_shot_logits + logit_weight * cache_logits(
                embeds, keys, labels, zero_shot_logits.shape[1], own
            )
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    return keys.detach()


def class_means(embeds: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean of the embeddings (N, E) of each class, (C, E); 0 for a class without any.

    Args:
        embeds: (N, E).
        labels: (N,) class indices, or (N, C) with 1 for the classes of each image.
        num_classes: C.
    """
    members = (labels if labels.ndim == 2 else F.one_hot(labels, num_classes)).to(embeds.dtype)  # (N, C)
    return members.T @ embeds / members.sum(dim=0).clamp(min=1)[:, None]


def _folds(labels: torch.Tensor) -> torch.Tensor:
    """Part of each image (N,), so that the images of each class are spread over all parts."""
    same = labels[:, None] == labels[None]  # (N, N)
    return same.tril(-1).sum(dim=1) % FOLDS  # how many of its class come before it


def _held_out_logits(fit: Fit, embeds: torch.Tensor, labels: torch.Tensor, text_embeds: torch.Tensor):
    """Logits (N, C) of every image by heads that did not see it; where a class has one image, its head knows none."""
    parts = _folds(labels)
    logits = embeds.new_zeros(len(embeds), len(text_embeds))
    for part in parts.unique():
        held = parts == part
        weight, bias = fit(embeds[~held], labels[~held], text_embeds) if (~held).any() else (None, None)
        if weight is not None:
            logits[held] = F.linear(embeds[held], weight, bias)
    return logits


def _best_penalty(embeds: torch.Tensor, labels: torch.Tensor, text_embeds: torch.Tensor) -> float:
    def loss(penalty: float) -> float:
        logits = _held_out_logits(partial(probe, penalty=penalty), embeds, labels, text_embeds)
        return F.cross_entropy(logits, labels).item()

    return min(PENALTIES, key=loss)
