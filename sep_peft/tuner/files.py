"""Adapter files: checked before they are used, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


#: What adapters can be saved in.
SAVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdapterMismatchError(ValueError):
    """An adapter file does not fit the adapter it is loaded into."""


def check_keys(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], source: str) -> None:
    """Compare key -> shape of a file with what the adapter needs.

    Raises:
        AdapterMismatchError: lists every missing and unexpected key and every other shape.
    """
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append("missing keys: " + ", ".join(missing))
    if unexpected := sorted(set(found) - set(expected)):
        problems.append("unexpected keys: " + ", ".join(unexpected))
    shapes = [
        f"{key} is {tuple(found[key])}, needed is {tuple(expected[key])}"
        for key in sorted(set(found) & set(expected))
        if tuple(found[key]) != tuple(expected[key])
    ]
    if shapes:
        problems.append("other shapes: " + ", ".join(shapes))
    if problems:
        raise AdapterMismatchError(f"{source} does not fit this model and configuration; " + "; ".join(problems))


def check_file(path: str | os.PathLike) -> None:
    """Make sure that a safetensors file is whole; reads its header only.

    Raises:
        SafetensorError: the file is cut short or no safetensors file; the message names it.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise SafetensorError(
            f"{os.fspath(path)} cannot be read ({error}); it is cut short or no safetensors file. "
            "Copy or download it again."
        ) from error


def check_folder(folder: str | os.PathLike) -> None:
    """`check_file` for the weights in a local adapter folder, where there are any."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(path):
        check_file(path)


def check_save_dtype(dtype: torch.dtype | None) -> None:
    """
    Raises:
        ValueError: `dtype` is neither None nor one of `SAVE_DTYPES`.
    """
    if dtype is not None and dtype not in SAVE_DTYPES:
        raise ValueError(f"save_dtype must be None or one of {', '.join(map(str, SAVE_DTYPES))}, but got {dtype!r}.")


def cast_adapter(folder: str | os.PathLike, dtype: torch.dtype) -> None:
    """Rewrite the weights of a saved adapter in another type, half as many bytes for bf16 and fp16.

    Loaded again they become what the adapter trains in, fp32 unless told otherwise; only the rounding stays. The file
    is replaced when it is whole.

    Args:
        folder: a local folder that `save_pretrained` wrote.
        dtype: `torch.float32`, `torch.bfloat16` or `torch.float16`.

    Raises:
        ValueError: another type, or a value that is too large for it; the file stays.
        FileNotFoundError: the folder holds no weights.
        SafetensorError: the weights are cut short.

    Example:
        >>> model.save_pretrained("my-adapter")
        >>> cast_adapter("my-adapter", torch.bfloat16)
    """
    check_save_dtype(dtype)
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(folder)} holds no {SAFETENSORS_WEIGHTS_NAME}.")
    check_file(path)
    with replace_files(folder) as temporary:
        cast = {key: cast_tensor(value, dtype, key) for key, value in load_file(path).items()}
        save_file(cast, os.path.join(temporary, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """
    Raises:
        ValueError: a value of the tensor called `name` is too large for `dtype`.
    """
    cast = tensor.to(dtype)
    if not torch.equal(cast.isfinite(), tensor.isfinite()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ValueError(f"{name} has a value of {largest:.4g}, too large for {dtype}; take torch.bfloat16.")
    return cast


@contextmanager
def replace_files(folder: str | os.PathLike) -> Iterator[str]:
    """A temporary folder whose files take their places in `folder` when the block ends without an error.

    The temporary folder lies inside its target, so that files are renamed, never copied. If one cannot take its place,
    all others go back to where they were.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed to save into.")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary,
        tempfile.TemporaryDirectory(dir=folder, prefix=".replaced-") as replaced,
    ):
        yield temporary
        _move_files(Path(temporary), folder, Path(replaced))


def _move_files(source: Path, target: Path, replaced: Path) -> None:
    """Move all files of `source` to the same places in `target`, whose own go to `replaced`; all of them or none."""
    with ExitStack() as undo:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            name = file.relative_to(source)
            for folder in (target, replaced):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (target / name).exists():
                shutil.copy2(target / name, replaced / name)  # not moved: the place is never empty
                undo.callback(os.replace, replaced / name, target / name)
            os.replace(file, target / name)
            undo.callback(os.replace, target / name, file)
        undo.pop_all()
