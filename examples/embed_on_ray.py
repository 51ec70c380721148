"""`embed_folder.py --engine ray`: images are read by the CPUs of a Ray cluster, and embedded by actors with the model.

Where actors have a GPU each, Ray reads images in other processes, on any machine; without one, in the actors
themselves. Ray Data keeps the order, starts what has failed once more, and holds back readers where actors are slower.
The process that started it gets embeddings alone, 2 KB an image, and writes each shard as soon as its last image is
there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from embed_folder import Embedder, Shard, column_names
from tqdm import tqdm
from transformers import AutoImageProcessor

from sep_peft.classifier.images import read_image


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read where Ray is imported
try:
    import ray
except ImportError as error:
    raise SystemExit('--engine ray needs Ray Data: pip install "sep_peft[serve]"') from error


@cache
def processor_of(model: str):
    """The image processor, loaded once in each process that reads."""
    return AutoImageProcessor.from_pretrained(model)


def read(row: dict, model: str) -> dict:
    """The pixels (3, H, W) of the image at row["path"]; zeros where it cannot be read."""
    processor = processor_of(model)
    try:
        image, readable = read_image(os.fsdecode(row["path"])), True
    except ValueError:
        image, readable = np.zeros((32, 32, 3), dtype=np.uint8), False
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    return {"pixels": pixels if readable else np.zeros_like(pixels), "readable": readable}


class Actor:
    """Embeds batches; it has the model once.

    Args:
        model, adapters, device: of `Embedder`.
    """

    def __init__(self, model: str, adapters: list[str], device: str):
        self.embedder = Embedder(model, adapters, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pixels (B, 3, H, W) -> embeddings (B, E) of each adapter; those of unreadable images mean nothing."""
        found = self.embedder.embed(torch.from_numpy(np.ascontiguousarray(batch["pixels"])))
        return {"readable": batch["readable"], **{column: embeds.numpy() for column, embeds in found.items()}}


def shards_on_ray(parts: dict[int, list[str]], args: argparse.Namespace, progress: tqdm) -> Iterator[tuple[int, Shard]]:
    """Each part, an index with names below the folder, when its embeddings are there; in their order."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="warning")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    folder = Path(args.images).resolve()
    rows = [{"path": os.fsencode(folder / name)} for names in parts.values() for name in names]
    dataset = (
        ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // args.batch_size)))
        .map(read, fn_kwargs={"model": args.model})
        .map_batches(
            Actor,
            fn_constructor_kwargs={"model": args.model, "adapters": args.adapter, "device": device},
            batch_size=args.batch_size,
            concurrency=args.actors,
            num_cpus=1,
            num_gpus=int(device == "cuda"),
        )
    )
    columns = column_names(args.adapter)
    waiting = Waiting(columns)
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    for index, names in parts.items():
        while waiting.count < len(names):
            batch = next(batches)
            waiting.put(batch)
            progress.update(len(batch["readable"]))
        taken = waiting.take(len(names))
        readable = taken["readable"].astype(bool)
        embeddings = {column: torch.from_numpy(np.ascontiguousarray(taken[column][readable])) for column in columns}
        good, bad = ([names[i] for i in np.flatnonzero(readable == wanted)] for wanted in (True, False))
        if not good:
            embeddings = {column: torch.empty(0, 0) for column in columns}
        yield index, Shard(embeddings, good, bad)


class Waiting:
    """Rows that have come and belong to no shard yet.

    Args:
        columns: of embeddings.
    """

    def __init__(self, columns: list[str]):
        self.columns = ["readable", *columns]
        self.batches: list[dict[str, np.ndarray]] = []
        self.count = 0

    def put(self, batch: dict[str, np.ndarray]) -> None:
        self.batches.append(batch)
        self.count += len(batch["readable"])

    def take(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` rows."""
        rows = {column: np.concatenate([batch[column] for batch in self.batches]) for column in self.columns}
        self.batches = [{column: values[count:] for column, values in rows.items()}]
        self.count -= count
        return {column: values[:count] for column, values in rows.items()}
