"""Trains by `fit` as one of several processes that share out the base model, or alone with all of it.

python sharded_in_processes.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from shallow_classifier import TRAIN, VAL, classifier_maker

from sep_peft.training import Recipe, fit, shard_base


#: Batches of 4 and 2 images.
RECIPE = Recipe(epochs=2, batch_size=4, calibration_folds=0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    classifier = classifier_maker(RECIPE)()
    kept = {"all": sum(p.numel() for tower in classifier.model.base_model.towers.values() for p in layers_of(tower))}
    if accelerator.num_processes > 1:
        kept["own"] = shard_base(classifier)
    history = fit(classifier, TRAIN, RECIPE, eval_samples=VAL, accelerator=accelerator, quiet=True)
    name = folder / f"{accelerator.num_processes}-{accelerator.process_index}"
    classifier.save_pretrained(name)
    (name / "found.json").write_text(json.dumps({"rows": history.rows, **kept}))


def layers_of(tower) -> list[torch.nn.Parameter]:
    """Parameters of a tower's encoder."""
    return [p for name, p in tower.base_layer.named_parameters() if ".layers." in name and not p.requires_grad]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
