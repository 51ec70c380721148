"""Tune methods on validation images: every candidate of a method's file, base-to-new, never a test image.

    python examples/few_shot/tune.py --data-root data --dataset caltech101-covered --method sep lora --seeds 1

`tuning/<method>.json` lists candidates as changes of the method's `recipe` and `config`. What was tried is written to
`tried.json` in the output folder, best first.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import Accelerator
from methods import Method, read_method
from protocols import base_to_new, limited, on_validation
from readers import read_dataset
from run import HERE, Cell, add_common_arguments, find, run_cell
from run_folder import write_json
from script import run_as_script
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--method", nargs="+", required=True, help="files in methods/ that have one in tuning/")
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    args = parser.parse_args()
    logging.disable_progress_bar()
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.precision)
    data = {name: read_dataset(find(HERE / "data_sets", name), args.data_root) for name in args.dataset}
    for name in args.method:
        method = read_method(find(HERE / "methods", name))
        candidates = json.loads(find(HERE / "tuning", name).read_text(encoding="utf-8"))
        for changes, dataset, seed in itertools.product(candidates, args.dataset, args.seeds):
            plan = on_validation(base_to_new(data[dataset], args.shots, seed))
            plan = plan if args.test_images is None else limited(plan, args.test_images)
            path = args.output / "tuning" / Path(dataset).stem / method.name / title(changes) / f"seed_{seed}"
            cell = Cell("tuning", Path(dataset).stem, change(method, changes), plan, args.shots, seed)
            run_cell(path, cell, args, accelerator)
    if accelerator.is_main_process:
        write_json(args.output / "tuning" / "tried.json", tried(args.output / "tuning"))


def change(method: Method, changes: dict[str, dict[str, Any]]) -> Method:
    """The method with some entries of its recipe and config replaced."""
    if unknown := sorted(set(changes) - {"recipe", "config"}):
        raise ValueError(f"A candidate may change recipe and config, but has {unknown}.")
    return replace(
        method,
        recipe=replace(method.recipe, **changes.get("recipe", {})),
        config={**method.config, **changes.get("config", {})},
    )


def title(changes: dict[str, dict[str, Any]]) -> str:
    """A folder name that says what changed."""
    parts = [f"{key}={value}" for part in changes.values() for key, value in part.items()]
    return ",".join(parts).replace(" ", "").replace("/", "-") or "unchanged"


def tried(folder: Path) -> list[dict[str, Any]]:
    """Every candidate with its accuracies on validation images, best harmonic mean first."""
    found: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = {}
    for file in sorted(folder.glob("*/*/*/seed_*/results.json")):
        dataset, method, candidate = file.parts[-5:-2]
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        accuracies = {name: result["accuracy"] for name, result in results.items()}
        found.setdefault((method, candidate), {}).setdefault(dataset, []).append(accuracies)
    rows = []
    for (method, candidate), datasets in found.items():
        means = {d: {k: mean(run[k] for run in runs) for k in ("base", "new")} for d, runs in datasets.items()}
        base, new = (mean(m[key] for m in means.values()) for key in ("base", "new"))
        harmonic = 2 * base * new / (base + new) if base + new else 0.0
        seeds = min(map(len, datasets.values()))
        row = {"method": method, "candidate": candidate, "base": base, "new": new, "harmonic": harmonic}
        rows.append({**row, "seeds": seeds, "datasets": means})
    return sorted(rows, key=lambda row: (row["method"], -row["harmonic"]))


if __name__ == "__main__":
    run_as_script(main)
