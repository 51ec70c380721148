"""`PatchGrid`: the patches of one image, in what an image tower takes and among its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..tuner.tower import SEPTower


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches of one image are.

    Args:
        rows, columns: of patches.
        height, width: of a patch, in pixels.
        packed: pixel values are one row a patch, (1, L, height x width x 3), as SigLIP 2 takes images of any shape;
            those after ``rows x columns`` are padding. Otherwise they are an image, (1, 3, H, W), of which pixels that
            fill no patch, at the lower and the right side, are not seen.
    """

    rows: int
    columns: int
    height: int
    width: int
    packed: bool = False

    @classmethod
    def of(cls, tower: SEPTower, inputs: Mapping[str, torch.Tensor]) -> PatchGrid:
        """
        Args:
            tower: of images.
            inputs: of one image, as a processor gives them.

        Raises:
            ValueError: the tower sees no single images, or does not cut them into patches of one size.
        """
        name = type(tower.owner).__name__
        if tower.spec.videos or tower.spec.inputs != "pixel_values":
            raise ValueError(
                f"The tower of {name} that SEP prompts sees videos or reads {tower.spec.inputs}. Only what a tower "
                "makes of single images can be explained."
            )
        size = getattr(tower.base_layer.config, "patch_size", None)
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if not isinstance(height, int) or not isinstance(width, int):
            raise ValueError(
                f"The image tower of {name} has no grid of patches to explain: patch_size of its configuration is "
                f"{size!r}."
            )
        if "spatial_shapes" in inputs:
            rows, columns = inputs["spatial_shapes"][0].tolist()
            return cls(rows, columns, height, width, packed=True)
        rows, columns = inputs["pixel_values"].shape[2] // height, inputs["pixel_values"].shape[3] // width
        return cls(rows, columns, height, width)

    @property
    def count(self) -> int:
        """Patches of the image."""
        return self.rows * self.columns

    def plain(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values of an image that has the mean color of this one all over."""
        if not self.packed:
            return pixel_values.mean(dim=(2, 3), keepdim=True).expand_as(pixel_values)
        own = pixel_values[:, : self.count]
        colors = own.unflatten(2, (self.height * self.width, -1))  # (1, P, h w 3) -> (1, P, h w, 3)
        color = colors.mean(dim=(1, 2), keepdim=True).expand_as(colors).flatten(2)  # (1, P, h w 3)
        return torch.cat([color, pixel_values[:, self.count :]], dim=1)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the shape of pixel values, summed over each patch, (rows, columns)."""
        if self.packed:
            return values[0, : self.count].sum(dim=1).view(self.rows, self.columns)  # (P,) -> (rows, columns)
        inside = values[0, :, : self.rows * self.height, : self.columns * self.width]
        # (3, H, W) -> (3, rows, h, columns, w)
        return inside.unflatten(2, (self.columns, self.width)).unflatten(1, (self.rows, self.height)).sum(dim=(0, 2, 4))

    def image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values -> (H, W, 3), without what fills no patch."""
        height, width = self.rows * self.height, self.columns * self.width
        if not self.packed:
            return pixel_values[0, :, :height, :width].permute(1, 2, 0)
        own = pixel_values[0, : self.count].view(self.rows, self.columns, self.height, self.width, 3)
        return own.transpose(1, 2).reshape(height, width, 3)  # from (rows, h, columns, w, 3)

    def place(self, position: int, tokens: int, tower: SEPTower) -> tuple[int, int] | None:
        """Row and column of the patch that a token stands for; None where it stands for none, as CLS does.

        Args:
            position: of the token, counted without prompts.
            tokens: of the layer, without prompts. Where layers come in stages, those of a later stage have fewer than
                there are patches, each of which stands for a group of them.
            tower: of images.
        """
        if tower.spec.in_stages or self.packed:
            first = tower.spec.leading_tokens
        else:  # all tokens that are no patches lead them: CLS, and as many registers as the configuration says
            first = tokens - self.count
        index = position - first
        return divmod(index, self.columns) if tokens >= self.count and 0 <= index < self.count else None
