"""What a classifier's `forward` is handed: shapes and labels, checked before anything runs.

Shapes are known on the host. Values are not: to read them from an accelerator is to wait for all that it was told to
do, so they are looked at on the CPU alone. Elsewhere `predict` finds scores that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..tracing import is_traced
from ..tuner.messages import shown
from ..tuner.tower import SEPTower
from ..words import are, counted
from .on_the_way import at_hand


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_images(pixel_values: Any, tower: SEPTower, frozen_embeds: Any = None) -> None:
    """
    Args:
        pixel_values: (B, channels, height, width), or (B, patches, values of a patch) for a tower that takes images of
            any shape as patches.
        tower: of the images.
        frozen_embeds: (B, E) of the images; None: not known.

    Raises:
        TypeError: they are no tensor.
        ValueError: they have another shape, there is no image, on the CPU a pixel is not finite, or there are
            `frozen_embeds` of another number of images.
    """
    if is_traced():
        return  # a branch would break the graph or forbid a size
    if not isinstance(pixel_values, torch.Tensor):
        raise TypeError(
            f"pixel_values must be a tensor, but got {type(pixel_values).__name__}. Pass what the image processor "
            "returns with return_tensors='pt'."
        )
    patches = tower.spec.mask_input == "pixel_attention_mask"
    shape = "(B, patches, values of a patch)" if patches else "(B, channels, height, width)"
    if pixel_values.ndim != (3 if patches else 4):
        raise ValueError(f"pixel_values must have the shape {shape}, but got {tuple(pixel_values.shape)}.")
    if not pixel_values.numel():
        raise ValueError(f"pixel_values hold no image: their shape is {tuple(pixel_values.shape)}.")
    if at_hand(pixel_values) and not pixel_values.isfinite().all():
        raise ValueError("pixel_values hold NaN or infinity. Look at what the image processor was given.")
    if frozen_embeds is not None and len(frozen_embeds) != len(pixel_values):
        raise ValueError(
            f"frozen_embeds must be of the same images as pixel_values, but are {len(frozen_embeds)} for "
            f"{counted(len(pixel_values), 'image')}."
        )


def check_trunk(trunk: Any, frozen_embeds: Any, trunk_layer: Any) -> None:
    """
    Args:
        trunk, frozen_embeds, trunk_layer: (B, L, D), (B, E) and (B,) of a `TrunkCache`; the last may be None.

    Raises:
        ValueError: one of the first two is missing, they belong to different numbers of images, or to none.
    """
    if is_traced():
        return
    if trunk is None or frozen_embeds is None:
        raise ValueError("A trunk needs frozen_embeds beside it. Pass both, as TrunkCache gives them.")
    counts = [len(part) for part in (trunk, frozen_embeds, trunk_layer) if part is not None]
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            "trunk, frozen_embeds and trunk_layer must be of the same images, one at least, but are of "
            f"{' and '.join(map(str, counts))}."
        )


def check_labels(labels: Any, count: int, images: int | None = None, *, waits: bool = True) -> None:
    """
    Args:
        labels: class indices.
        count: of the classes.
        images: B, that the labels belong to; None: not known.
        waits: whether values are read from an accelerator as well.

    Raises:
        TypeError: `labels` is no tensor of integers.
        ValueError: `labels` has another shape than (B,), or one of them is no index of `count` classes.
    """
    kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
    if kind not in INTEGERS:
        raise TypeError(
            f"Labels must be a tensor of integers (B,), which count in the order of the classes, but got {kind}."
        )
    if labels.ndim != 1:
        raise ValueError(f"Labels must have the shape (B,), one for each image, but got {tuple(labels.shape)}.")
    if is_traced():
        return  # a branch on data would break the graph; cross entropy checks the range as well
    if images is not None and len(labels) != images:
        raise ValueError(
            f"Labels must be one for each image, but there {are(len(labels))} {len(labels)} for "
            f"{counted(images, 'image')}."
        )
    if not (waits or at_hand(labels)):
        return
    wrong = labels[(labels < 0) | (labels >= count)]
    if len(wrong):
        raise ValueError(
            f"Labels must be between 0 and {count - 1} for {counted(count, 'class', 'classes')}, but got "
            f"{shown(sorted(set(wrong.tolist())))}."
        )


def check_targets(targets: Any, count: int, images: int | None = None, *, waits: bool = True) -> None:
    """
    Args:
        targets: 1 for the labels of each image, 0 for the other classes.
        count: C, of the classes.
        images: B, that the targets belong to; None: not known.
        waits: whether values are read from an accelerator as well.

    Raises:
        TypeError: they are no tensor.
        ValueError: they have another shape than (B, C), or hold other numbers than 0 and 1.
    """
    if not isinstance(targets, torch.Tensor):
        raise TypeError(
            f"Labels must be a tensor of 0 and 1 (B, {count}), where an image may have several classes, but got "
            f"{type(targets).__name__}."
        )
    expected = (len(targets) if images is None and targets.ndim else images, count)
    if tuple(targets.shape) != expected:
        raise ValueError(
            f"Labels must have the shape {expected}, 1 for the labels of each image and 0 for its other classes, but "
            f"got {tuple(targets.shape)}."
        )
    if is_traced() or not (waits or at_hand(targets)):
        return
    if not ((targets == 0) | (targets == 1)).all():
        raise ValueError("Labels must be 0 or 1 where an image may have several classes, but other values are there.")


def labels_in(batch: Mapping[str, Any]) -> Any:
    """The labels of a batch of training images.

    Raises:
        ValueError: it has none.
    """
    if "labels" not in batch:
        raise ValueError(f"A batch of training images needs labels beside them, but has {shown(sorted(batch))} alone.")
    return batch["labels"]
