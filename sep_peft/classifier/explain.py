"""`explain`: which tokens of an image SEP selected before each layer, and how its prompts attend to them.

Drawing needs matplotlib, the extra ``[plot]``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..tuner.model import find_towers
from ..tuner.offload import compute_device
from .images import read_image


@dataclass(frozen=True)
class LayerExplanation:
    """What the fusion before one layer saw of one image.

    Args:
        layer: index of the encoder layer, counted from 0.
        patches: K chosen tokens, strongest first, as (row, column) in the grid of patches; None is CLS.
        weights: (heads, n, K), how strongly each prompt attends to each chosen token; rows sum to 1.
    """

    layer: int
    patches: list[tuple[int, int] | None]
    weights: torch.Tensor


@dataclass(frozen=True)
class Explanation:
    """What SEP did with one image.

    Args:
        image: (height, width, 3) in 0..1, the image as the model saw it, cropped and resized.
        grid: rows and columns of patches.
        layers: one entry a fusion, in order.
    """

    image: torch.Tensor
    grid: tuple[int, int]
    layers: list[LayerExplanation]

    def counts(self) -> torch.Tensor:
        """How often each patch was chosen over all layers, (rows, columns) int64."""
        counts = torch.zeros(self.grid, dtype=torch.long)
        for layer in self.layers:
            for patch in layer.patches:
                if patch is not None:
                    counts[patch] += 1
        return counts

    def plot(self, path: str | os.PathLike | None = None, columns: int = 4):
        """Draw the image once a layer: chosen patches bright, with the mean attention that the prompts pay to each.

        Args:
            path: file to write; the ending chooses the format. None writes nothing.
            columns: images in a row.

        Returns:
            the matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Drawing needs matplotlib: pip install sep_peft[plot]") from error
        panels = len(self.layers) + 1
        rows = -(-panels // columns)
        figure = Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(self.image.numpy())
        axes[0].set_title("input", fontsize=9)
        for axis, layer in zip(axes[1:], self.layers, strict=False):
            self._draw_layer(axis, layer)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _draw_layer(self, axis, layer: LayerExplanation) -> None:
        height, width = self.image.shape[0] / self.grid[0], self.image.shape[1] / self.grid[1]
        shade = torch.full((*self.image.shape[:2], 1), 0.3)
        attended = layer.weights.mean(dim=(0, 1))  # (heads, n, K) -> (K,)
        for patch, weight in zip(layer.patches, attended.tolist(), strict=True):
            if patch is None:
                continue
            top, left = round(patch[0] * height), round(patch[1] * width)
            shade[top : round(top + height), left : round(left + width)] = 1.0
            axis.text(
                left + width / 2,
                top + height / 2,
                f"{weight:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white",
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "black", "alpha": 0.6, "linewidth": 0},
            )
        axis.imshow((self.image * shade).numpy())
        note = " + CLS" if None in layer.patches else ""
        axis.set_title(f"before layer {layer.layer}{note}", fontsize=9)


@torch.no_grad()
def explain(model: nn.Module, processor, image: Any) -> Explanation:
    """Run one image through the active adapter's image tower and report what its fusions saw.

    Args:
        model: with a SEP adapter on its image tower.
        processor: a processor or image processor of transformers.
        image: a path, URL or `PIL.Image`.

    Returns:
        Explanation.

    Raises:
        ValueError: the adapter selects no tokens in the image tower, or the image cannot be read.
    """
    tower = find_towers(model).get("vision")
    settings = None if tower is None else tower.active_settings
    if tower is None or settings is None or not settings.selects_tokens:
        raise ValueError("There is nothing to explain: no active SEP adapter selects tokens in the image tower.")
    processor = getattr(processor, "image_processor", processor)
    device = compute_device(tower)
    pixel_values = processor(read_image(image), return_tensors="pt")["pixel_values"].to(device)
    trace: dict = {}
    tower.embed(pixel_values=pixel_values, trace=trace)
    patch = cast(Any, tower.base_layer).config.patch_size
    grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
    return Explanation(
        image=_displayed(pixel_values[0], processor),
        grid=grid,
        layers=[
            LayerExplanation(
                layer=index,
                patches=[
                    _patch(position, grid, tower.spec.leading_tokens) for position in seen.token_positions[0].tolist()
                ],
                weights=seen.weights[0].float().cpu(),
            )
            for index, seen in sorted(trace.items())
        ],
    )


def _patch(position: int, grid: tuple[int, int], leading: int) -> tuple[int, int] | None:
    """Index of a token -> its place in the grid; None for the tokens that lead the patches."""
    return None if position < leading else divmod(position - leading, grid[1])


def _displayed(pixel_values: torch.Tensor, processor) -> torch.Tensor:
    """Normalized (3, H, W) -> (H, W, 3) in 0..1."""
    mean = torch.tensor(getattr(processor, "image_mean", None) or [0.0] * 3)[:, None, None]
    std = torch.tensor(getattr(processor, "image_std", None) or [1.0] * 3)[:, None, None]
    return (pixel_values.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
