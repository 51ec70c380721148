"""Make images with several labels out of images with one: mosaics of two by two, with a file of their labels.

Real sets of several labels are large, so that this is for trying and measuring. Each mosaic has one to four classes::

    python examples/mosaics.py caltech101 mosaics --train 300 --val 200 --test 300
    sep-peft train mosaics/labels.csv --base-model openai/clip-vit-base-patch32 --output adapter

Images of the parts do not mix: those of train/ are in training mosaics alone, and so on. Without train/, val/ and test/
the class folders are parted by the seed.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from sep_peft.classifier.images import read_image
from sep_peft.training.folders import find_parts, read_classes


#: Share of the images of a class in each part, where the folder has none.
SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}


def parts_of(folder: Path, classes: Sequence[str] | None, seed: int) -> dict[str, dict[str, list[Path]]]:
    """Part -> class -> its images.

    Raises:
        ValueError: a class has no image in a part.
    """
    found = find_parts(folder)
    if found:
        parts = {part: read_classes(path) for part, path in found.items()}
    else:
        parts = {part: {} for part in SHARES}
        for name, paths in read_classes(folder).items():
            random.Random(f"{seed}/{name}").shuffle(paths)
            start = 0
            for part, share in SHARES.items():
                end = len(paths) if part == "test" else start + max(1, round(share * len(paths)))
                parts[part][name], start = paths[start:end], end
    names = sorted(next(iter(parts.values()))) if classes is None else classes
    for part, own in parts.items():
        if missing := [name for name in names if not own.get(name)]:
            raise ValueError(f"{folder} has no images of {', '.join(missing)} in {part}.")
    return {part: {name: own[name] for name in names} for part, own in parts.items()}


def mosaic(tiles: Sequence[Path], side: int) -> Image.Image:
    """Four images as squares, two by two, `side` pixels wide."""
    half = side // 2
    image = Image.new("RGB", (2 * half, 2 * half))
    for place, path in enumerate(tiles):
        tile = ImageOps.fit(read_image(path), (half, half), Image.Resampling.BICUBIC)
        image.paste(tile, (place % 2 * half, place // 2 * half))
    return image


def draw(images: dict[str, list[Path]], source: random.Random) -> tuple[list[Path], list[str]]:
    """Four images of one to four classes, in any order, and the names of these."""
    own = source.sample(sorted(images), source.randint(1, min(4, len(images))))
    names = own + source.choices(own, k=4 - len(own))
    source.shuffle(names)
    return [source.choice(images[name]) for name in names], sorted(own)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="class folders; or train/, val/ and test/ with class folders in each")
    parser.add_argument("output", type=Path, help="folder for the mosaics and labels.csv; made where it is missing")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="take these; default: all")
    parser.add_argument("--train", type=int, default=300, metavar="N", help="mosaics to train on; default: 300")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="to validate on; default: 200")
    parser.add_argument("--test", type=int, default=300, metavar="N", help="to test on; default: 300")
    parser.add_argument("--side", type=int, default=192, metavar="PIXELS", help="of a mosaic; default: 192")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn; default: 1")
    given = parser.parse_args(arguments)
    parts = parts_of(given.folder, given.classes, given.seed)
    rows = [("image", "labels", "split")]
    for part, images in parts.items():
        source = random.Random(f"{given.seed}/{part}")
        (given.output / part).mkdir(parents=True, exist_ok=True)
        for index in range(getattr(given, part)):
            tiles, names = draw(images, source)
            name = f"{part}/{index:04}.jpg"
            mosaic(tiles, given.side).save(given.output / name, quality=92)
            rows.append((name, ";".join(names), part))
    with open(given.output / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    print(f"{len(rows) - 1} mosaics of {len(next(iter(parts.values())))} classes in {given.output}")


if __name__ == "__main__":
    main()
