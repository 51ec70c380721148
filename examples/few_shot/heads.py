"""Heads and margins tried on the embeddings that runs kept, without training anything again.

    python examples/few_shot/heads.py outputs/few_shot/base-to-new/clothing

prints for every run of `run.py --save-embeddings` the accuracy of each way to predict base and new classes, and how far
each method is from `--against` by texts alone and with its prototypes: differences of the same test images, with
intervals of a paired bootstrap.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from embeddings import FILE, read_embeddings

from sep_peft.classifier.logits import head_features, more_confident
from sep_peft.method.fit_heads import fit_head
from sep_peft.method.heads import NAMES, HeadLogits
from sep_peft.method.losses import PROTOTYPE_SCALE
from sep_peft.method.recipe import PROTOTYPE_LOGIT_WEIGHT, ZERO_SHOT_MARGIN


#: Draws of a bootstrap.
DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs of one data set")
    parser.add_argument("--against", default="sep", help="method that the others are compared with")
    args = parser.parse_args()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(args.runs.glob(f"*/shots_*/seed_*/{FILE}")):
        method, seed = file.parts[-4], file.parts[-2]
        right = predictions(read_embeddings(file))
        print(json.dumps({"method": method, "run": seed, **{name: percent(row) for name, row in right.items()}}))
        for name, row in right.items():
            found.setdefault(method, {})[f"{seed} {name}"] = row
    for method, rows in found.items():
        if method == args.against or args.against not in found:
            continue
        for name in dict.fromkeys(key.split(" ", 1)[1] for key in rows):
            both = [key for key in rows if key.endswith(f" {name}") and key in found[args.against]]
            if both:
                ours, theirs = (torch.stack([found[m][key] for key in both]) for m in (method, args.against))
                mean, low, high = paired_interval(ours, theirs)
                print(f"{method} - {args.against}, {name}, {len(both)} seeds: {mean:+.1f} [{low:+.1f}, {high:+.1f}]")


def predictions(found: dict) -> dict[str, torch.Tensor]:
    """Way to predict -> for each test image whether it is right, (N,): of base classes by heads, of new by margins."""
    scale, train, base, new = found["scale"], found["train"], found["base"], found["new"]

    def texts(part: dict) -> torch.Tensor:
        return scale * part["images"] @ part["texts"].T

    def zero_shot(part: dict) -> torch.Tensor:
        return scale * part["frozen_images"] @ part["frozen_texts"].T

    def features(part: dict) -> torch.Tensor:
        return head_features(part["images"], part["frozen_images"])

    logits = {"base zero-shot": zero_shot(base), "base texts": texts(base)}
    if "prototypes" in found:
        cosines = features(base) @ F.normalize(found["prototypes"], dim=1).T
        logits["base prototypes"] = texts(base) + PROTOTYPE_LOGIT_WEIGHT * PROTOTYPE_SCALE * cosines
    for kind in NAMES:
        head = fit_head(kind, features(train), train["labels"], train["texts"], zero_shot(train))
        added = HeadLogits(kind, head.tensors, head.logit_weight, len(base["texts"]))(features(base))
        logits[f"base {kind}"] = texts(base) + added
    logits |= {"new zero-shot": zero_shot(new), "new texts": texts(new)}
    for margin in (1.0, ZERO_SHOT_MARGIN):
        logits[f"new margin {margin:g}"] = more_confident(texts(new), zero_shot(new), margin)
    labels = {"base": base["labels"], "new": new["labels"]}
    return {name: value.argmax(dim=1) == labels[name.split()[0]] for name, value in logits.items()}


def paired_interval(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float]:
    """Mean difference in points of S runs on the same N images, both (S, N), and its 95 % interval.

    Images are drawn anew and, where there are several runs, runs as well.
    """
    differences = 100 * (ours.double() - theirs.double())  # (S, N)
    seeds, images = differences.shape
    generator = torch.Generator().manual_seed(0)
    of_runs = torch.randint(seeds, (DRAWS, seeds), generator=generator)
    means = torch.empty(DRAWS, dtype=torch.double)
    for draw, runs in enumerate(of_runs):
        own = torch.randint(images, (images,), generator=generator)
        means[draw] = differences[runs][:, own].mean()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return differences.mean().item(), low, high


def percent(right: torch.Tensor) -> float:
    return round(100 * right.double().mean().item(), 1)


if __name__ == "__main__":
    main()
