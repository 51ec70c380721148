"""How honest scores are: calibration, sets and "none of these", before and after, as Markdown tables.

    python examples/few_shot/calibration.py --data-root data --model clip-small lit-tiny --shots 4 16 --seeds 1 2 3 \
      --dataset clothing caltech101 cifar100 --unknown caltech101=clothing clothing=caltech101

Each cell trains as `fit` does and is calibrated by cross-fitting on its training images, or with ``--validation`` on
the validation images of its draw. A row appears as soon as its cell is done; ``--output`` keeps all as JSON, and cells
that are in it are not measured again. ``--keep`` keeps the logits, so that another calibration is compared without
training again. "By chance" is the calibration error that scores which are exactly right would show on as many images.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from readers import ImageSet, Sample, read_dataset
from safetensors.torch import load_file, save_file
from sampling import draw
from script import run_as_script
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.answers import energies
from sep_peft.classifier.calibration import Calibration, nearness
from sep_peft.training import LabelledImages, Recipe, fit
from sep_peft.training.calibrate import HeldOut, cross_fit, values_of
from sep_peft.training.calibrate import logits_of as held_out_logits
from sep_peft.training.metrics import calibration_error, error_by_chance, negative_log_likelihood


HERE = Path(__file__).parent
COVERAGES = (0.8, 0.9, 0.95)
COLUMNS = (
    *("model", "data", "shots", "seed", "accuracy", "ECE", "calibrated", "by chance", "NLL", "calibrated"),
    *("coverage of 80, 90, 95 % (classes)", "AUROC: nearness", "energy", "score", "zero-shot"),
    *("FPR95: nearness", "energy", "score", "zero-shot", "known kept"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class Cell:
    """One training."""

    model: str
    data: str
    shots: int
    seed: int


def main() -> None:
    args = parse_arguments()
    unknown = dict(pair.split("=", 1) for pair in args.unknown)
    rows = json.loads(args.output.read_text()) if args.output is not None and args.output.exists() else []
    print(HEAD, flush=True)
    for row in rows:
        print(shown(row), flush=True)
    done = {Cell(**row["cell"]) for row in rows}
    for model, shots, name, seed in product(args.model, args.shots, args.dataset, args.seeds):
        cell = Cell(model, name, shots, seed)
        if cell not in done:
            rows.append(measure(cell, args, unknown.get(name)))
            print(shown(rows[-1]), flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(rows, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with the roots of the data sets")
    parser.add_argument("--dataset", nargs="+", required=True, help="names in data_sets/, or paths of JSON files")
    parser.add_argument("--model", nargs="+", required=True, help="names on the Hub or folders")
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--folds", type=int, default=Recipe.calibration_folds)
    parser.add_argument("--validation", action="store_true", help="calibrate on validation images")
    parser.add_argument("--classes", type=int, help="at most so many, drawn once; default: all")
    parser.add_argument("--images", type=int, help="test images, at most, drawn once; default: all")
    parser.add_argument("--unknown", nargs="*", default=[], metavar="DATA=OTHER", help="images of no class of DATA")
    parser.add_argument("--keep", type=Path, help="folder of the logits of each cell, which are trained once")
    parser.add_argument("--output", type=Path, help="JSON file of all rows")
    return parser.parse_args()


def measure(cell: Cell, args: argparse.Namespace, unknown: str | None) -> dict[str, Any]:
    """A row, of logits that are kept or of a training."""
    data = read(cell.data, args)
    name = f"{Path(cell.model).name}_{Path(cell.data).stem}_{cell.shots}_{cell.seed}.safetensors"
    file = None if args.keep is None else args.keep / name
    if file is not None and file.exists():
        found = load_file(file)
    else:
        found = train(cell, args, data, unknown)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in found.items()}, file)
    classes, images = len(data.classes), len(found["test.labels"])
    return {"cell": vars(cell), "epochs": args.epochs, "classes": classes, "images": images, **compare(found)}


def train(cell: Cell, args: argparse.Namespace, data: ImageSet, unknown: str | None) -> dict[str, torch.Tensor]:
    """All logits of a cell, none of them calibrated, by names that `compare` reads."""
    drawn = draw(data, cell.shots, cell.seed)
    recipe = Recipe(epochs=args.epochs, seed=cell.seed, calibration_folds=args.folds)
    set_seed(cell.seed)
    processor = AutoProcessor.from_pretrained(cell.model)
    model = get_peft_model(AutoModel.from_pretrained(cell.model), SEPConfig())
    names = list(data.classes)
    classifier = SEPClassifier.from_class_names(model, processor, names, template=data.template, recipe=recipe)
    start, samples = values_of(classifier), opened(data, drawn.train)
    fit(classifier, samples, replace(recipe, calibration_folds=0), keep="last", quiet=True)
    if args.validation:
        validation = LabelledImages(opened(data, drawn.val), names, processor)
        held_out = HeldOut(*held_out_logits(classifier, validation, 100, 0), "held-out images")
    else:
        plain, augmented = (LabelledImages(samples, names, processor, each) for each in (None, recipe))
        held_out = cross_fit(classifier, plain, augmented, recipe, start, quiet=True)
    found = {f"held_out.{name}": getattr(held_out, name) for name in ("logits", "new_logits", "labels")}
    found |= logits_of(classifier, data, at_most(data.splits["test"], args.images), "test")
    if unknown is not None:
        other = read(unknown, args)
        strange = [sample._replace(label=0) for sample in at_most(other.splits["test"], args.images)]
        found |= logits_of(classifier, other, strange, "unknown")
    return found


def compare(found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """All numbers of a row.

    Args:
        found: "held_out.logits", "held_out.new_logits" (M, C) and "held_out.labels" (M,) to calibrate on,
            "test.logits", "test.base" of zero-shot (N, C) and "test.labels" (N,), and of images of no class
            "unknown.logits" and "unknown.base", where there are any.
    """
    parts = (found[f"held_out.{name}"] for name in ("logits", "new_logits", "labels"))
    calibration = HeldOut(*parts, "cross-fitting").calibration()
    assert isinstance(calibration, Calibration) and calibration.least_nearness is not None, "of one label an image"
    logits, base, labels = (found[f"test.{name}"] for name in ("logits", "base", "labels"))
    plain, scores = logits.softmax(dim=1), (logits / calibration.temperature).softmax(dim=1)
    sets = {}
    for coverage in COVERAGES:
        inside = scores >= calibration.least_score(coverage)
        inside |= scores == scores.amax(dim=1, keepdim=True)
        held = inside.gather(1, labels[:, None]).float().mean().item()
        sets[str(coverage)] = {"held": 100 * held, "classes": inside.sum(dim=1).float().mean().item()}
    row = {
        "temperature": calibration.temperature,
        "accuracy": 100 * (logits.argmax(dim=1) == labels).float().mean().item(),
        "error": [calibration_error(each, labels) for each in (plain, scores)],
        "chance": error_by_chance(scores),
        "nll": [negative_log_likelihood(each, labels) for each in (plain, scores)],
        "sets": sets,
    }
    known = rules(logits, base, calibration)
    row["kept"] = 100 * (known[0] >= calibration.least_nearness).float().mean().item()
    if "unknown.logits" in found:
        pairs = zip(known, rules(found["unknown.logits"], found["unknown.base"], calibration), strict=True)
        row["unknown"] = [{"auroc": auroc(*pair), "fpr95": false_positives(*pair)} for pair in pairs]
    return row


def rules(logits: torch.Tensor, base: torch.Tensor, calibration: Calibration) -> tuple[torch.Tensor, ...]:
    """Nearness of calibrated logits, their energy and largest score, and that of zero-shot, each (N,): large for images
    of a class."""
    logits = logits / calibration.temperature
    scores = (each.softmax(dim=1).amax(dim=1) for each in (logits, base))
    return nearness(logits, calibration.typical_logits), energies(logits), *scores


def auroc(known: torch.Tensor, strange: torch.Tensor) -> float:
    """Chance in percent that an image of a class has the larger value; equal values count half."""
    pairs = known[:, None] - strange[None]  # (N, M)
    return 100 * ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()


def false_positives(known: torch.Tensor, strange: torch.Tensor, kept: float = 0.95) -> float:
    """Images of no class in percent that pass where `kept` of the others do."""
    return 100 * (strange >= known.quantile(1 - kept)).double().mean().item()


@torch.no_grad()
def logits_of(classifier: SEPClassifier, data: ImageSet, samples: list[Sample], part: str) -> dict[str, torch.Tensor]:
    """Logits (N, C) that are not calibrated, those of zero-shot, and labels (N,), by names that begin with `part`."""
    names = classifier.class_names
    pairs = [(sample.key, names[sample.label]) for sample in samples]
    images = LabelledImages(pairs, names, classifier.processor, read=data.open)
    found = []
    for batch in DataLoader(images, 100):
        pixels = batch["pixel_values"].to(classifier.device)
        logits = classifier(pixels).logits
        with classifier.model.disable_adapter():
            found.append((logits.cpu(), classifier(pixels).logits.cpu(), batch["labels"]))
    columns = zip(*found, strict=True)
    return {f"{part}.{name}": torch.cat(c) for name, c in zip(("logits", "base", "labels"), columns, strict=True)}


def read(name: str, args: argparse.Namespace) -> ImageSet:
    path = Path(name) if name.endswith(".json") else HERE / "data_sets" / f"{name}.json"
    data = read_dataset(path, args.data_root)
    most = args.classes
    if most is None or most >= len(data.classes):
        return data
    return data.only(sorted(random.Random(5).sample(list(data.classes), most)))


def opened(data: ImageSet, samples: list[Sample]) -> list[tuple[Any, str]]:
    return [(data.open(sample.key), data.classes[sample.label]) for sample in samples]


def at_most(samples: list[Sample], most: int | None) -> list[Sample]:
    shuffled = random.Random(0).sample(samples, len(samples))
    return shuffled[:most]


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    cell = row["cell"]
    sets = ", ".join(f"{each['held']:.1f} ({each['classes']:.1f})" for each in row["sets"].values())
    columns = [Path(cell["model"]).name, cell["data"], cell["shots"], cell["seed"], f"{row['accuracy']:.1f}"]
    columns += [f"{value:.1f}" for value in (*row["error"], row["chance"])]
    columns += [f"{value:.3f}" for value in row["nll"]] + [sets]
    unknown = row.get("unknown")
    for key in ("auroc", "fpr95"):
        columns += ["" if unknown is None else f"{each[key]:.1f}" for each in unknown or [None] * 4]
    return "| " + " | ".join(map(str, [*columns, f"{row['kept']:.1f}"])) + " |"


if __name__ == "__main__":
    run_as_script(main)
