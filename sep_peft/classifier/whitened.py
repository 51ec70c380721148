"""Whitened embeddings: those of images alone, for searching images by an image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..method.whitening import Whitening, fit_whitening
from ..tuner.files import check_file, check_numbers, read_shapes, read_tensors
from ..tuner.messages import shown
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from ..tuner.save_id import check_save_id, read_save_id
from .fitting import labelled_embeds
from .inputs import check_labels, labels_in


#: File beside the adapter that holds its whitening.
WHITENING_FILE = "sep_whitening.safetensors"


def check_whitening(whitening: Whitening | None, task: str | None = None) -> Whitening:
    """
    Args:
        whitening: of an adapter; None: it has none.
        task: whose adapter is asked for; None: the active one.

    Raises:
        ValueError: there is no whitening, or it is another adapter's.
    """
    if task is not None:
        raise ValueError(
            f"Task {shown(task)} has no whitening; the classifier's is that of its own adapter. Load the task by "
            "itself with Adapter.from_pretrained."
        )
    if whitening is None:
        raise ValueError(
            "The adapter has no whitening. Train with Recipe.retrieval(), or fit one with "
            "classifier.fit_whitening(batches)."
        )
    return whitening


@torch.no_grad()
def whitening_of(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], num_classes: int) -> Whitening:
    """The whitening of the active adapter's image embeddings, fitted in evaluation.

    Args:
        model: with a SEP adapter on its image tower.
        batches: dicts with `pixel_values`, what else the tower takes, and `labels` (B,), of the training images.
        num_classes: labels are below it.

    Raises:
        ValueError: there are no batches, one has no labels, a label is no class, or all images are of one.
    """
    tower, device = find_towers(model)["vision"], compute_device(model)
    embeds, labels = [], []
    with evaluating(model):
        for batch in batches:
            check_labels(labels_in(batch), num_classes)
            embeds.append(labelled_embeds(tower, batch, device)[0].cpu())
            labels.append(batch["labels"].cpu())
    if not embeds:
        raise ValueError("batches of the training images are needed for a whitening, but there are none.")
    return fit_whitening(torch.cat(embeds), torch.cat(labels))


def save_whitening(whitening: Whitening, folder: str | os.PathLike) -> None:
    """Write it into a folder, in fp32."""
    tensors = {"mean": whitening.mean.float().contiguous(), "matrix": whitening.matrix.float().contiguous()}
    save_file(tensors, os.path.join(folder, WHITENING_FILE))


def read_whitening(file: str, weights: str) -> Whitening:
    """
    Args:
        file: that holds it.
        weights: file of the adapter that it belongs to.

    Raises:
        ValueError: it is none; the message names the file.
        MixedSaveError: it belongs to another save than the weights.
        SafetensorError: it is cut short.
    """
    check_file(file)
    if os.path.isfile(weights):
        check_save_id(file, weights, read_save_id(weights))
    shapes = {name: tuple(shape) for name, shape in read_shapes(file).items()}
    if set(shapes) != {"mean", "matrix"}:
        raise ValueError(
            f"{file} must hold mean and matrix alone, but holds {shown(shapes)}. Copy or download it again."
        )
    check_numbers(read_tensors(file), file)
    try:
        return Whitening(**load_file(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
