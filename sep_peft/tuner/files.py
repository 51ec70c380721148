"""Adapter files: checked before they are used, and written whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .disk import full_disk_named
from .json_files import read_json
from .messages import one_line, printable
from .save_id import FIRST_PARTS, check_save_id, config_save_id, read_save_id, save_stamped


#: What adapters can be saved in.
SAVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


#: The largest number that an adapter may hold: that of half precision, far above what training leaves. Numbers that are
#: finite but larger overflow once they are squared.
MAX_WEIGHT = torch.finfo(torch.float16).max
#: Largest header of a safetensors file, in bytes; that of an adapter has some 150 for each tensor.
MAX_HEADER_BYTES = 2**22
#: Keys that an error message lists of each kind.
LISTED_KEYS = 50
#: Characters of a key that it shows.
LONGEST_KEY = 300


class AdapterMismatchError(ValueError):
    """An adapter file does not fit the adapter it is loaded into."""


@dataclass(frozen=True)
class WeightsOrigin:
    """Where the weights of an adapter lie: beside the configuration that was read there.

    Attributes:
        path: a folder, or the id of a repository on the Hub.
        subfolder: below `path`.
        hub_options: keyword arguments of `hf_hub_download`.
        options: the configuration as it was read, without what loading fills in.
        frozen: whether that was the configuration of a frozen adapter, as PEFT saves all.
    """

    path: str
    subfolder: str | None
    hub_options: Mapping[str, Any] = field(repr=False)  # may hold a token
    options: Mapping[str, Any] = field(repr=False)
    frozen: bool

    def find(self) -> str | None:
        """The file on this machine, downloaded where it is on the Hub; None where there is none."""
        for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):  # as PEFT looks for them
            if os.path.isdir(self.path):
                file = os.path.join(self.path, self.subfolder or "", name)
                if os.path.isfile(file):
                    return file
                continue
            try:
                return hf_hub_download(self.path, name, subfolder=self.subfolder, **self.hub_options)
            except EntryNotFoundError:
                continue
        return None


def check_keys(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], source: str) -> None:
    """Compare key -> shape of a file with what the adapter needs.

    Raises:
        AdapterMismatchError: lists missing and unexpected keys and other shapes, `LISTED_KEYS` of each.
    """
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append("missing keys: " + _listed(missing))
    if unexpected := sorted(set(found) - set(expected)):
        problems.append("unexpected keys: " + _listed(unexpected))
    shapes = [
        f"{key} is {tuple(found[key])}, needed is {tuple(expected[key])}"
        for key in sorted(set(found) & set(expected))
        if tuple(found[key]) != tuple(expected[key])
    ]
    if shapes:
        problems.append("other shapes: " + _listed(shapes))
    if problems:
        raise AdapterMismatchError(f"{source} does not fit this model and configuration; " + "; ".join(problems))


def check_numbers(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Refuse weights that no training leaves.

    Args:
        tensors: key and tensor, of any shape.
        source: of the tensors, for the message.

    Raises:
        ValueError: lists the keys whose tensors hold NaN, infinity or a number above `MAX_WEIGHT` in size.
    """
    wrong = []
    for key, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            smallest, largest = tensor.detach().float().aminmax()  # NaN where there is any
            if not (smallest >= -MAX_WEIGHT and largest <= MAX_WEIGHT):
                wrong.append(key)
    if wrong:
        raise ValueError(
            f"{source} holds numbers that are not finite or larger than {MAX_WEIGHT:.0f} in {_listed(sorted(wrong))}. "
            "Train with a lower learning rate, or take an earlier save."
        )


def _listed(items: list[str]) -> str:
    rest = len(items) - LISTED_KEYS
    return ", ".join(printable(item[:LONGEST_KEY]) for item in items[:LISTED_KEYS]) + (
        f" and {rest} more" if rest > 0 else ""
    )


def read_shapes(path: str | os.PathLike) -> dict[str, torch.Size]:
    """Key -> shape of a file of weights, without reading the weights.

    Raises:
        SafetensorError: the file is cut short or no safetensors file; the message names it.
        ValueError: a file that is not of safetensors cannot be read, or holds more than tensors.
    """
    if not _is_safetensors(path):
        return {key: tensor.shape for key, tensor in _read_pickled(path, "meta").items()}
    check_file(path)
    with safe_open(path, framework="pt") as file:
        return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}


def read_tensors(path: str | os.PathLike) -> Iterator[tuple[str, torch.Tensor]]:
    """Key and tensor of each entry of a file of weights, on the CPU and one after the other; see `read_shapes`."""
    if not _is_safetensors(path):
        yield from _read_pickled(path, "cpu").items()
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            yield key, file.get_tensor(key)


def _is_safetensors(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(".safetensors")


def load_pickled(path: str | os.PathLike, device: str = "cpu") -> Any:
    """What torch.save wrote, if it is made of tensors and plain Python; no code of it runs.

    Raises:
        ValueError: it is damaged or holds anything else. The message does not repeat torch's, which says how to run the
            code of a file.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and torch raise many kinds
        raise ValueError(
            f"{os.fspath(path)} cannot be read: it is cut short or damaged, or holds more than tensors. Copy or "
            "download it again."
        ) from error


def _check_archive(path: str | os.PathLike) -> None:
    """torch.save compresses nothing, so an archive that holds more bytes than it has is made to take memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("the archive is compressed")


def is_state_dict(data: Any) -> bool:
    """Whether it is a dict of strided tensors by name."""
    return isinstance(data, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in data.items()
    )


def _read_pickled(path: str | os.PathLike, device: str) -> dict[str, torch.Tensor]:
    data = load_pickled(path, device)
    if not is_state_dict(data):
        raise ValueError(
            f"{os.fspath(path)} holds more than tensors by name, so it is no file of an adapter's weights."
        )
    return data


def check_file(path: str | os.PathLike) -> None:
    """Make sure that a safetensors file is whole; reads its header only.

    Raises:
        SafetensorError: the file is cut short or no safetensors file, or its header is larger than `MAX_HEADER_BYTES`;
            the message names it.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if MAX_HEADER_BYTES < size <= os.path.getsize(path):  # parsed, a header takes many times its size
        raise SafetensorError(
            f"{os.fspath(path)} has a header of {size} bytes, but at most {MAX_HEADER_BYTES} are read."
        )
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise SafetensorError(
            f"{os.fspath(path)} cannot be read ({one_line(str(error))}); it is cut short or no safetensors file. "
            "Copy or download it again."
        ) from error


def check_folder(folder: str | os.PathLike) -> None:
    """`check_file` for the weights in a local adapter folder, where there are any.

    Raises:
        SafetensorError: the weights are cut short.
        MixedSaveError: weights and configuration belong to two saves.
        JSONFileError: the configuration is damaged.
    """
    path, config = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        return
    check_file(path)
    if os.path.isfile(config):
        check_save_id(path, config, config_save_id(read_json(config)))


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
        save_id = read_save_id(path)
        save_stamped(cast, os.path.join(temporary, SAFETENSORS_WEIGHTS_NAME), save_id)


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
    all others go back to where they were. Temporary folders that killed processes of this machine left are removed.

    Raises:
        NotADirectoryError: `folder` is a file.
        DiskFullError: its disk is full; the folder is as it was.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed to save into.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    mark = f"{_node()}-{os.getpid()}-"
    with (
        full_disk_named(folder),
        tempfile.TemporaryDirectory(dir=folder, prefix=f".saving-{mark}") as temporary,
        tempfile.TemporaryDirectory(dir=folder, prefix=f".replaced-{mark}") as replaced,
    ):
        yield temporary
        _move_files(Path(temporary), folder, Path(replaced))


def _node() -> str:
    """This machine, in letters for the name of a folder."""
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:32]


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left of `replace_files`; what others left may be in use."""
    leftover = re.compile(rf"\.(?:saving|replaced)-{_node()}-(\d+)-[^-]+")
    for path in folder.iterdir():
        match = leftover.fullmatch(path.name)
        if match is not None and path.is_dir() and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)  # another process may remove it at the same time


def _move_order(file: Path) -> tuple:
    """Weights and configuration come first, files of classes last: see `save_id`."""
    first = FIRST_PARTS.index(file.name) if file.name in FIRST_PARTS else len(FIRST_PARTS)
    return first, file.suffix == ".json", file


def _move_files(source: Path, target: Path, replaced: Path) -> None:
    """Move all files of `source` to the same places in `target`, whose own go to `replaced`; all of them or none."""
    with ExitStack() as undo:
        for file in sorted((path for path in source.rglob("*") if path.is_file()), key=_move_order):
            name = file.relative_to(source)
            for folder in (target, replaced):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (target / name).exists():
                shutil.copy2(target / name, replaced / name)  # not moved: the place is never empty
                undo.callback(os.replace, replaced / name, target / name)
            os.replace(file, target / name)
            undo.callback(os.replace, target / name, file)
        undo.pop_all()
