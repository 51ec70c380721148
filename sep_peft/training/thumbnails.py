"""Small images for a page, in the page itself: as data URIs."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from ..classifier.classifier import SEPClassifier
from ..classifier.explain import explain
from ..classifier.images import read_image


#: Longest side in pixels: twice what a page shows, for screens that have two for each of its pixels.
SIDE = 320
#: How bright a patch is that no layer selected.
SHADE = 0.45


def thumbnail(image: Any) -> str:
    """An image as `read_image` takes it, made small, as a JPEG in a data URI."""
    small = read_image(image)
    small.thumbnail((SIDE, SIDE))
    return _uri(small)


def marked_thumbnail(classifier: SEPClassifier, image: Any) -> str:
    """The same as the model saw it: the patches that SEP selected as they are, the more layers did the brighter, and
    the others dark. Where the adapter selects no patches, all of it as it is."""
    settings = classifier.vision_tower.active_settings
    if settings is None or not settings.selects_tokens:
        return thumbnail(image)
    found = explain(classifier.model, classifier.processor, image)
    shares = found.counts() / max(1, len(found.layers))  # (rows, columns)
    light = torch.where(shares > 0, 0.8 + 0.2 * shares / shares.max().clamp_min(1e-9), torch.tensor(SHADE))
    height, width = found.image.shape[:2]
    scale = SIDE / max(height, width)
    size = (round(width * scale), round(height * scale))
    seen = Image.fromarray((255 * found.image).round().byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    mask = Image.fromarray((255 * light).round().byte().numpy()).resize(size, Image.Resampling.NEAREST)
    return _uri(Image.composite(seen, Image.new("RGB", size), mask))


def _uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "JPEG", quality=82)
    return data_uri("jpeg", file.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """The bytes of an image file of a kind, such as "png", as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
