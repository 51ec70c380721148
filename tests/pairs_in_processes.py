"""Trains on pairs as one of several processes and writes what was trained: python pairs_in_processes.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from small_pairs import make_model, make_pairs, make_processor

from sep_peft.training import PairsRecipe, fit_pairs


#: Batches of 3, 3 and 1 images, of which a second process has none of the last.
RECIPE = PairsRecipe(epochs=2, batch_size=3, learning_rate=0.01)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model, pairs = make_model(), make_pairs(negatives=True)
    accelerator = Accelerator(cpu=True)
    history = fit_pairs(
        model, pairs, RECIPE, processor=make_processor(), eval_pairs=pairs, accelerator=accelerator, quiet=True
    )
    if accelerator.is_main_process:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / f"{accelerator.num_processes}.safetensors")
        (folder / f"{accelerator.num_processes}.json").write_text(json.dumps(history.rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
