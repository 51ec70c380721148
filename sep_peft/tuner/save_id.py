"""One id in all parts of a save, so that parts of two saves are told apart when they are loaded.

Files take their places one after the other, and a process that is killed meanwhile leaves some of each save. The id is
made of what is saved. Parts without one, as PEFT writes them, fit to any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save


#: Key of the id: in the metadata of weights, and in the configuration's `auto_mapping`, of which PEFT reads other keys
#: and which it writes anew whenever it saves.
SAVE_ID = "sep_save_id"
#: Weights come first: as long as they are old, whatever has an id must have theirs.
FIRST_PARTS = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)


class MixedSaveError(ValueError):
    """A folder holds parts of two saves."""


def stamp_files(folder: str | os.PathLike) -> str:
    """Write the id of a save into its configuration and all its weights; returns it.

    Args:
        folder: with all parts of the save, and nothing else.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    save_id = digest.hexdigest()[:32]
    for path in Path(folder).glob("*.safetensors"):
        save_stamped(load_file(path), path, save_id)
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_mapping"] = (config.get("auto_mapping") or {}) | {SAVE_ID: save_id}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return save_id


def save_stamped(tensors: dict[str, torch.Tensor], file: str | os.PathLike, save_id: str | None) -> None:
    """Write a safetensors file with the id of its save; the same tensors and id make the same bytes.

    safetensors writes several entries of metadata in an order that changes from save to save, so they are sorted here.
    """
    data = save(tensors, metadata={"format": "pt"} | ({} if save_id is None else {SAVE_ID: save_id}))
    end = 8 + int.from_bytes(data[:8], "little")  # eight bytes hold the length of the header, which is JSON
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    if len(ordered) != end - 8:
        raise ValueError(f"The header of {os.fspath(file)} cannot be sorted in its place.")
    Path(file).write_bytes(data[:8] + ordered + data[end:])


def read_save_id(file: str | os.PathLike) -> str | None:
    """The id in a safetensors file; None where it has none."""
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get(SAVE_ID)


def config_save_id(config: Any) -> str | None:
    """The id in what adapter_config.json holds; None where it has none."""
    mapping = config.get("auto_mapping") if isinstance(config, dict) else None
    return mapping.get(SAVE_ID) if isinstance(mapping, dict) else None


def check_save_id(file: str | os.PathLike, other: str, expected: str | None) -> None:
    """Make sure that a safetensors file belongs to the same save as another file.

    Args:
        file: of safetensors.
        other: path of the other file, for the message.
        expected: the other file's id.

    Raises:
        MixedSaveError: it has another id.
    """
    if read_save_id(file) not in (None, expected):
        raise MixedSaveError(
            f"{os.fspath(file)} and {other} belong to two different saves: a save was interrupted while it replaced an "
            "older one. Save again, or copy or download all files of one save."
        )
