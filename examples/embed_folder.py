"""Embed a folder of images by a CLIP with a SEP adapter, on one machine or many, and go on after a crash.

    python examples/embed_folder.py my_images --model openai/clip-vit-base-patch16 --adapter my-task --output embeds
    accelerate launch --num_processes 4 examples/embed_folder.py my_images ... --output embeds
    python examples/embed_folder.py my_images ... --engine ray --actors 4 --format parquet --output embeds

Shard i holds the i-th `--shard-size` of the sorted images: `shard-000012.safetensors` with `embeddings` (n, E), of
unit length, and in its metadata `names`, one a row, and `unreadable`, both JSON; or `shard-000012.parquet` with the
columns `name` and `embeddings`, and the same `unreadable` in the metadata of its schema. Several adapters share the
frozen branch, and give `embeddings/ADAPTER` each. A shard is written under another name first, so one that is there
is whole; the same command run again makes only those that are missing, also with the other engine. `settings.json` says
what the shards were made from, `summary.json` what came out; it is there when everything is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

from sep_peft import ImageEmbedder
from sep_peft.classifier import images as image_files
from sep_peft.cli.text import printable


def main() -> None:
    args = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end the run
    state = PartialState(cpu=args.device == "cpu")
    names = image_names(args.images)
    if args.format == "parquet" and (odd := [name for name in names if not is_utf8(name)]):
        raise SystemExit(f"Parquet holds UTF-8, which {printable(odd[0])} is not. Take --format safetensors.")
    settings = describe(args, names)
    if state.is_main_process:
        prepare(args.output, settings)
        if others := image_files.other_endings(args.images):
            print(f"left out, by their endings: {image_files.listed_endings(others)}")
    state.wait_for_everyone()
    if read_json(args.output / "settings.json") != settings:  # the main process has said why
        raise SystemExit(1)

    shards = range(-(-len(names) // args.shard_size))
    own = [i for i in shards if i % state.num_processes == state.process_index]
    missing = [i for i in own if not shard_path(args, i).exists()]
    parts = {i: names[i * args.shard_size : (i + 1) * args.shard_size] for i in missing}
    # every process shows its own progress, on its own line
    with tqdm(total=sum(map(len, parts.values())), unit="image", position=state.process_index) as progress:
        for index, shard in make_shards(parts, args, state, progress):
            write_shard(shard_path(args, index), shard)
    state.wait_for_everyone()
    if state.is_main_process:
        workers = f"{args.actors} actors" if args.engine == "ray" else f"{state.num_processes} processes"
        print(f"done by {workers}")
        summarize(args, shards)


# what there is to do


def image_names(folder: Path) -> list[str]:
    """Names below the folder, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in image_files.find_images(folder))
    if not names:
        raise SystemExit(f"{folder} holds no images ({', '.join(sorted(image_files.ENDINGS))}).")
    return names


def is_utf8(name: str) -> bool:
    return name.encode(errors="replace").decode() == name


def describe(args: argparse.Namespace, names: list[str]) -> dict:
    """What the shards depend on."""
    digest = hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest()
    adapter = args.adapter[0] if len(args.adapter) == 1 else args.adapter
    settings = {"model": args.model, "adapter": adapter, "shard_size": args.shard_size, "images": digest}
    return settings if args.format == "safetensors" else {**settings, "format": args.format}


def prepare(output: Path, settings: dict) -> None:
    """Note what the shards are made from; refuse a folder whose shards were made from something else."""
    output.mkdir(parents=True, exist_ok=True)
    known = read_json(output / "settings.json")
    if known is None:
        write_json(output / "settings.json", settings)
    elif known != settings:
        differing = [key for key, value in settings.items() if known.get(key) != value]
        print(f"{output} was made from other {', '.join(differing)}. Choose another --output, or empty it.", flush=True)
    for left in output.glob("*.part"):  # of a run that was killed
        left.unlink()


def shard_path(args: argparse.Namespace, index: int) -> Path:
    return args.output / f"shard-{index:06d}.{args.format}"


# the work


class Images(Dataset):
    """Name and pixels of each image; None in the place of pixels that cannot be read."""

    def __init__(self, folder: Path, names: list[str], processor):
        self.folder, self.names, self.processor = folder, names, processor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | None]:
        name = self.names[index]
        try:
            image = image_files.read_image(self.folder / name)
        except ValueError:
            return name, None
        return name, self.processor(image, return_tensors="pt")["pixel_values"][0]


class Embedder:
    """The model with its adapters.

    Args:
        model: the base model, a folder or an id on the Hub.
        adapters: folders or ids on the Hub.
        device: that embeds.
    """

    def __init__(self, model: str, adapters: list[str], device: torch.device | str):
        base = AutoModel.from_pretrained(model)
        self.names = {f"adapter_{index}": adapter for index, adapter in enumerate(adapters)}
        peft = PeftModel.from_pretrained(base, adapters[0], "adapter_0")
        for name, adapter in [*self.names.items()][1:]:
            peft.load_adapter(adapter, name)
        self.embedder = ImageEmbedder(peft).eval().to(device)
        self.base = base

    @property
    def columns(self) -> list[str]:
        """What the embeddings of each adapter are called in shards."""
        return column_names([*self.names.values()])

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixel_values (B, 3, H, W) -> for each of `columns` embeddings (B, E) on the CPU; one frozen pass for all."""
        found = self.embedder.by_adapters(pixels.to(self.base.device, self.base.dtype), [*self.names])
        return {column: embeds.cpu() for column, embeds in zip(self.columns, found, strict=True)}


def column_names(adapters: list[str]) -> list[str]:
    return ["embeddings"] if len(adapters) == 1 else [f"embeddings/{adapter}" for adapter in adapters]


class Shard(NamedTuple):
    """A finished part: column -> embeddings (n, E), the names of their rows, and the names of what cannot be read."""

    embeddings: dict[str, torch.Tensor]
    names: list[str]
    unreadable: list[str]


def make_shards(
    parts: dict[int, list[str]], args: argparse.Namespace, state: PartialState, progress: tqdm
) -> Iterator[tuple[int, Shard]]:
    """Each part with its index, when it is done."""
    if not parts:
        return
    if args.engine == "ray":
        from embed_on_ray import shards_on_ray  # which needs the package ray

        yield from shards_on_ray(parts, args, progress)
        return
    embedder = Embedder(args.model, args.adapter, state.device)
    processor = AutoImageProcessor.from_pretrained(args.model)
    for index, names in parts.items():
        yield index, embed(names, embedder, processor, args, progress)


def embed(names: list[str], embedder: Embedder, processor, args: argparse.Namespace, progress: tqdm) -> Shard:
    found, read, unreadable = [], [], []
    for batch in batches(Images(args.images, names, processor), args):
        unreadable += [name for name, pixels in batch if pixels is None]
        good = [(name, pixels) for name, pixels in batch if pixels is not None]
        if good:
            found.append(embedder.embed(torch.stack([pixels for _, pixels in good])))
            read += [name for name, _ in good]
        progress.update(len(batch))
    return Shard(joined(found, embedder.columns), read, unreadable)


def joined(found: list[dict[str, torch.Tensor]], columns: list[str]) -> dict[str, torch.Tensor]:
    """Embeddings of several batches as those of one; (0, 0) where there are none."""
    return {column: torch.cat([part[column] for part in found] or [torch.empty(0, 0)]) for column in columns}


def batches(images: Images, args: argparse.Namespace) -> Iterator[list]:
    """Lists of (name, pixels), read by other processes while the model works."""
    return iter(DataLoader(images, batch_size=args.batch_size, num_workers=args.workers, collate_fn=list))


# files


def write_shard(path: Path, shard: Shard) -> None:
    part, unreadable = path.with_suffix(".part"), json.dumps(shard.unreadable)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns: dict = {"name": pyarrow.array(shard.names, pyarrow.string())}
        for column, embeddings in shard.embeddings.items():  # (n, E) -> n lists of E numbers
            columns[column] = pyarrow.array([*embeddings.numpy()], pyarrow.list_(pyarrow.float32()))
        table = pyarrow.table(columns).replace_schema_metadata({"unreadable": unreadable})
        parquet.write_table(table, part)
    else:
        save_file(shard.embeddings, part, {"names": json.dumps(shard.names), "unreadable": unreadable})
    os.replace(part, path)


def contents(path: Path) -> tuple[int, list[str]]:
    """How many images a shard holds, and the names of what could not be read."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        metadata = parquet.read_metadata(path)
        return metadata.num_rows, json.loads(metadata.metadata[b"unreadable"])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return len(json.loads(metadata["names"])), json.loads(metadata["unreadable"])


def summarize(args: argparse.Namespace, shards: range) -> None:
    """Count what came out, over all shards."""
    output, count, unreadable = args.output, 0, []
    for index in shards:
        embedded, failed = contents(shard_path(args, index))
        count += embedded
        unreadable += failed
    write_json(output / "summary.json", {"embedded": count, "unreadable": unreadable, "shards": len(shards)})
    print(f"{count} images embedded in {len(shards)} shards, {len(unreadable)} could not be read")
    for name in unreadable[:10]:
        print(f"  {printable(name)}")
    if len(unreadable) > 10:
        print(f"  ... all of them in {output / 'summary.json'}")


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, data: dict) -> None:
    part = path.with_suffix(".part")
    # file names that are no UTF-8 have lone surrogates, which become the escapes of JSON
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images, searched with all folders below it")
    parser.add_argument("--model", required=True, help="the base model, a folder or an id on the Hub")
    parser.add_argument("--adapter", required=True, nargs="+", help="SEP adapters, folders or ids on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=4096, help="images a shard")
    parser.add_argument("--batch-size", type=int, default=64, help="images the model sees at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images, beside each that embeds")
    parser.add_argument(
        "--engine", choices=("accelerate", "ray"), default="accelerate", help="what shares out the work"
    )
    parser.add_argument("--actors", type=int, default=1, help="of Ray that embed; its other CPUs read images")
    parser.add_argument("--format", choices=("safetensors", "parquet"), default="safetensors", help="of shards")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU a process where there is"
    )
    args = parser.parse_args()
    if len(set(args.adapter)) < len(args.adapter):
        parser.error("--adapter names one of them twice")
    return args


if __name__ == "__main__":
    main()
