"""The small CLIP and the images that lie in examples/assets; their fixtures are in conftest."""

from __future__ import annotations

from pathlib import Path


ASSETS = Path(__file__).parents[1] / "examples" / "assets"
NAMES = ["barrel", "cougar_face", "pizza", "sunflower"]
IMAGE_FILES = [sorted((ASSETS / "caltech101" / "test" / name).iterdir())[0] for name in NAMES]
NO_PROCESSOR = "This classifier has no processor {}. Pass processor=AutoProcessor.from_pretrained(...)."


def scores_of(prediction: list[dict], names: list[str] = NAMES) -> list[float]:
    """In the order of the classes."""
    scores = {entry["label"]: entry["score"] for entry in prediction}
    return [scores[name] for name in names]
