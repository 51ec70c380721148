"""Pixels of test images as the model takes them, kept for all cells of a command: each image is read once."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image


class KeptPixels:
    """Image -> its pixels (3, H, W) as the processor made them, to the bit; None for one that cannot be read.

    A processor that resizes 8-bit images and normalizes them afterwards gives each channel 256 values at most. Pixels
    are then kept as the places of their values among these, a byte each; others are kept as they are. The first images
    are kept, until there is no room for the next.

    Args:
        image_processor: of transformers, which made all pixels.
        room: bytes that pixels may take.
    """

    def __init__(self, image_processor, room: int):
        self._image_processor, self._left = image_processor, room
        self._found: dict[Hashable, torch.Tensor | None] = {}
        self._values: torch.Tensor | None = None  # of the channels, (3, 256), ascending
        self._asked = False

    def __contains__(self, image: Hashable) -> bool:
        return image in self._found

    def stacked(self, images: Iterable[Hashable]) -> tuple[torch.Tensor | None, list[bool]]:
        """Pixels (B, 3, H, W) of those that could be read, None where there are none; and which these are."""
        found = [self._found[image] for image in images]
        pixels = [self._unpacked(kept) for kept in found if kept is not None]
        return (torch.stack(pixels) if pixels else None), [kept is not None for kept in found]

    def add(self, images: Sequence[Hashable], readable: Sequence[bool], pixels: torch.Tensor | None) -> None:
        """Keep images, of which `pixels` (B, 3, H, W) has those that are readable, in order."""
        rows = iter(() if pixels is None else pixels)
        for image, could_read in zip(images, readable, strict=True):
            kept = self._packed(next(rows)) if could_read else None
            size = 0 if kept is None else kept.nbytes
            if image not in self._found and size <= self._left:
                self._left -= size
                self._found[image] = kept

    def keep_only(self, data_sets: Iterable[str]) -> None:
        """Drop the images of other data sets; an image begins with the name of its own."""
        wanted = set(data_sets)
        for image in [image for image in self._found if image[0] not in wanted]:
            kept = self._found.pop(image)
            self._left += 0 if kept is None else kept.nbytes

    def _packed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(3, H, W), in bytes where that loses nothing."""
        if not self._asked and pixels.ndim == 3:
            self._values, self._asked = channel_values(self._image_processor, pixels.shape[-2:]), True
        if self._values is None or len(pixels) != len(self._values):
            return pixels.clone()  # not the whole batch that it is a part of
        flat = pixels.flatten(1).contiguous()  # (3, H W)
        places = torch.searchsorted(self._values, flat).clamp_(max=self._values.shape[1] - 1)
        if not torch.equal(self._values.gather(1, places), flat):
            return pixels.clone()
        return places.to(torch.uint8).view(pixels.shape)

    def _unpacked(self, kept: torch.Tensor) -> torch.Tensor:
        if kept.dtype != torch.uint8 or self._values is None:
            return kept
        return self._values.gather(1, kept.flatten(1).long()).view(kept.shape)


def channel_values(image_processor, size: Sequence[int]) -> torch.Tensor | None:
    """What a processor makes of the 256 values of each channel, (3, 256), ascending; None where these are not as many.

    Args:
        size: height and width of the pixels that it makes, so that an image of this size is not resized.
    """
    height, width = size
    if height * width < 256:
        return None
    grey = torch.arange(height * width, dtype=torch.int32).remainder(256).to(torch.uint8)  # (H W,)
    image = Image.fromarray(grey.view(height, width).numpy()).convert("RGB")
    pixels = image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    values = [channel.unique() for channel in pixels]
    return torch.stack(values) if all(len(each) == 256 for each in values) else None


@functools.cache
def kept_pixels(model: str, data_root: Path, room: int) -> KeptPixels:
    """Those of this process for the processor of a model and the images below a folder."""
    from transformers import AutoProcessor

    return KeptPixels(AutoProcessor.from_pretrained(model).image_processor, room)
