"""A run is a folder: settings, draw, checkpoint while it lasts, results at the end. Files are never half-written."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


#: What a run is resumed from, in its folder.
CHECKPOINT = "checkpoint.safetensors"


class RunFolder:
    """
    Args:
        path: of the folder; made where it is missing.
        settings: everything that the result depends on.

    Raises:
        ValueError: the folder belongs to a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        file = path / "settings.json"
        settings = json.loads(json.dumps(settings))  # as it will be read: tuples are lists
        if file.exists() and (before := json.loads(file.read_text())) != settings:
            changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            raise ValueError(
                f"{path} holds a run with other settings ({', '.join(changed)} differ). Choose another --output, or "
                "remove that folder."
            )
        write_json(file, settings)

    @property
    def finished(self) -> bool:
        return (self.path / "results.json").exists()

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results; what was needed to resume is removed afterwards."""
        write_json(self.path / "results.json", {**results, "environment": environment()})
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Written to a temporary name and renamed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Versions and machine."""
    import accelerate
    import peft
    import torch
    import transformers

    import sep_peft

    packages = (sep_peft, torch, transformers, peft, accelerate)
    return {
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in packages},
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": " ".join(sys.argv),
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
