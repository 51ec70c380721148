"""Steps of transformers' Trainer, mostly one, over 16 images, cut into micro-batches and shared out among processes.

`python -m torch.distributed.run --nproc_per_node 2 tests/batching.py '[[4, 2, "plain"]]' RESULT.json` takes it in two
processes, for each batch size, number of micro-batches and way of `WAYS`.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from peft import get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.training import Recipe


COUNT = 16
IMAGES = make_images(COUNT)
LABELS = torch.arange(COUNT) * 7 % 4


class SixteenImages(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


#: What may be said of the processes, and done before, without a change of the result.
WAYS = {
    "plain": {},
    "evaluated before": {},
    "options of DDP": {
        "average_tokens_across_devices": False,
        "ddp_backend": "gloo",
        "ddp_broadcast_buffers": False,
        "ddp_bucket_cap_mb": 1,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 60,
    },
    # several steps, so that the class texts that are not drawn are of other ages
    "sampled": {"max_steps": 3, "learning_rate": 0.02, "adam_epsilon": 1e-3},
    "checkpointed": {"ddp_static_graph": True, "gradient_checkpointing": True},
}


#: What is evaluated afterwards are the weights of before.
ONE_STEP = {"max_steps": 1, "learning_rate": 0.0}


class Gradients(TrainerCallback):
    """Keeps the gradients of the step, one vector, as the optimizer is given them."""

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs):
        self.vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def make_classifier(way: str = "plain") -> SEPClassifier:
    torch.manual_seed(3)
    model = get_peft_model(make_clip(), SEPConfig(num_text_prompts=3, num_vision_prompts=2))
    perturb(model)
    recipe = Recipe(class_sample=1 if way == "sampled" else 0)
    return SEPClassifier(model, make_texts([5, 3, 7, 4]), make_texts([9, 7, 11, 8], seed=5), recipe=recipe)


def step(batch_size: int, accumulation: int, way: str = "plain", classifier: nn.Module | None = None) -> dict:
    """What Trainer logs of the last step, its gradients, and the loss that it finds in evaluation."""
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **ONE_STEP | WAYS[way],
        )
        data = SixteenImages()
        trainer = Trainer(
            classifier or make_classifier(way), arguments, train_dataset=data, eval_dataset=data, callbacks=[gradients]
        )
        if way == "evaluated before":
            trainer.evaluate()
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "loss": logged["loss"],
        "norm": float(logged["grad_norm"]),
        "gradients": gradients.vector.tolist(),
        "eval_loss": evaluated,
        "processes": trainer.args.world_size,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "wrapped": type(trainer.model_wrapped).__name__,
        "first": trainer.args.process_index == 0,
    }


if __name__ == "__main__":
    found = [step(*options) for options in json.loads(sys.argv[1])]
    if found[0]["first"]:
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(found, file)
