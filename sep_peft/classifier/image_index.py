"""`ImageIndex`: embeddings of the images in a folder, kept in a file, of which only what has changed is made anew."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..method.whitening import Whitening
from ..tuner.disk import try_folder
from ..tuner.files import replace_files
from .embeddings import check_batch_size, embed_images
from .images import find_images


#: Embeddings of the same image by the same model differ by no more in any entry, whatever machine computed them.
SAME_MODEL = 1e-5


@dataclass(frozen=True)
class ImageIndex:
    """Images of a folder with their embeddings.

    Args:
        folder: that the images are in and below.
        names: paths of N images below the folder.
        embeds: (N, E), of unit length, on the CPU.
        unreadable: name -> what is wrong, of the images that are left out.
        embedded: how many images were embedded for it; the others' embeddings were there.
    """

    folder: Path
    names: tuple[str, ...]
    embeds: torch.Tensor
    unreadable: dict[str, str]
    embedded: int

    @classmethod
    def of_folder(
        cls,
        folder: str | os.PathLike,
        model: torch.nn.Module,
        processor: Any,
        *,
        file: str | os.PathLike | None = None,
        adapter: str | None = None,
        batch_size: int = 32,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> ImageIndex:
        """The index of a folder as it is now.

        Images whose name, size and time of change are those in the file keep their embeddings; if another model made
        these, which is found out by an image that is embedded each time, all are made anew. What is written is whole;
        after an error or Ctrl-C it holds what was embedded before.

        Args:
            folder: images in it and below are taken, hidden ones not.
            model, processor, adapter, batch_size: as for `embed_images`.
            file: where embeddings are kept; None: a file for this folder among the assets of huggingface_hub's cache.
            progress: wraps what is iterated over.

        Raises:
            NotADirectoryError: there is no such folder.
            IsADirectoryError: `file` is a folder.
            ValueError: it holds no image that can be read, or `batch_size` is below 1.
            OSError: the file cannot be written.
        """
        folder = Path(folder)
        check_batch_size(batch_size)
        if not folder.is_dir():
            raise NotADirectoryError(f"There is no folder {str(folder)!r}.")
        file = index_file(folder) if file is None else Path(file)
        if file.is_dir():
            raise IsADirectoryError(f"An index is a file, but {str(file)!r} is a folder. Name a file in it.")
        try_folder(file.parent)  # before all is embedded
        probe = embed_images(model, processor, [_probe()], 1, adapter)[0]  # (E,)
        known, found, unreadable, marks = _read(file, probe), {}, {}, _marks(folder)
        missing = [name for name, mark in marks.items() if known.get(name, ("",))[0] != mark]
        found |= {name: known[name][1] for name in marks.keys() - set(missing)}
        try:
            for start in progress(range(0, len(missing), batch_size)):
                for name, embed in _embed(missing[start : start + batch_size], folder, model, processor, adapter):
                    (unreadable if isinstance(embed, str) else found)[name] = embed
        finally:  # what was embedded before an interruption is kept
            names = tuple(name for name in marks if name in found)
            if names:
                embeds = torch.stack([found[name] for name in names])  # N x (E,) -> (N, E)
                _write(file, {name: marks[name] for name in names}, embeds, probe)
        if not names:
            raise ValueError(f"{str(folder)!r} holds no image that can be read.")
        return cls(folder, names, embeds, unreadable, len(missing) - len(unreadable))

    def search(
        self, embed: torch.Tensor, top_k: int = 10, whitening: Whitening | None = None
    ) -> list[tuple[str, float]]:
        """The images that are most similar to an embedding: every one is compared, none can be missed.

        Args:
            embed: (E,), of unit length, of an image or a text.
            top_k: how many; fewer where there are fewer.
            whitening: that images are compared by; None: as they are, and so with a text. What is kept stays as it is.

        Returns:
            name and cosine, the most similar first.

        Raises:
            ValueError: `top_k` is below 1, or the embedding has another size.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, but got {top_k}.")
        if embed.shape != self.embeds.shape[1:]:
            raise ValueError(
                f"The embedding must have the shape {tuple(self.embeds.shape[1:])}, but has {tuple(embed.shape)}."
            )
        embeds, embed = self.embeds, embed.to(self.embeds)
        if whitening is not None:
            embeds, embed = whitening(embeds), whitening(embed)
        best = (embeds @ embed).topk(min(top_k, len(self.names)))  # (N, E) @ (E,) -> (N,)
        return [(self.names[i], cos) for i, cos in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def index_file(folder: Path) -> Path:
    """Where the embeddings of a folder's images are kept: a place of its own in the cache; the folder stays as is."""
    name = sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cached_assets_path("sep_peft", "image_index", name) / "index.safetensors"


def of_base(folder: Path, file: Path | None) -> Path:
    """Where the base model's embeddings are kept, beside the file of an adapter's; None: the one in the cache."""
    file = index_file(folder) if file is None else file
    return file.with_name(f"{file.stem}-base{file.suffix}")


def _marks(folder: Path) -> dict[str, str]:
    """Name -> what changes when the file does, of all images in a folder."""
    marks = {}
    for path in find_images(folder):
        try:
            stat = path.stat()
        except FileNotFoundError:  # it went away after it was listed
            continue
        marks[path.relative_to(folder).as_posix()] = f"{stat.st_size} {stat.st_mtime_ns}"
    return marks


def _probe() -> Image.Image:
    """An image whose embedding tells models apart."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def _embed(
    names: list[str], folder: Path, model: torch.nn.Module, processor: Any, adapter: str | None
) -> list[tuple[str, torch.Tensor | str]]:
    """For each image its embedding (E,), or what is wrong with it."""
    try:
        embeds = embed_images(model, processor, [folder / name for name in names], len(names), adapter)
        return list(zip(names, embeds, strict=True))
    except ValueError as error:
        if len(names) == 1:
            return [(names[0], str(error))]
        return [pair for name in names for pair in _embed([name], folder, model, processor, adapter)]


def _read(file: Path, probe: torch.Tensor) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> mark and embedding, of a file that this model made; empty where it did not, or the file is none of ours.

    Names lead nowhere: they are only looked up.
    """
    if not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as opened:
            marks = json.loads((opened.metadata() or {})["marks"])
            embeds, before = opened.get_tensor("embeddings"), opened.get_tensor("probe")
    except (SafetensorError, KeyError, ValueError, RecursionError):
        return {}
    if not isinstance(marks, dict) or embeds.dtype != probe.dtype or embeds.shape != (len(marks), len(probe)):
        return {}
    if before.shape != probe.shape or not (before.to(probe) - probe).abs().max() <= SAME_MODEL:
        return {}
    if not (embeds.norm(dim=1) - 1).abs().lt(SAME_MODEL).all():  # one that is longer would be found by any query
        return {}
    return {name: (mark, embed) for (name, mark), embed in zip(marks.items(), embeds.to(probe), strict=True)}


def _write(file: Path, marks: dict[str, str], embeds: torch.Tensor, probe: torch.Tensor) -> None:
    with replace_files(file.parent) as temporary:
        tensors = {"embeddings": embeds, "probe": probe}
        save_file(tensors, Path(temporary, file.name), metadata={"marks": json.dumps(marks)})
