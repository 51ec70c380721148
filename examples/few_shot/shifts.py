"""Finished runs tested on shifted versions of their test images, without training anything again.

    python examples/few_shot/shifts.py outputs/few_shot --dataset clothing --method zero-shot sep lora-prototypes

reads runs that `run.py` made with --save-embeddings and --save-adapters, for base-to-new or few-shot, and writes runs
of domain-generalization beside them, which `summarize.py` makes tables and a drawing of: on the classes that were
trained, the test images as they are ("source") and under each of the shifts of `transforms.py`. A finished one is
skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from baselines import AdaptedClassifier, PlainClassifier
from embeddings import FILE, both_images, read_embeddings
from evaluation import outcome
from heads import features, head_of, texts_logits, with_head
from images import batches
from intervals import SHIFTED, SOURCE
from peft import PeftModel
from protocols import Measurement, base_to_new, few_shot, limited
from readers import ImageSet, read_dataset
from run import HERE, find
from run_folder import RunFolder
from script import run_as_script
from torch import nn
from transformers import AutoModel, AutoProcessor
from transforms import SHIFTS

from sep_peft import SEPClassifier
from sep_peft.method.losses import PROTOTYPE_SCALE


#: Protocols whose first evaluation is on the classes that were trained.
PLANS = {"base-to-new": base_to_new, "few-shot": few_shot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="--output of run.py")
    parser.add_argument("--protocol", choices=list(PLANS), default="base-to-new", help="of the runs")
    parser.add_argument("--dataset", required=True, help="file in data_sets/, or path of such a file")
    parser.add_argument("--method", nargs="+", required=True, help="methods that have runs there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all images")
    args = parser.parse_args()
    runs = [
        run
        for method in args.method
        for seed in args.seeds
        for run in sorted((args.runs / args.protocol / Path(args.dataset).stem).glob(f"{method}/shots_*/seed_{seed}"))
        if (run / "results.json").exists() and (run / FILE).exists()
    ]
    if not runs:
        parser.error(f"{args.runs} holds no finished run of these methods and seeds with {FILE}")
    data = read_dataset(find(HERE / "data_sets", args.dataset), args.data_root)
    for run in runs:
        measure_run(run, data)


def measure_run(run: Path, data: ImageSet) -> None:
    """Write the run on shifted images beside a finished one, unless it is there."""
    settings, before = (json.loads((run / name).read_text("utf-8")) for name in ("settings.json", "results.json"))
    place = settings["dataset"] + ("" if settings["protocol"] == "few-shot" else " (base classes)")
    path = run.parents[4] / SHIFTED / place / Path(*run.parts[-3:])
    folder = RunFolder(path, {**settings, "protocol": SHIFTED, "dataset": place})
    if folder.finished:
        print(f"{path}: finished before")
        return
    plan = PLANS[settings["protocol"]](data, settings["shots"], settings["seed"])
    plan = limited(plan, settings["test_images"]) if "test_images" in settings else plan
    evaluation, found = plan.evaluations[0], read_embeddings(run / FILE)
    if list(evaluation.data.classes) != settings["classes"]:
        raise ValueError(f"{settings['dataset']} has other classes than when {run} was made.")
    processor = AutoProcessor.from_pretrained(settings["model"])
    classifier = load_classifier(run, settings, processor, evaluation.data).eval()
    start = time.perf_counter()
    results: dict[str, Any] = {}
    for name in (SOURCE, *SHIFTS):  # the source as well, because another release of Pillow may read images otherwise
        shifted = Measurement(name, evaluation.data, shift="" if name == SOURCE else name)
        part, unreadable = embedded(classifier, shifted, processor.image_processor)
        part["texts"] = found[evaluation.name]["texts"]
        logits = trained_logits(found, part, settings["method"])
        results[name] = outcome(logits.softmax(dim=1), part["labels"], unreadable)
        print(f"{path}, {name}: {results[name]['accuracy']:.1f} %", flush=True)
    folder.finish({**before, "results": results, "evaluation_seconds": time.perf_counter() - start})


def load_classifier(run: Path, settings: dict[str, Any], processor, data: ImageSet) -> nn.Module:
    """The classifier that a run kept; its heads and prototypes are in the embeddings."""
    model, learner = AutoModel.from_pretrained(settings["model"]), settings["method"]["learner"]
    if learner == "zero-shot":
        return PlainClassifier(model, processor, data.classes, data.template)
    if not (run / "adapter").is_dir():
        raise ValueError(f"{run} keeps no adapter; make it by run.py --save-adapters.")
    if learner == "sep":
        return SEPClassifier.from_pretrained(run / "adapter", model=model, processor=processor)
    return AdaptedClassifier(PeftModel.from_pretrained(model, run / "adapter"), processor, data.classes, data.template)


@torch.no_grad()
def embedded(classifier: nn.Module, evaluation: Measurement, image_processor) -> tuple[dict[str, Any], list[str]]:
    """Embeddings with the adapter and without, and labels, of the images of an evaluation; keys of unreadable ones."""
    found, unreadable = [], []
    samples = evaluation.data.splits[evaluation.split]
    for pixels, labels, broken in batches(evaluation.data, samples, image_processor, shifted=evaluation.shift):
        unreadable += broken
        if pixels is not None:
            found.append((*both_images(classifier, pixels), labels))
    columns = (torch.cat(column) for column in zip(*found, strict=True))
    return dict(zip(("images", "frozen_images", "labels"), columns, strict=True)), unreadable


def trained_logits(found: dict, part: dict, method: dict[str, Any]) -> torch.Tensor:
    """Logits (N, C) of the classes that were trained, as the method predicts them."""
    if method.get("head") is not None:
        return with_head(found, part, head_of(found, method["head"]))
    logits, recipe = texts_logits(found, part), method["recipe"] or {}
    if weight := recipe.get("prototype_weight") and recipe["prototype_logit_weight"]:
        logits = logits + weight * PROTOTYPE_SCALE * features(part) @ F.normalize(found["prototypes"], dim=1).T
    return logits


if __name__ == "__main__":
    run_as_script(main)
