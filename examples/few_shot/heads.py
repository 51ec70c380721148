"""Heads and margins tried on the embeddings that runs kept, without training anything again.

    python examples/few_shot/heads.py outputs/few_shot/base-to-new/clothing

prints for every run of `run.py --save-embeddings` the accuracy of each way to predict base and new classes, and how far
each method is from `--against` in each of them: differences of the same test images, with intervals of a paired
bootstrap. `--rows gda probe` writes runs of these heads beside the runs whose embeddings they read, such as `sep-gda`
beside `sep`, for `summarize.py`: what `run.py` finds with `"head": "gda"` in the method's file. `--margins 0 1` does
the same for margins of zero-shot on classes that were not trained, such as `sep-margin-0`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from embeddings import FILE, read_embeddings
from evaluation import outcome
from intervals import interval, resampled
from run_folder import RunFolder
from script import run_as_script

from sep_peft.classifier.logits import head_features, more_confident
from sep_peft.method.fit_heads import fit_head
from sep_peft.method.heads import NAMES, ClassHead, HeadLogits
from sep_peft.method.losses import PROTOTYPE_SCALE
from sep_peft.method.recipe import PROTOTYPE_LOGIT_WEIGHT


#: Parts of the embeddings that are no evaluations.
DRAWN = ("train", "val")
#: Margins of zero-shot that new classes are tried with.
MARGINS = (1.0, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs of one data set")
    parser.add_argument("--against", default="sep", help="method that the others are compared with")
    parser.add_argument("--rows", nargs="*", default=[], choices=list(NAMES), help="heads to write runs of")
    parser.add_argument("--margins", nargs="*", default=[], type=float, help="margins to write runs of")
    args = parser.parse_args()
    files = [
        file for file in sorted(args.runs.glob(f"*/shots_*/seed_*/{FILE}")) if (file.parent / "results.json").exists()
    ]
    if not files:
        parser.error(f"{args.runs} holds no finished run with {FILE}; keep them by run.py --save-embeddings")
    for file in files:
        written = [write_row(file.parent, kind) for kind in args.rows]
        written += [write_margin(file.parent, margin) for margin in args.margins]
        for path in filter(None, written):
            print(path)
    if not args.rows and not args.margins:
        compare(files, args.against)


def compare(files: list[Path], against: str) -> None:
    """Print the accuracy of every way to predict, and differences from one method."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}  # method -> way -> seed -> whether each image is right
    for file in files:
        method, seed = file.parts[-4], file.parts[-2]
        right = predictions(read_embeddings(file))
        print(json.dumps({"method": method, "run": seed, **{name: percent(row) for name, row in right.items()}}))
        for name, row in right.items():
            found.setdefault(method, {}).setdefault(name, {})[seed] = row
    for method, ways in found.items():
        for name, runs in ways.items():
            theirs = found.get(against, {}).get(name, {})
            if method != against and (both := sorted(runs.keys() & theirs.keys())):
                ours, theirs = (torch.stack([side[seed] for seed in both]) for side in (runs, theirs))
                mean, low, high = paired_interval(ours, theirs)
                print(f"{method} - {against}, {name}, {len(both)} seeds: {mean:+.1f} [{low:+.1f}, {high:+.1f}]")


def texts_logits(found: dict, part: dict) -> torch.Tensor:
    return found["scale"] * part["images"] @ part["texts"].T


def frozen_logits(found: dict, part: dict) -> torch.Tensor:
    return found["scale"] * part["frozen_images"] @ part["frozen_texts"].T


def features(part: dict) -> torch.Tensor:
    return head_features(part["images"], part["frozen_images"])


def prototype_weights(found: dict) -> torch.Tensor | None:
    """(C, E), whose products with `features` are the logits of the trained prototypes; None where there are none."""
    if "prototypes" not in found:
        return None
    return PROTOTYPE_LOGIT_WEIGHT * PROTOTYPE_SCALE * F.normalize(found["prototypes"], dim=1)


def kinds_for(found: dict) -> list[str]:
    """Kinds of heads that a run has what it takes for."""
    return [kind for kind in NAMES if kind != "prototypes-gda" or "prototypes" in found]


def head_of(found: dict, kind: str) -> ClassHead:
    """The head that a run's training images teach."""
    train = found["train"]
    logits = frozen_logits(found, train), None, texts_logits(found, train), prototype_weights(found)
    return fit_head(kind, features(train), train["labels"], train["texts"], *logits)


def with_head(found: dict, part: dict, head: ClassHead) -> torch.Tensor:
    """Logits (N, C) of the texts and the head."""
    added = HeadLogits(head.kind, head.tensors, head.logit_weight, len(part["texts"]))(features(part))
    return texts_logits(found, part) + added


def predictions(found: dict) -> dict[str, torch.Tensor]:
    """Way to predict -> for each test image whether it is right, (N,): of trained classes by heads, of new by margins.

    Its first word is the evaluation.
    """
    logits, labels = {}, {}
    heads = {kind: head_of(found, kind) for kind in kinds_for(found)}
    prototypes = prototype_weights(found)
    for name, part in found.items():
        if not isinstance(part, dict) or name in DRAWN:
            continue
        texts, zero_shot = texts_logits(found, part), frozen_logits(found, part)
        ways = {"zero-shot": zero_shot, "texts": texts}
        if trained(found, part):
            if prototypes is not None:
                ways["prototypes"] = texts + features(part) @ prototypes.T
            ways |= {kind: with_head(found, part, head) for kind, head in heads.items()}
        else:
            ways |= {f"margin {m:g}": more_confident(texts, zero_shot, m) for m in MARGINS}
        logits |= {f"{name} {way}": value for way, value in ways.items()}
        labels[name] = part["labels"]
    return {name: value.argmax(dim=1) == labels[name.split()[0]] for name, value in logits.items()}


def trained(found: dict, part: dict) -> bool:
    """Whether the classes of a part are those of the training images."""
    return torch.equal(part["frozen_texts"], found["train"]["frozen_texts"])


def write_row(run: Path, kind: str) -> Path | None:
    """A run of the same adapter with another head, as `run.py` finds it.

    None where it is there, or has one already, or lacks what this one needs.
    """
    method = settings_of(run)["method"]
    if method.get("head") is not None:
        return None
    name = kind if method["learner"] == "zero-shot" else f"{method['name']}-{kind}"
    found = read_embeddings(run / FILE)
    if kind not in kinds_for(found):
        return None
    head = head_of(found, kind)
    described = {"name": name, "description": f"{method['description']}; head {kind}", "head": kind}
    return write_run(run, method | described, {"logit_weight": head.logit_weight}, head)


def write_margin(run: Path, margin: float) -> Path | None:
    """A run of the same adapter with another margin of zero-shot on new classes; None where it is there, or none is."""
    method = settings_of(run)["method"]
    if method["recipe"] is None or method["recipe"]["zero_shot_margin"] == margin or "-margin-" in method["name"]:
        return None
    described = {
        "name": f"{method['name']}-margin-{margin:g}",
        "description": f"{method['description']}; margin of zero-shot {margin:g}",
        "recipe": method["recipe"] | {"zero_shot_margin": margin},
    }
    return write_run(run, method | described)


def write_run(
    run: Path, method: dict[str, Any], chosen: dict[str, float] | None = None, head: ClassHead | None = None
) -> Path | None:
    """A run of a method that shares the adapter of another, beside it; None where it is there.

    Args:
        run: whose adapter it is.
        method: settings of the new one.
        chosen: for its results; None: as in `run`.
        head: for the classes that were trained; None: they are predicted as in `run`.
    """
    before = json.loads((run / "results.json").read_text("utf-8"))
    path = run.parents[2] / method["name"] / run.parent.name / run.name
    folder = RunFolder(path, {**settings_of(run), "method": method})
    if folder.finished:
        return None
    found, measured = read_embeddings(run / FILE), {}
    for evaluation, result in before["results"].items():
        part = found[evaluation]
        if not trained(found, part):
            logits = other_classes(found, part, method)
        elif head is not None:
            logits = with_head(found, part, head)
        else:
            measured[evaluation] = result
            continue
        measured[evaluation] = outcome(logits.softmax(dim=1), part["labels"], result["unreadable"])
    folder.finish({**before, "results": measured, "chosen": before["chosen"] if chosen is None else chosen})
    return path


def settings_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "settings.json").read_text("utf-8"))


def other_classes(found: dict, part: dict, method: dict[str, Any]) -> torch.Tensor:
    """Logits (N, C) of classes that were not trained."""
    texts, margin = texts_logits(found, part), (method["recipe"] or {}).get("zero_shot_margin", 0.0)
    return more_confident(texts, frozen_logits(found, part), margin) if margin else texts


def paired_interval(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float]:
    """Mean difference in points of S runs on the same N images, both (S, N), and its 95 % interval."""
    draws = [resampled({"all": side.double().numpy()})["all"] for side in (ours, theirs)]
    low, high = interval(np.subtract(*draws))
    return 100 * (ours.double() - theirs.double()).mean().item(), low, high


def percent(right: torch.Tensor) -> float:
    return round(100 * right.double().mean().item(), 1)


if __name__ == "__main__":
    run_as_script(main)
