"""Classifier heads: what training images teach, as logits that are added to those of the class texts.

A head reads image embeddings x (B, E) of unit length, whichever adapter made them; `fit_heads` makes it.

Shapes: N training images, B images, C classes, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..words import counted


#: Sharpness of the cache of Tip-Adapter, as its paper has it.
TIP_BETA = 5.5
#: Largest weight of a head's logits beside those of the texts.
MAX_LOGIT_WEIGHT = 1000


#: Kind -> names of its tensors.
NAMES = {
    "gda": ("weight", "bias"),
    "probe": ("weight", "bias"),
    "prototypes-gda": ("weight", "bias"),
    "residual": ("weight", "bias"),
    "tip-adapter-f": ("keys", "labels"),
}


@dataclass(frozen=True)
class ClassHead:
    """What a head of C classes has learned.

    Args:
        kind: "gda", "probe", "prototypes-gda", "residual" or "tip-adapter-f".
        tensors: of the first four `weight` (C, E) and `bias` (C,), of "tip-adapter-f" `keys` (N, E) and `labels`
            (N,), class indices.
        logit_weight: that its logits are multiplied by, above 0 and at most `MAX_LOGIT_WEIGHT`.

    Raises:
        ValueError: an unknown kind, tensors of other names, shapes or types, numbers that are not finite, or a weight
            that is not allowed.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    logit_weight: float

    def __post_init__(self):
        check_kind(self.kind)
        names = NAMES[self.kind]
        if set(self.tensors) != set(names):
            raise ValueError(f"A {self.kind} head has {' and '.join(names)}, but got {sorted(self.tensors)}.")
        main, other = (self.tensors[name] for name in names)
        if main.ndim != 2 or other.shape != main.shape[:1]:
            shapes = f"{tuple(main.shape)} and {tuple(other.shape)}"
            raise ValueError(
                f"{' and '.join(names)} of a {self.kind} head must have shapes (count, embedding size) and (count,), "
                f"but got {shapes}."
            )
        if other.is_floating_point() == (self.kind == "tip-adapter-f"):
            wanted = "class indices" if self.kind == "tip-adapter-f" else "floating-point numbers"
            raise ValueError(f"{names[1]} of a {self.kind} head must be {wanted}, but got {other.dtype}.")
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} of a {self.kind} head must be finite, but some values are not.")
        check_logit_weight(self.logit_weight, "logit_weight")

    @property
    def width(self) -> int:
        """E."""
        return self.tensors[NAMES[self.kind][0]].shape[1]

    def check_classes(self, count: int) -> None:
        """
        Raises:
            ValueError: the head does not have `count` classes.
        """
        if self.kind == "tip-adapter-f":
            labels = self.tensors["labels"]
            if len(labels) and not 0 <= labels.min() <= labels.max() < count:
                raise ValueError(f"labels of a tip-adapter-f head must be between 0 and {count - 1}, but some are not.")
        elif len(self.tensors["weight"]) != count:
            raise ValueError(
                f"A head of {counted(len(self.tensors['weight']), 'class', 'classes')} does not fit "
                f"{counted(count, 'class name')}."
            )

    def only(self, rows: Sequence[int]) -> ClassHead:
        """That of some classes, in the order of their indices `rows`; their logits stay as they are."""
        if self.kind != "tip-adapter-f":
            return replace(self, tensors={name: tensor[list(rows)] for name, tensor in self.tensors.items()})
        labels = self.tensors["labels"]
        kept = torch.isin(labels, torch.tensor(rows, dtype=labels.dtype))  # (N,)
        places = {row: place for place, row in enumerate(rows)}
        moved = torch.tensor([places[label] for label in labels[kept].tolist()], dtype=labels.dtype)
        return replace(self, tensors={"keys": self.tensors["keys"][kept], "labels": moved})


class HeadLogits(NamedTuple):
    """The logits of a head, with its tensors where the model is; nothing is checked anew.

    Args:
        kind, tensors, logit_weight: of the `ClassHead`.
        num_classes: C.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    logit_weight: float
    num_classes: int

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        """Image embeddings (B, E) of unit length -> (B, C), multiplied by the head's weight."""
        main, other = (self.tensors[name] for name in NAMES[self.kind])
        if self.kind == "tip-adapter-f":
            return self.logit_weight * cache_logits(embeds, main.to(embeds.dtype), other, self.num_classes)
        return self.logit_weight * F.linear(embeds, main.to(embeds.dtype), other.to(embeds.dtype))


def check_kind(kind: str) -> None:
    """
    Raises:
        ValueError: there is no such kind of head.
    """
    if kind not in NAMES:
        raise ValueError(f"The kind of a head must be one of {', '.join(NAMES)}, but got {kind!r}.")


def check_logit_weight(weight: Any, name: str) -> None:
    """
    Raises:
        ValueError: the weight of a head's logits, an option called `name`, is not allowed.
    """
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 < weight < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, but got {weight!r}.")
    if weight > MAX_LOGIT_WEIGHT:  # logits are scaled by it, and overflow in the end
        raise ValueError(f"{name} must be at most {MAX_LOGIT_WEIGHT}, but got {weight!r}.")


def cache_logits(
    embeds: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, num_classes: int, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """``exp(-5.5 (1 - x F^T)) Y``: (B, E) and keys F (N, E) of classes (N,) -> (B, C).

    Args:
        hidden: (B, N), True where an image must not see an entry.
    """
    affinity = (-TIP_BETA * (1 - embeds @ keys.T)).exp()  # (B, N)
    if hidden is not None:
        affinity = affinity.masked_fill(hidden, 0.0)
    return affinity @ F.one_hot(labels, num_classes).to(affinity.dtype)
