"""`TrunkCache`: what training does not change of a fixed set of images, computed once for all epochs."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..method.mix import mix_embeddings, unit, wide
from ..tracing import is_traced
from ..tuner.files import check_save_dtype, remove_leftovers, replace_files
from ..tuner.messages import one_line
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device, read_parameter
from ..tuner.passes import TrunkFeatures
from ..tuner.registration import PREFIX
from ..tuner.settings import TowerSettings
from ..tuner.tower import SEPTower
from ..tuner.wrappers import SEPLayer
from ..words import counted


#: Images in a file of the cache.
SHARD_SIZE = 256
#: Layout of the files; part of their names, so that files of another layout are never read.
LAYOUT = 2
#: What is kept of an image; the first only where layers lie below `start_layer`.
PARTS = ("trunk", "frozen_embeds")


class SizedImages(Protocol):
    """A data set of known length, as `TrunkCache` goes through it by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TrunkCache(torch.utils.data.Dataset):
    """What training does not change of images: the frozen pass of each, and all below `start_layer`, is run once.

    With a `start_layer` above 0 no image is read twice. At 0, and where layers come in stages, the frozen embedding (E
    numbers) is kept, and the prompted pass begins with the image, which is read again.

    An entry is found by the values of its pixels and by the weights of the tower, so a changed image, transform,
    model, precision or `start_layer` never meets an old entry. On disk an image takes ``2 L D`` bytes in bf16, 0.3 MB
    for ViT-B/16; entries that nothing asks for stay until the folder is removed. Every entry has a digest, which is
    checked whenever it is read. Files appear when they are whole and are never written again, so threads and processes
    may share a folder.

    Args:
        model: with a SEP adapter that prompts the image tower.
        images: a data set of dicts with `pixel_values` (channels, height, width) and `labels`; what it gives for an
            index must not change, so augmentation has to be drawn by a seed. All pixels have one shape.
        folder: where to keep entries between runs; None keeps them in memory.
        views: how many entries of `images` show one image, in different augmentations: entries i, i + N, i + 2 N...
            of N views each. An epoch sees one of them, drawn by Python's `random`.
        dtype: of what is kept; `torch.bfloat16` halves it, at the price of rounding.
        batch_size: images that go through the trunk at a time.

    Raises:
        ValueError: no prompts in the image tower, one that is trained itself (LoRA below SEP, `modules_to_save`), a
            tower that takes more than images of one shape, an image of another shape, an empty data set, or a number
            of entries that is no multiple of `views`.
        SafetensorError: a file of the cache cannot be read.

    Example:
        >>> cache = TrunkCache(model, images, folder="cache")
        >>> Trainer(classifier, arguments, train_dataset=cache).train()
    """

    def __init__(
        self,
        model: nn.Module,
        images: SizedImages,
        folder: str | os.PathLike | None = None,
        *,
        views: int = 1,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ):
        check_save_dtype(dtype)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, but got {batch_size!r}.")
        count = len(images)
        if count == 0 or views < 1 or count % views:
            raise ValueError(
                f"views must divide the number of entries, but got {counted(views, 'view')} and {count} entries."
            )
        self.views, self.labels = views, []
        self._tower, self._dtype, self._folder = (
            find_towers(model)["vision"],
            dtype,
            None if folder is None else Path(folder),
        )
        self._known: dict[str, dict[str, torch.Tensor] | Path] = {}
        self._digests: dict[str, str] = {}
        self._keys: list[str] = []
        settings = check_cacheable(self._tower)
        self._layer = settings.start_layer
        self._parts = PARTS if settings.start_layer and not self._tower.spec.in_stages else PARTS[1:]
        self._images = images
        if trained := [name for name, parameter in base_parameters(self._tower) if parameter.requires_grad]:
            raise ValueError(
                f"The {self._tower.modality} tower below SEP is trained as well ({trained[0]} and {len(trained) - 1} "
                "more), so its trunk does not stay the same. Freeze it, or train without a cache."
            )
        self._model_key = model_key(self._tower, dtype)
        for file in self._files():
            self._register(file)
        missing: dict[str, torch.Tensor] = {}
        for key, pixels in self._read(images):
            if key not in self._known:
                missing[key] = pixels
            if len(missing) == batch_size:
                self._compute(missing)
        self._compute(missing)
        self._write()

    def __len__(self) -> int:
        return len(self._keys) // self.views

    def __getitem__(self, index: int) -> dict:
        """`trunk` (L, D) with `trunk_layer`, or `pixel_values`, and `frozen_embeds` (E,) and `labels` of an image."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {counted(len(self), 'image')}")
        view = index % len(self) + len(self) * (random.randrange(self.views) if self.views > 1 else 0)
        entry = self._known[self._keys[view]]
        if isinstance(entry, Path):
            entry = self._load(entry, self._keys[view])
        parts: dict[str, Any] = {part: value.float() for part, value in entry.items()}
        if "trunk" in parts:
            return {**parts, "trunk_layer": self._layer, "labels": self.labels[view]}
        return {"pixel_values": self._images[view]["pixel_values"], **parts, "labels": self.labels[view]}

    def _read(self, images: SizedImages) -> Iterator[tuple[str, torch.Tensor]]:
        shape = image_shape(self._tower)
        for index in range(len(images)):
            item = images[index]
            pixels = item["pixel_values"]
            if extra := sorted(set(item) - {"pixel_values", "labels"}):
                raise ValueError(f"A trunk cache takes pixel_values and labels alone, but the images have {extra}.")
            if tuple(pixels.shape) != shape:
                raise ValueError(f"Every image must have shape {shape}, but entry {index} has {tuple(pixels.shape)}.")
            key = hashlib.sha256(f"{pixels.dtype}".encode() + tensor_bytes(pixels)).hexdigest()
            self._keys.append(key)
            label = torch.as_tensor(item["labels"])
            self.labels.append(label if label.ndim else int(label))  # of several labels (C,)
            yield key, pixels

    def _compute(self, missing: dict[str, torch.Tensor]) -> None:
        """Run the frozen pass for some images; a full shard goes to disk."""
        if not missing:
            return
        device = compute_device(self._tower.base_layer)
        pixels = torch.stack(list(missing.values())).to(device)
        for key, *values in zip(missing, *self._frozen(pixels), strict=True):
            entry = zip(self._parts, values, strict=True)
            self._known[key] = {part: value.to("cpu", self._dtype).clone() for part, value in entry}
        missing.clear()
        if sum(isinstance(entry, dict) for entry in self._known.values()) >= SHARD_SIZE:
            self._write()

    def _frozen(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts that are kept of images."""
        if "trunk" in self._parts:
            features = self._tower.trunk(pixel_values=pixel_values)
            return features.hidden, features.frozen
        with evaluating(self._tower.base_layer):  # dropout is no part of what is kept
            return (self._tower.embed_frozen(pixel_values=pixel_values),)

    def _write(self) -> None:
        """Move entries from memory to disk, where there is a folder; a file appears when it is whole."""
        new = {key: entry for key, entry in self._known.items() if isinstance(entry, dict)}
        if self._folder is None or not new:
            return
        digests = {key: entry_digest(entry) for key, entry in new.items()}
        # named by what it holds: whoever else writes this file writes the same
        name = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
        file = self._folder / f"{self._model_key}-{name}.safetensors"
        tensors = {f"{key}.{part}": value for key, entry in new.items() for part, value in entry.items()}
        with replace_files(self._folder) as temporary:
            save_file(tensors, Path(temporary, file.name), {"digests": json.dumps(digests)})
        self._register(file)

    def _files(self) -> list[Path]:
        if self._folder is None or not self._folder.is_dir():
            return []
        remove_leftovers(self._folder)
        return sorted(self._folder.glob(f"{self._model_key}-*.safetensors"))

    def _register(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                digests = json.loads((opened.metadata() or {}).get("digests", "null"))
                names = set(opened.keys())
        except (SafetensorError, ValueError, RecursionError) as error:
            raise damaged(file, one_line(str(error))) from error
        if not isinstance(digests, dict) or names != {f"{key}.{part}" for key in digests for part in self._parts}:
            raise damaged(file, "its digests do not belong to its entries")
        self._known |= dict.fromkeys(digests, file)
        self._digests |= digests

    def _load(self, file: Path, key: str) -> dict[str, torch.Tensor]:
        """An entry from disk."""
        try:
            with safe_open(file, framework="pt") as opened:
                entry = {part: opened.get_tensor(f"{key}.{part}") for part in self._parts}
        except SafetensorError as error:
            raise damaged(file, one_line(str(error))) from error
        if entry_digest(entry) != self._digests[key]:
            raise damaged(file, "an entry is not what was written")
        return entry


def damaged(file: Path, reason: str) -> ValueError:
    """The error for a file of the cache that was changed or cut short after it was written."""
    return ValueError(
        f"The trunk cache's file {file} is damaged: {reason}. Remove it; a new TrunkCache computes its entries again."
    )


def entry_digest(entry: dict[str, torch.Tensor]) -> str:
    """Changes with every bit of an entry, its shapes and its precision."""
    digest = hashlib.sha256()
    for part in entry:
        digest.update(f"{part} {tuple(entry[part].shape)} {entry[part].dtype}".encode() + tensor_bytes(entry[part]))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a tensor as they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def model_key(tower: SEPTower, dtype: torch.dtype) -> str:
    """Changes with all that the trunk depends on: weights, buffers, configuration, adapters below, layer, precision."""
    settings = tower.active_settings
    device = compute_device(tower.base_layer).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.sha256(f"{LAYOUT} {settings and settings.start_layer} {dtype} {autocast}".encode())
    config = {
        key: value for key, value in cast(Any, tower.base_layer).config.to_dict().items() if key != "_name_or_path"
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for module in tower.base_layer.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SEPLayer):
            digest.update(f"{module.active_adapters} {module.disable_adapters}".encode())
    base, projection = tower.base_layer, tower.head.projection
    own = [(base, name) for name, _ in (*base_parameters(tower), *base.named_buffers())]
    own += [] if projection is None else [(projection, name) for name, _ in projection.named_parameters()]
    for root, name in own:
        parameter = read_parameter(root, name)
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(tensor_bytes(parameter))
    return digest.hexdigest()[:16]


def base_parameters(tower: SEPTower) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of what SEP does not train."""
    return [(name, p) for name, p in tower.base_layer.named_parameters() if PREFIX not in name]


def check_cacheable(tower: SEPTower) -> TowerSettings:
    """The settings of the active adapter in a tower some of whose work is the same in every step.

    Raises:
        ValueError: the adapter has no prompts in this tower.
    """
    settings = tower.active_settings
    if settings is None:
        raise ValueError(
            f"There is nothing to cache: no active adapter has prompts in the {tower.modality} tower. Train without a "
            "cache."
        )
    return settings


def start_layer_of(tower: SEPTower) -> int:
    """
    Raises:
        ValueError: no adapter prompts the tower, or its prompts enter at layer 0.
    """
    return tower.check_trunk().start_layer


def image_shape(tower: SEPTower) -> tuple[int, int, int]:
    """(channels, height, width) of what the tower takes.

    Raises:
        ValueError: its configuration names no one size.
    """
    config = cast(Any, tower.base_layer).config
    if not hasattr(config, "image_size") or not hasattr(config, "num_channels"):
        raise ValueError(
            f"{type(tower.base_layer).__name__} takes images of several sizes. Train it without a trunk cache."
        )
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (config.num_channels, height, width)


def embeds_from_trunk(
    tower: SEPTower, hidden: torch.Tensor, frozen_embeds: torch.Tensor, layers: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SEP's and the frozen image embeddings, each (B, E), of unit length, in fp32 or wider.

    Args:
        tower: of the images.
        hidden: (B, L, D), what enters layer `start_layer`.
        frozen_embeds: (B, E), projected.
        layers: (B,), the `start_layer` that each trunk was made for; None leaves that unchecked.

    Raises:
        ValueError: the active adapter has another `start_layer`.
    """
    start = start_layer_of(tower)
    if layers is not None and not is_traced() and bool((layers != start).any()):
        raise ValueError(
            f"The cached trunk ends at layer {layers[layers != start][0].item()}, but the active adapter starts at "
            f"layer {start}. Make a TrunkCache for this adapter."
        )
    weight = next(tower.base_layer.parameters())
    # the embedding below the trunk is run for its form only, so it gets empty images
    shape, device = (len(hidden), *image_shape(tower)), compute_device(tower.base_layer)
    inputs = {"pixel_values": torch.zeros(shape, dtype=weight.dtype, device=device)}
    outputs = tower.layer_outputs({"pixel_values": inputs["pixel_values"][:1]})
    prompted = tower.embed_prompted(**inputs, trunk=TrunkFeatures(hidden.to(weight.dtype), frozen_embeds, outputs))
    return mix_embeddings(wide(prompted), wide(frozen_embeds), tower.frozen_weight), unit(wide(frozen_embeds))
