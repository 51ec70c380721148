"""A checkpoint of the authors' code, and what that code computed with it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file


REFERENCE = Path(__file__).parent / "data" / "reference"
CHECKPOINT = REFERENCE / "prompt_learner" / "model.pth.tar-50"
LAYERS = json.loads((REFERENCE / "settings.json").read_text())["layers"]
EXPECTED = load_file(REFERENCE / "expected.safetensors")
