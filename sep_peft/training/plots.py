"""Drawings of an evaluation and of a training; they need matplotlib, the extra ``[plot]``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Protocol

import torch

from ..classifier.images import read_image
from ..tuner.messages import drawn
from .history import MEASURES, History
from .metrics import Bin


#: Classes up to which a confusion matrix has its numbers written into it, and up to which it names its rows.
NUMBERED_CLASSES, NAMED_CLASSES = 20, 60


class Wrong(Protocol):
    """An image and what was said of it, as `Mistake` has it."""

    @property
    def image(self) -> Any: ...

    @property
    def label(self) -> str: ...

    @property
    def said(self) -> str: ...

    @property
    def score(self) -> float: ...


def confusion(matrix: torch.Tensor, names: Sequence[str], path: str | os.PathLike | None):
    """Counts (C, C), rows in shares of their images; a class without one has an empty row."""
    count = len(names)
    side = min(max(4.0, 0.45 * count), 14.0)
    figure = _figure((side + 2.2, side + 1.2))
    axis = figure.subplots()
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
    shown = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axis, label="share of the class's images", shrink=0.8)
    axis.set_xlabel("said")
    axis.set_ylabel("is")
    if count <= NAMED_CLASSES:
        labels = [drawn(name) for name in names]
        size = 9 if count <= NUMBERED_CLASSES else 6
        axis.set_xticks(range(count), labels, rotation=90, fontsize=size)
        axis.set_yticks(range(count), labels, fontsize=size)
    if count <= NUMBERED_CLASSES:
        for row, column in matrix.nonzero().tolist():
            dark = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(int(matrix[row, column])), ha="center", va="center", color=dark, fontsize=8)
    return _written(figure, path)


def reliability(bins: Sequence[Bin], error: float, path: str | os.PathLike | None):
    """Accuracy over the best score; below, how many images have it."""
    figure = _figure((4.6, 5.2))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(bins)
    places = [(index + 0.5) * width for index in range(len(bins))]
    upper.bar(places, [each.accuracy for each in bins], 0.94 * width, color="tab:blue", label="accuracy")
    used = [each for each in bins if each.count]
    upper.plot([0, 1], [0, 1], color="gray", linestyle="--", label="as sure as right")
    upper.plot([each.score for each in used], [each.accuracy for each in used], "o", color="black", markersize=3)
    upper.set_ylabel("share that is right")
    upper.set_ylim(0, 1)
    upper.set_title(f"calibration error {error:.1f} %")
    upper.legend(loc="upper left")
    lower.bar(places, [each.count for each in bins], 0.94 * width, color="tab:gray")
    lower.set_xlabel("score")
    lower.set_ylabel("images")
    lower.set_xlim(0, 1)
    return _written(figure, path)


def curves(history: History, path: str | os.PathLike | None):
    """Loss and accuracy over the epochs; beside accuracy that of zero-shot, and the epoch whose weights are the best.

    Raises:
        ValueError: no epoch has ended.
    """
    figure, right, epochs = _beside_loss(history)
    right.plot(
        epochs,
        [row["accuracy"] for row in history],
        ".-",
        color="tab:gray",
        label="training: augmented, by texts alone",
    )
    if history.measure is not None:
        right.plot(epochs, history.measured, ".-", color="tab:orange", label=MEASURES[history.measure])
        right.axvline(history.best, color="tab:orange", linestyle=":", label=f"best epoch, {history.best}")
    if history.zero_shot is not None:
        right.axhline(history.zero_shot, color="black", linestyle="--", label="zero-shot on val")
    right.set_ylabel("accuracy (%)" if history.measure in (None, "val_accuracy") else "%")
    right.set_ylim(0, 102)
    right.legend(fontsize=8)
    return _written(figure, path)


def pair_curves(history: History, path: str | os.PathLike | None):
    """Loss over the epochs, and recall of images by captions and of captions by images beside the frozen model.

    Raises:
        ValueError: no epoch has ended.
    """
    figure, right, epochs = _beside_loss(history)
    if history.measure is None:
        right.plot(
            epochs, [row["accuracy"] for row in history], ".-", color="tab:gray", label="captions of a batch told"
        )
    else:
        for way, color in (("image_to_text", "tab:orange"), ("text_to_image", "tab:green")):
            for rank, style in ((1, ":"), (5, "--"), (10, "-")):
                name = f"{way.replace('_', ' ')}, at {rank}"
                right.plot(epochs, [row[f"val_{way}_{rank}"] for row in history], style, color=color, label=name)
                frozen = history.rows[0][f"frozen_{way}_{rank}"]
                right.axhline(frozen, color=color, linestyle=style, linewidth=0.7, alpha=0.5)
        right.axvline(history.best, color="black", linestyle=":", linewidth=0.7, label=f"best epoch, {history.best}")
        right.set_title("recall on val; pale: without the adapter", fontsize=9)
    right.set_ylabel("%")
    right.set_ylim(0, None)
    right.legend(fontsize=6)
    return _written(figure, path)


def wrong(mistakes: Sequence[Wrong], path: str | os.PathLike | None, columns: int = 4):
    """Images with what was said, how surely, and what they are.

    Raises:
        ValueError: there are none.
    """
    if not mistakes:
        raise ValueError("There is nothing to draw: every image was told.")
    columns = min(columns, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = _figure((2.5 * columns, 2.9 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, mistake in zip(axes, mistakes, strict=False):  # the last row may have room left
        axis.imshow(read_image(mistake.image))
        axis.set_title(f"{drawn(mistake.said)} {mistake.score:.0%}\nis {drawn(mistake.label)}", fontsize=9)
    return _written(figure, path)


def png(figure) -> bytes:
    """A figure as the bytes of a PNG."""
    file = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # tables beside a drawing have the names
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _beside_loss(history: History):
    """A figure with the loss over the epochs, its right half, which is still blank, and the epochs.

    Raises:
        ValueError: no epoch has ended.
    """
    if not history.rows:
        raise ValueError("There is nothing to draw: no epoch has ended.")
    figure = _figure((7.6, 3.2))
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], ".-", color="tab:blue")
    left.set_ylabel("loss")
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure, right, epochs


def _figure(size: tuple[float, float]):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install sep_peft[plot]") from error
    return Figure(figsize=size, layout="constrained")


def _written(figure, path: str | os.PathLike | None):
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
