"""Trains by `fit` as one of several processes that share out the base model, or alone with all of it.

python sharded_in_processes.py FOLDER [CLASSES_DRAWN]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from shallow_classifier import TRAIN, VAL, classifier_maker

from sep_peft import SEPClassifier
from sep_peft.training import Recipe, fit, shard_base


#: Classes without images, of other lengths than those that have some.
OTHERS = ["umbrella of a beach", "cup", "very large inline skate of somebody"]


def main(folder: Path, drawn: int = 0) -> None:
    """Train for two epochs, with batches of 4 and 2 images, and save.

    Args:
        drawn: classes that a step draws, of five, whose texts are encoded one by one; 0: it encodes those of all two.
    """
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    recipe = Recipe(epochs=2, batch_size=4, calibration_folds=0, class_sample=drawn)
    classifier = classifier_maker(recipe)()
    if drawn:
        classifier = SEPClassifier.from_class_names(
            classifier.model, classifier.processor, [*classifier.class_names, *OTHERS], recipe=recipe, chunk_size=1
        )
    kept = {"all": sum(p.numel() for tower in classifier.model.base_model.towers.values() for p in layers_of(tower))}
    if accelerator.num_processes > 1:
        kept["own"] = shard_base(classifier)
    history = fit(classifier, TRAIN, recipe, eval_samples=VAL, accelerator=accelerator, quiet=True)
    name = folder / f"{accelerator.num_processes}-{accelerator.process_index}"
    classifier.save_pretrained(name)
    (name / "found.json").write_text(json.dumps({"rows": history.rows, **kept}))


def layers_of(tower) -> list[torch.nn.Parameter]:
    """Parameters of a tower's encoder."""
    return [p for name, p in tower.base_layer.named_parameters() if ".layers." in name and not p.requires_grad]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
