"""Run few-shot benchmarks: one cell or many, each a folder that is skipped once finished and resumed once killed.

    python examples/few_shot/run.py --data-root data --protocol base-to-new --dataset caltech101 --method sep lora

Several processes or machines: `accelerate launch examples/few_shot/run.py ...`, with the same arguments.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from embeddings import FILE, Embeddings, has_embeddings
from evaluation import features, measure
from frozen import frozen_embeddings
from methods import Method, build_classifier, read_method
from pixels import kept_pixels
from protocols import PROTOCOLS, Plan, held_out_domains, limited
from readers import ImageSet, read_dataset
from run_folder import RunFolder, write_json
from script import run_as_script
from tables import WITHOUT
from torch import nn
from training import fit, keep_head, work_of
from transformers import AutoProcessor
from transformers.utils import logging

from sep_peft.training.history import History


HERE = Path(__file__).parent


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.precision)
    if args.save_embeddings and accelerator.num_processes > 1:
        raise ValueError("--save-embeddings keeps the images of one process. Start the run without a launcher.")
    methods = [read_method(find(HERE / "methods", name), **args.recipe) for name in args.method]
    data = {
        name: read_dataset(find(HERE / "data_sets", name), args.data_root) for name in (*args.dataset, *args.targets)
    }
    places = [(name, domain) for name in args.dataset for domain in held_out_domains(args.held_out, data[name])]
    cells = list(itertools.product(places, args.shots, methods, args.seeds))
    if len(cells) == 1:
        args.keep_images = 0  # nobody asks for them again
    for (dataset, domain), shots, method, seed in cells:
        plan = make_plan(args, data, dataset, shots, seed, domain)
        place = Path(dataset).stem + (f"{WITHOUT}{domain}" if domain else "")
        path = args.output / args.protocol / place / method.name / f"shots_{shots}" / f"seed_{seed}"
        run_cell(path, Cell(args.protocol, place, method, plan, shots, seed, domain), args, accelerator)


@dataclass(frozen=True)
class Cell:
    """One number, or a few, of a table."""

    protocol: str
    dataset: str
    method: Method
    plan: Plan
    shots: int
    seed: int
    held_out: str | None = None

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {
            "protocol": self.protocol,
            "dataset": self.dataset,
            "classes": self.plan.data.classes,
            "template": self.plan.data.template,
            "evaluations": [f"{e.name}: {e.split}" for e in self.plan.evaluations],
            "method": self.method.to_dict(),
            "shots": self.shots,
            "seed": self.seed,
            "model": args.model,
            "precision": args.precision,
            "attention": args.attention,
            **({} if args.test_images is None else {"test_images": args.test_images}),
            **({} if self.held_out is None else {"held_out": self.held_out}),
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), required=True)
    parser.add_argument("--method", nargs="+", required=True, help="files in methods/, or paths of such files")
    parser.add_argument("--shots", type=int, nargs="+", default=[16], help="training images per class")
    parser.add_argument(
        "--held-out", help="domain to test on, for domain-generalization with several domains; all: each"
    )
    parser.add_argument("--recipe", nargs="*", default=[], metavar="NAME=VALUE", help="replace entries of the recipe")
    args = parser.parse_args()
    if min(args.shots) < 1:
        parser.error("--shots must be at least 1")
    check_protocol(parser, args)
    args.recipe = parse_changes(parser, args.recipe)
    return args


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every script that runs cells."""
    parser.add_argument("--dataset", nargs="+", required=True, help="files in data_sets/, or paths of such files")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all images")
    parser.add_argument("--targets", nargs="*", default=[], help="data sets to test on, for cross-dataset")
    parser.add_argument("--model", default=str(HERE.parent / "assets" / "clip-small"), help="name on the Hub or path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("outputs/few_shot"), help="runs go below this folder")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="implementation; default: the model's own")
    parser.add_argument("--test-images", type=int, help="images of each class to test on at most; default: all")
    parser.add_argument("--save-embeddings", action="store_true", help="keep all embeddings, for heads.py")
    parser.add_argument("--save-adapters", action="store_true", help="keep the trained adapters")
    parser.add_argument("--cache", type=Path, help="folder for what cached methods cache; default: memory")
    parser.add_argument(
        "--keep-images", type=float, default=2, metavar="GIB", help="memory for test images, so that each is read once"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")


def check_protocol(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error where options are of another protocol."""
    if args.targets and args.protocol != "cross-dataset":
        parser.error("--targets is for --protocol cross-dataset")
    if args.held_out and args.protocol != "domain-generalization":
        parser.error("--held-out is for --protocol domain-generalization")


def parse_changes(parser: argparse.ArgumentParser, changes: list[str]) -> dict[str, float]:
    """["epochs=2"] -> {"epochs": 2}."""
    try:
        pairs = dict(change.split("=") for change in changes)
        return {name: int(value) if value.isdigit() else float(value) for name, value in pairs.items()}
    except ValueError:
        parser.error(f"--recipe takes NAME=NUMBER, but got {' '.join(changes)}")


def find(folder: Path, name: str) -> Path:
    """A file by its name in `folder`, or by its path.

    Raises:
        FileNotFoundError: there is none; the message lists the names.
    """
    for path in (folder / f"{name}.json", Path(name)):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
    raise FileNotFoundError(f"{name!r} is neither a file nor one of {names}.")


def make_plan(
    args, data: dict[str, ImageSet], dataset: str, shots: int, seed: int, held_out: str | None = None
) -> Plan:
    options: dict[str, Any] = {}
    if args.protocol == "cross-dataset":
        options["targets"] = [data[name] for name in args.targets if name != dataset]
    if args.protocol == "domain-generalization":
        options["held_out"] = held_out
    plan = PROTOCOLS[args.protocol](data[dataset], shots, seed, **options)
    return plan if args.test_images is None else limited(plan, args.test_images)


def run_cell(path: Path, cell: Cell, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train and evaluate one method on one plan, unless that is done."""
    folder = RunFolder(path, cell.settings(args))
    if folder.finished:
        accelerator.print(f"{path}: finished before")
        return
    images = cell.plan.images
    write_json(path / "draw.json", {"train": images.train, "unreadable": images.unreadable})
    accelerator.print(f"{path}: {len(images.train)} training images of {len(cell.plan.data.classes)} classes")
    for key in images.unreadable:
        accelerator.print(f"  cannot be read, replaced by another: {key}")
    outcome = train_and_evaluate(cell, args, accelerator, path)
    if accelerator.is_main_process:
        folder.finish(outcome)
    accelerator.wait_for_everyone()
    for name, result in outcome["results"].items():
        accelerator.print(f"  {name}: {result['accuracy']:.1f} %" if result else f"  {name}: not defined")
        for key in result["unreadable"] if result else ():
            accelerator.print(f"  cannot be read, left out: {key}")


def train_and_evaluate(cell: Cell, args, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Results per evaluation, the log, times and sizes."""
    method, plan = cell.method, cell.plan
    set_seed(cell.seed)
    options = {} if args.attention is None else {"attn_implementation": args.attention}
    processor = AutoProcessor.from_pretrained(args.model)
    images = processor.image_processor
    classifier = build_classifier(method, args.model, processor, plan.data.classes, plan.data.template, **options)
    classifier.to(accelerator.device)
    history, chosen, start = History(0), {}, time.perf_counter()
    own: list[History] = []  # an entry for each epoch of this process, which may go on from one that was killed
    if method.trains:
        options = {"workers": args.workers, "cache": args.cache, "callbacks": [own.append]}
        history = fit(classifier, method, plan, processor, accelerator, folder, cell.seed, **options)
        if method.head is None and method.recipe.prototype_weight and method.recipe.prototype_logit_weight:
            classifier.keep_prototypes(method.recipe.prototype_logit_weight)
    elif hasattr(classifier, "fit"):
        classifier.eval()
        parts = (plan.images.train, plan.images.val or plan.images.train)
        chosen = classifier.fit(*(t for part in parts for t in features(classifier, plan.data, part, images)))
    if method.head is not None:
        chosen = keep_head(classifier, method.head, plan, processor, args.workers)
    trained = time.perf_counter()
    if args.save_adapters and method.trains and accelerator.is_main_process:
        (classifier if method.learner == "sep" else classifier.model).save_pretrained(folder / "adapter")
    results, classes, kept = {}, classifier.classes, None
    known = frozen_embeddings(args.model, args.attention, args.precision, args.data_root)
    seen = kept_pixels(args.model, args.data_root, int(args.keep_images * 2**30))
    seen.keep_only(evaluation.data.name for evaluation in plan.evaluations)
    if args.save_embeddings and has_embeddings(classifier):
        kept = Embeddings(classifier)
        classifier.eval()
        for part in ("train", "val"):
            kept.add_images(part, classifier, plan.data, getattr(plan.images, part), images)
    for evaluation in plan.evaluations:
        # kept prototypes belong to the classes of the training images
        if evaluation.data.classes == plan.data.classes:
            classifier.set_classes(classes)
        else:
            margin = {"zero_shot_margin": method.recipe.zero_shot_margin} if method.trains else {}
            classifier.set_classes(evaluation.data.classes, **margin)
        results[evaluation.name] = measure(classifier, evaluation, images, accelerator, args.workers, kept, known, seen)
    if kept is not None:
        kept.write(folder / FILE)
    return {
        "results": results,
        "chosen": chosen,
        "log": history.rows,
        "trained_parameters": count_trained(classifier),
        **work_of(method, len(plan.images.train), len(history)),
        "epoch_seconds": history.seconds,
        "training_seconds": trained - start + sum(history.seconds[: len(history) - len(own)]),
        "evaluation_seconds": time.perf_counter() - trained,
        "processes": accelerator.num_processes,
    }


def count_trained(classifier: nn.Module) -> int:
    """Parameters that the adapter keeps; the prototypes of the loss are thrown away."""
    return sum(p.numel() for name, p in classifier.named_parameters() if p.requires_grad and name != "prototypes")


if __name__ == "__main__":
    run_as_script(main)
