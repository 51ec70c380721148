"""How far training carries the prompted image tower away from the frozen one, and what that costs or brings.

    python examples/few_shot/drift.py --data-root data --dataset clothing --method sep --without none vision_weight

trains a method base-to-new, once for each entry of `--without`: the whole loss ("none"), or all of it but one part;
"image_classification" leaves the cross entropy of the texts to the text tower alone. It measures on validation images
of the trained classes before training and after every epoch: how many the nearest class mean of the training images
tells by prompted, frozen and mixed embeddings; the cosine between prompted and frozen ones, and the ratio of their
lengths. After the last epoch it measures the same cosine of the class token after each layer, and the share of its
attention that the prompts of the layer take. Everything is written to `drift.json` as well.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from images import batches
from methods import build_classifier, read_method
from protocols import base_to_new, limited, on_validation
from readers import read_dataset
from run import HERE, find
from run_folder import write_json
from script import run_as_script
from training import fit, plain_batches
from transformers import AutoProcessor
from transformers.utils import logging

from sep_peft import SEPClassifier
from sep_peft.method.fit_heads import class_means


#: What `--without` may leave out of the loss: nothing, the cross entropy of the texts, for both towers or for the image
#: tower alone, or a weight of the recipe.
PARTS = ("none", "classification", "image_classification", "text_weight", "vision_weight", "prototype_weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", required=True, help="files in data_sets/, or paths of such files")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all images")
    parser.add_argument("--model", default=str(HERE.parent / "assets" / "clip-small"), help="name on the Hub or path")
    parser.add_argument("--method", nargs="+", default=["sep"], help='files in methods/ of the learner "sep"')
    parser.add_argument("--without", nargs="+", default=["none"], choices=PARTS, help="parts of the loss to leave out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    parser.add_argument("--epochs", type=int, default=8, help="in the place of the recipe's")
    parser.add_argument("--batch-size", type=int, default=16, help="in the place of the recipe's")
    parser.add_argument("--images", type=int, default=25, help="validation images of each class at most")
    parser.add_argument("--output", type=Path, default=Path("outputs/drift"))
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    args = parser.parse_args()
    logging.disable_progress_bar()
    accelerator, rows = Accelerator(cpu=args.cpu), []
    for dataset in args.dataset:
        data = read_dataset(find(HERE / "data_sets", dataset), args.data_root)
        for name in args.method:
            for without in args.without:
                for seed in args.seeds:
                    plan = limited(on_validation(base_to_new(data, args.shots, seed)), args.images)
                    rows.append(measured(args, plan, name, without, seed, accelerator))
                    args.output.mkdir(parents=True, exist_ok=True)
                    write_json(args.output / "drift.json", rows)
                    print(table(rows[-1]), flush=True)


def measured(
    args: argparse.Namespace, plan, name: str, without: str, seed: int, accelerator: Accelerator
) -> dict[str, Any]:
    """Train one method without a part of its loss, and measure it before and after every epoch."""
    method = read_method(find(HERE / "methods", name), epochs=args.epochs, batch_size=args.batch_size)
    if method.learner != "sep":
        raise ValueError(f'{name}: drift is measured of learner "sep", but this is {method.learner!r}.')
    if without.endswith("_weight"):
        method = replace(method, recipe=replace(method.recipe, **{without: 0.0}))
    set_seed(seed)
    processor = AutoProcessor.from_pretrained(args.model)
    options = {"attn_implementation": "eager"}  # the others give no attention maps
    classes, template = plan.data.classes, plan.data.template
    classifier = build_classifier(method, args.model, processor, classes, template, **options).to(accelerator.device)
    if without == "classification":
        classifier.register_forward_hook(without_classification)
    elif without == "image_classification":
        spare_images(classifier)
    images = Images(plan, processor, classifier)
    epochs = [images.told(classifier)]

    def after_epoch(_) -> None:
        epochs.append(images.told(classifier))
        classifier.train()

    folder = args.output / f"{plan.data.name}-{name}-without-{without}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    fit(classifier, method, plan, processor, accelerator, folder, seed, 0, callbacks=[after_epoch])
    named = {"model": args.model, "dataset": plan.data.name, "method": name, "without": without, "seed": seed}
    return {**named, "epochs": epochs, "layers": images.layers(classifier)}


def without_classification(_, inputs, output):
    """A hook that takes the cross entropy of the class texts out of the loss."""
    if output.parts is not None:
        output.loss = output.loss - output.parts.classification
    return output


def spare_images(classifier: SEPClassifier) -> None:
    """Keep the cross entropy of the class texts from the image tower; the text tower learns from it as before."""
    embed, embedded = classifier.image_embeds, []

    def remember(*args, **kwargs):
        embedded[:] = embed(*args, **kwargs)
        return tuple(embedded)

    def hook(_, inputs, output):
        if output.parts is not None:
            images = embedded[0]  # (B, E), with the adapter
            (slope,) = torch.autograd.grad(output.parts.classification, images, retain_graph=True)
            share = (slope * images).sum()  # its slope at the images is that of the cross entropy
            output.loss = output.loss - share + share.detach()
        return output

    classifier.image_embeds = remember
    classifier.register_forward_hook(hook)


class Images:
    """Training and validation images of a plan, and what a classifier makes of them.

    Args:
        plan: whose first evaluation is of the trained classes.
        processor: of the model.
        classifier: on its device.
    """

    def __init__(self, plan, processor, classifier: SEPClassifier):
        device, evaluation = classifier.device, plan.evaluations[0]
        samples = evaluation.data.splits[evaluation.split]
        self._train = [
            (b["pixel_values"].to(device), b["labels"].to(device)) for b in plain_batches(plan, processor, 0)
        ]
        found = batches(evaluation.data, samples, processor.image_processor)
        self._held_out = [(pixels.to(device), labels.to(device)) for pixels, labels, _ in found if pixels is not None]
        self._count = len(plan.data.classes)

    @torch.no_grad()
    def told(self, classifier: SEPClassifier) -> dict[str, float]:
        """Accuracy of class means in percent, cosine and ratio of lengths of prompted and frozen embeddings."""
        classifier.eval()
        train, held_out = (self._embeds(classifier, part) for part in (self._train, self._held_out))
        row = {}
        for name in ("prompted", "frozen", "mixed"):
            means = F.normalize(class_means(train[name], train["labels"], self._count), dim=1)  # (C, E)
            for part, found in (("train", train), ("held_out", held_out)):
                right = (found[name] @ means.T).argmax(dim=1) == found["labels"]
                row[f"{part} {name}"] = 100 * right.double().mean().item()
        row["cosine"] = (held_out["prompted"] * held_out["frozen"]).sum(dim=1).mean().item()
        row["length"] = held_out["lengths"].mean().item()
        return row

    @staticmethod
    def _embeds(classifier: SEPClassifier, part: list) -> dict[str, torch.Tensor]:
        both = [classifier.vision_tower.embed(pixel_values=pixels) for pixels, _ in part]
        prompted, frozen = (torch.cat([getattr(each, side) for each in both]) for side in ("prompted", "frozen"))
        lengths = prompted.norm(dim=1) / frozen.norm(dim=1)
        prompted, frozen = F.normalize(prompted, dim=1), F.normalize(frozen, dim=1)
        weight = classifier.vision_tower.frozen_weight
        mixed = F.normalize(torch.lerp(prompted, frozen, weight), dim=1)
        labels = torch.cat([labels for _, labels in part])
        return {"prompted": prompted, "frozen": frozen, "mixed": mixed, "lengths": lengths, "labels": labels}

    @torch.no_grad()
    def layers(self, classifier: SEPClassifier) -> list[dict[str, float]]:
        """After each layer the cosine of the class token, and the share of its attention that prompts take in it."""
        classifier.eval()
        options, rows = {"output_hidden_states": True, "output_attentions": True}, []
        pixels = self._held_out[0][0]
        prompted = classifier.vision_tower(pixel_values=pixels, **options)
        with classifier.model.disable_adapter():
            frozen = classifier.vision_tower(pixel_values=pixels, **options)
        states = list(zip(prompted.hidden_states, frozen.hidden_states, strict=True))[1:]
        for (ours, theirs), attention in zip(states, prompted.attentions, strict=True):
            cosine = F.cosine_similarity(ours[:, 0], theirs[:, 0]).mean().item()
            rows.append({"cosine": cosine, "prompts": 1 - attention[:, :, 0].sum(dim=-1).mean().item()})
        return rows


def table(row: dict[str, Any]) -> str:
    """One training for people."""
    named = f"{row['dataset']}, {row['method']} without {row['without']}, seed {row['seed']}"
    lines = [named, "epoch  held out: prompted frozen mixed   train: prompted frozen   cosine  length"]
    for epoch, found in enumerate(row["epochs"]):
        told = [found[f"held_out {name}"] for name in ("prompted", "frozen", "mixed")]
        told += [found["train prompted"], found["train frozen"]]
        lines.append(
            f"{epoch:5d}" + "".join(f"{value:9.1f}" for value in told) + f"{found['cosine']:9.3f}{found['length']:8.2f}"
        )
    lines.append("layer  cosine of the class token, attention to prompts")
    lines += [f"{i:5d}{layer['cosine']:9.3f}{layer['prompts']:9.3f}" for i, layer in enumerate(row["layers"])]
    return "\n".join(lines)


if __name__ == "__main__":
    run_as_script(main)
