"""A data set of four styles made of photographs: what a model trained on some styles makes of one it has not seen.

    python examples/few_shot/styles.py data/caltech101 data/styles --classes elephant umbrella pizza

deals the images of each class folder to four folders, so that no image is in two of them, and draws them as

    photo      as they are
    art        patches of strong, shifted colours
    cartoon    few flat colours inside black lines
    drawing    black lines on white

`data_sets/styles.json` is made for them: `run.py --protocol domain-generalization --dataset styles --held-out drawing`,
or `all`. A computer draws so from photographs: a larger shift than blur and noise, but no artist's work. An image that
was made before is left as it is.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from readers import images_by_class, read_image
from script import run_as_script


#: Difference of neighbouring pixels, of 255, from which on there is a line: of cartoons, and of drawings.
STRONG_LINES, ALL_LINES = 90, 60
#: How far the hue of art is turned, of 256, and how much its colours are strengthened.
HUE, COLOUR = 18, 1.8


def photo(image: Image.Image) -> Image.Image:
    return image


def art(image: Image.Image) -> Image.Image:
    """Patches of strong, shifted colours."""
    patches = image.filter(ImageFilter.ModeFilter(5)).filter(ImageFilter.SMOOTH_MORE)
    hue, saturation, value = ImageEnhance.Color(patches).enhance(COLOUR).convert("HSV").split()
    turned = hue.point(lambda x: (x + HUE) % 256)
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def cartoon(image: Image.Image) -> Image.Image:
    """Few flat colours inside black lines."""
    flat = ImageOps.posterize(image.filter(ImageFilter.ModeFilter(5)), 2)
    return ImageChops.multiply(ImageEnhance.Color(flat).enhance(2.0), lines(image, STRONG_LINES).convert("RGB"))


def drawing(image: Image.Image) -> Image.Image:
    """Black lines on white."""
    return lines(image, ALL_LINES).filter(ImageFilter.GaussianBlur(0.5)).convert("RGB")


def lines(image: Image.Image, least: int) -> Image.Image:
    """Black on white, "L": where brightness changes by more than `least`, found at twice the size."""
    width, height = image.size
    grey = ImageOps.autocontrast(image.convert("L").resize((2 * width, 2 * height)).filter(ImageFilter.GaussianBlur(2)))
    found = ImageOps.crop(grey.filter(ImageFilter.FIND_EDGES), 2).resize((width, height))  # its rim is no edge
    return ImageOps.autocontrast(found).point(lambda x: 0 if x > least else 255)


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "photo": photo,
    "art": art,
    "cartoon": cartoon,
    "drawing": drawing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder with a folder of images per class")
    parser.add_argument("output", type=Path, help="folder to make: style/class/image")
    parser.add_argument("--classes", nargs="+", help="names of class folders; default: all")
    parser.add_argument("--images", type=int, default=96, help="images a class at most, over all styles")
    args = parser.parse_args()
    if args.images < len(STYLES):
        parser.error(f"--images must be at least {len(STYLES)}, one a style, but is {args.images}.")
    found = images_by_class(args.photographs, args.photographs)
    names = args.classes or list(found)
    if missing := [name for name in names if name not in found]:
        parser.error(f"{args.photographs} has no folder of images {', '.join(missing)}.")
    if few := [name for name in names if len(found[name]) < len(STYLES)]:
        parser.error(f"a class needs an image for each of {len(STYLES)} styles, but {', '.join(few)} has fewer.")
    for name in names:
        keys = sorted(found[name])
        random.Random(name).shuffle(keys)
        draw_class(name, [args.photographs / key for key in keys[: args.images]], args.output)
        print(f"{name}: {min(len(keys), args.images)} images")


def draw_class(name: str, files: list[Path], output: Path) -> None:
    """Draw each image of a class in one style, the first in the first, and so on in turn."""
    for place, (style, draw) in enumerate(STYLES.items()):
        folder = output / style / name.replace("_", " ").lower()
        folder.mkdir(parents=True, exist_ok=True)
        for file in files[place :: len(STYLES)]:
            path = folder / f"{file.stem}.png"
            if path.exists():
                continue
            temporary = path.with_suffix(".tmp")
            draw(read_image(file)).save(temporary, format="PNG")
            temporary.replace(path)


if __name__ == "__main__":
    run_as_script(main)
