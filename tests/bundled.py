"""The small CLIP and the images that lie in examples/assets; their fixtures are in shared_fixtures."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file


ASSETS = Path(__file__).parents[1] / "examples" / "assets"
NAMES = ["barrel", "cougar_face", "pizza", "sunflower"]
IMAGE_FILES = [sorted((ASSETS / "caltech101" / "test" / name).iterdir())[0] for name in NAMES]
NO_PROCESSOR = "This classifier has no processor {}. Pass processor=AutoProcessor.from_pretrained(...)."


def scores_of(prediction: list[dict], names: list[str] = NAMES) -> list[float]:
    """In the order of the classes."""
    scores = {entry["label"]: entry["score"] for entry in prediction}
    return [scores[name] for name in names]


@functools.cache
def shallow_clip(layers: int = 4) -> Path:
    """A folder with the small CLIP's first layers, for all tests of this process; they must not change it."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return save_shallow_clip(Path(folder.name) / "clip", layers)


def save_shallow_clip(folder: Path, layers: int = 4) -> Path:
    """The small CLIP's first layers, where what is tested does not depend on how deep a model is."""
    shutil.copytree(ASSETS / "clip-small", folder)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    found = {name: re.search(r"\.layers\.(\d+)\.", name) for name in weights}
    kept = {name: weights[name] for name, match in found.items() if match is None or int(match[1]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
