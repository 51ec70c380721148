"""`Explanation`: what SEP selected in an image and what in it decided, as numbers and as a drawing.

Drawing needs matplotlib, the extra ``[plot]``.
"""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from io import BytesIO

import torch

from ..tuner.messages import drawn, shown


#: What the parts of a drawing show.
DECIDED = "Decided: red patches speak for {}, blue ones against it."
SELECTED = "Selected: SEP made its prompts from the bright patches; numbers are the attention that each of them got."
#: Letters of a drawing's title for each of its columns, and inches of a column and a row.
LETTERS, COLUMN, ROW = 32, 2.4, 2.7


@dataclass(frozen=True)
class LayerExplanation:
    """What the fusion before one layer saw of one image.

    Args:
        layer: index of the encoder layer, counted from 0.
        patches: K chosen tokens, strongest first, as (row, column) in the grid of patches; None is a token that stands
            for no patch, such as CLS.
        weights: (heads, n, K), how strongly each prompt attends to each chosen token; rows sum to 1.
    """

    layer: int
    patches: list[tuple[int, int] | None]
    weights: torch.Tensor


@dataclass(frozen=True, repr=False)
class Explanation:
    """What SEP did with one image; notebooks show it as a drawing.

    Args:
        image: (height, width, 3) in 0..1, the image as the model saw it, cropped and resized.
        grid: rows and columns of patches.
        layers: one entry a fusion that read selected tokens, in order.
        label: the class that `effects` speak of; None: they were not asked for.
        score: of the class, a probability.
        effects: (rows, columns), how much each patch adds to the log odds of the class, in nats, above a plain image of
            the mean color: positive where it speaks for the class.
    """

    image: torch.Tensor
    grid: tuple[int, int]
    layers: list[LayerExplanation]
    label: str | None = None
    score: float | None = None
    effects: torch.Tensor | None = None

    def __repr__(self) -> str:
        layers = [layer.layer for layer in self.layers]
        answer = "" if self.label is None or self.score is None else f"{shown(self.label)} {self.score:.1%}, "
        return f"Explanation({answer}{self.grid[0]} x {self.grid[1]} patches, selected before layers {layers})"

    def counts(self) -> torch.Tensor:
        """How often each patch was chosen over all layers, (rows, columns) int64."""
        counts = torch.zeros(self.grid, dtype=torch.long)
        for layer in self.layers:
            for patch in layer.patches:
                if patch is not None:
                    counts[patch] += 1
        return counts

    def plot(self, path: str | os.PathLike | None = None, columns: int = 4):
        """Draw the image, what decided, and what was selected before each layer; the title says what is what.

        Args:
            path: file to write; the ending chooses the format. None writes nothing.
            columns: images in a row, at most.

        Returns:
            the matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = self._draw(columns)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _repr_png_(self) -> bytes | None:
        """The drawing for notebooks; None without matplotlib, so that they show the text."""
        try:
            figure = self._draw(columns=4)
        except ImportError:
            return None
        png = BytesIO()
        figure.savefig(png, format="png", dpi=100)
        return png.getvalue()

    def _draw(self, columns: int):
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Drawing needs matplotlib: pip install sep_peft[plot]") from error
        panels = 1 + (self.effects is not None) + len(self.layers)
        columns = min(columns, panels)
        rows = -(-panels // columns)
        title = self._title(columns)
        size = COLUMN * columns, ROW * rows + 0.2 * (title.count("\n") + 1)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(self.image.numpy())
        axes[0].set_title("input", fontsize=9)
        if self.effects is not None:
            self._draw_effects(axes[1], self.effects)
        for axis, layer in zip(axes[panels - len(self.layers) :], self.layers, strict=False):
            self._draw_layer(axis, layer)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        return figure

    def _title(self, columns: int) -> str:
        parts = [] if self.effects is None else [DECIDED.format(drawn(str(self.label)))]
        parts += [SELECTED] if self.layers else []
        return "\n".join(textwrap.fill(part, LETTERS * columns) for part in parts)

    def _draw_effects(self, axis, effects: torch.Tensor) -> None:
        gray = self.image.mean(dim=2).numpy()
        axis.imshow(gray, cmap="gray", vmin=-0.5, vmax=1.5)  # of low contrast, below the colors
        limit = effects.abs().max().item() or 1.0
        height, width = self.image.shape[:2]
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # as that of the image
        axis.imshow(effects.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6, extent=extent)
        axis.set_title(f"{drawn(str(self.label))} {self.score:.0%}: decided", fontsize=9)

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
        if all(patch is None for patch in layer.patches):
            note = ": no patch"
        else:
            note = " + CLS" if None in layer.patches else ""
        axis.set_title(f"selected before layer {layer.layer}{note}", fontsize=9)
