"""Embed a folder of images by a CLIP with a SEP adapter, on one machine or many, and go on after a crash.

    python examples/embed_folder.py my_images --model openai/clip-vit-base-patch16 --adapter my-task --output embeds
    accelerate launch --num_processes 4 examples/embed_folder.py my_images ... --output embeds

Shard i holds the i-th `--shard-size` of the sorted images: `shard-000012.safetensors` with `embeddings` (n, E), of
unit length, and in its metadata `names`, one a row, and `unreadable`, both JSON. A shard is written under another name
first, so one that is there is whole; the same command run again makes only those that are missing. `settings.json`
says what the shards were made from, `summary.json` what came out; it is there when everything is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

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
    missing = [i for i in own if not shard_path(args.output, i).exists()]
    parts = {i: names[i * args.shard_size : (i + 1) * args.shard_size] for i in missing}
    if missing:
        embedder, processor = load(args, state.device)
        # every process shows its own progress, on its own line
        with tqdm(total=sum(map(len, parts.values())), unit="image", position=state.process_index) as progress:
            for index, part in parts.items():
                write_shard(shard_path(args.output, index), *embed(part, embedder, processor, args, progress))
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"done by {state.num_processes} processes")
        summarize(args.output, shards)


# what there is to do


def image_names(folder: Path) -> list[str]:
    """Names below the folder, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in image_files.find_images(folder))
    if not names:
        raise SystemExit(f"{folder} holds no images ({', '.join(sorted(image_files.ENDINGS))}).")
    return names


def describe(args: argparse.Namespace, names: list[str]) -> dict:
    """What the shards depend on."""
    digest = hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest()
    return {"model": args.model, "adapter": args.adapter, "shard_size": args.shard_size, "images": digest}


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


def shard_path(output: Path, index: int) -> Path:
    return output / f"shard-{index:06d}.safetensors"


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


def load(args: argparse.Namespace, device: torch.device) -> tuple[ImageEmbedder, object]:
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(args.model), args.adapter)
    return ImageEmbedder(model).eval().to(device), AutoImageProcessor.from_pretrained(args.model)


@torch.inference_mode()
def embed(
    names: list[str], embedder: ImageEmbedder, processor, args: argparse.Namespace, progress: tqdm
) -> tuple[torch.Tensor, list[str], list[str]]:
    """Embeddings (n, E), the names of their rows, and the names of what cannot be read."""
    base = embedder.model.get_base_model()
    embeddings, read, unreadable = [], [], []
    for batch in batches(Images(args.images, names, processor), args):
        unreadable += [name for name, pixels in batch if pixels is None]
        good = [(name, pixels) for name, pixels in batch if pixels is not None]
        if good:
            embeddings.append(embedder(torch.stack([pixels for _, pixels in good]).to(base.device, base.dtype)).cpu())
            read += [name for name, _ in good]
        progress.update(len(batch))
    return torch.cat(embeddings) if embeddings else torch.empty(0, 0), read, unreadable


def batches(images: Images, args: argparse.Namespace) -> Iterator[list]:
    """Lists of (name, pixels), read by other processes while the model works."""
    return iter(DataLoader(images, batch_size=args.batch_size, num_workers=args.workers, collate_fn=list))


# files


def write_shard(path: Path, embeddings: torch.Tensor, names: list[str], unreadable: list[str]) -> None:
    part = path.with_suffix(".part")
    save_file({"embeddings": embeddings}, part, {"names": json.dumps(names), "unreadable": json.dumps(unreadable)})
    os.replace(part, path)


def summarize(output: Path, shards: range) -> None:
    """Count what came out, over all shards."""
    count, unreadable = 0, []
    for index in shards:
        with safe_open(shard_path(output, index), "pt") as file:
            metadata = file.metadata()
        count += len(json.loads(metadata["names"]))
        unreadable += json.loads(metadata["unreadable"])
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
    parser.add_argument("--adapter", required=True, help="the SEP adapter, a folder or an id on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=4096, help="images a shard")
    parser.add_argument("--batch-size", type=int, default=64, help="images the model sees at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images, beside each that embeds")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU a process where there is"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
