"""`Preprocessing`: how an image becomes what a model takes, so plainly that a file can tell it to strangers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin


#: What an image processor may do beside these, and no exported file could tell.
STEPS = {"do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"}
#: Sizes (width, height) of the images that a description is tried with: wide, high, small and square.
TRIED_SIZES = ((301, 200), (97, 240), (23, 31), (64, 64))
#: Levels of 255 by which a pixel may differ: libraries round differently when they resize.
LEVELS = 3


@dataclass(frozen=True)
class Preprocessing:
    """Steps with an RGB image of 8 bits, in this order, in terms of Pillow and numpy alone.

    Args:
        resize: length of the shorter side, or (height, width); None: as it is.
        resample: Pillow's filter for that, by its name in small letters, such as "bicubic".
        crop: (height, width) of what is kept around the centre; None: all of it.
        rescale: what each level from 0 to 255 is multiplied by.
        mean, std: of each channel, subtracted and divided by.
    """

    resize: int | tuple[int, int] | None
    resample: str
    crop: tuple[int, int] | None
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, processor: ImageProcessingMixin) -> Preprocessing:
        """What an image processor of transformers does; it is tried with a few images.

        Raises:
            ValueError: it does something else.
        """
        settings = processor.to_dict()
        found = cls._read(settings)
        others = sorted(
            name for name, value in settings.items() if name.startswith("do_") and value and name not in STEPS
        )
        reason = f"it has {', '.join(others)}" if others else "" if found is not None else "of its size"
        if found is not None and not others:
            reason = found._difference(processor)
        if reason or found is None:
            raise ValueError(
                f"What {type(processor).__name__} does with images cannot be told by a file, because {reason}. Only "
                "resizing to one size or by the shorter side, cropping, rescaling and normalizing can."
            )
        return found

    @classmethod
    def _read(cls, settings: dict[str, Any]) -> Preprocessing | None:
        resize, crop = settings.get("size") or {}, settings.get("crop_size") or {}
        resize, crop = ({k: v for k, v in dict(size).items() if v is not None} for size in (resize, crop))
        sizes = {("shortest_edge",): lambda: resize["shortest_edge"], ("height", "width"): lambda: _pair(resize)}
        size = None
        if settings.get("do_resize"):
            if tuple(sorted(resize)) not in sizes:
                return None
            size = sizes[tuple(sorted(resize))]()
        normalized = settings.get("do_normalize")
        return cls(
            resize=size,
            resample=Image.Resampling(int(settings.get("resample") or 0)).name.lower(),
            crop=_pair(crop) if settings.get("do_center_crop") else None,
            rescale=float(settings["rescale_factor"]) if settings.get("do_rescale") else 1.0,
            mean=_three(settings["image_mean"]) if normalized else (0.0, 0.0, 0.0),
            std=_three(settings["image_std"]) if normalized else (1.0, 1.0, 1.0),
        )

    def _difference(self, processor: Any) -> str:
        """What the processor does otherwise; empty: nothing."""
        for image in made_images():
            width, height = image.size
            expected = processor([image], return_tensors="np")["pixel_values"][0]
            found = self(image)
            if np.shape(expected) != found.shape:
                return f"it makes {np.shape(expected)} of an image of {width} x {height}, not {found.shape}"
            levels = np.abs(expected - found) * np.array(self.std)[:, None, None] / self.rescale
            if levels.max() > LEVELS:
                return f"it differs by {levels.max():.1f} levels in an image of {width} x {height}"
        return ""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An RGB image as the model takes it, (3, height, width) in fp32."""
        if self.resize is not None:
            image = image.resize(self._resized(*image.size), Image.Resampling[self.resample.upper()])
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        levels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        return (levels * np.float32(self.rescale) - mean) / std

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None, "asked for where there is a size"
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def to_json(self) -> dict[str, Any]:
        """As an exported file tells it: `resize` is ``{"shortest_edge": N}`` or ``{"height": H, "width": W}``."""
        sizes = dict(zip(("height", "width"), self.resize, strict=True)) if isinstance(self.resize, tuple) else None
        return {
            "color": "RGB",
            "resize": {"shortest_edge": self.resize} if isinstance(self.resize, int) else sizes,
            "resample": self.resample,
            "crop": None if self.crop is None else dict(zip(("height", "width"), self.crop, strict=True)),
            "rescale": self.rescale,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def made_images() -> list[Image.Image]:
    """Images of all shapes with something to see, always the same, where nobody has handed in any."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in TRIED_SIZES]
    return [each.resize(size, Image.Resampling.BILINEAR) for each, size in zip(coarse, TRIED_SIZES, strict=True)]


def _pair(size: dict[str, int]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _three(values: Any) -> tuple[float, float, float]:
    """One number for each of three channels."""
    first, second, third = map(float, values) if not isinstance(values, (int, float)) else [float(values)] * 3
    return first, second, third
