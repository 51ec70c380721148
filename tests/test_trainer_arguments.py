"""Every argument of transformers' Trainer does for a `SEPClassifier` what it does for any model, or has no meaning."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard
from packaging.version import Version
from small_classifier import IMAGES, LABELS, logits_of, make_classifier, raises
from small_clip import make_clip
from transformers import Trainer, TrainerCallback, TrainingArguments

from sep_peft import SEPClassifier
from sep_peft.tuner.model import find_towers


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


#: Two plain steps over three and two images; what each run below changes.
BASE = {
    "max_steps": 2,
    "per_device_train_batch_size": 3,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Arguments for a training, and what is to be seen of it.

    Args:
        arguments: of `TrainingArguments`, beside or in the place of `BASE`.
        trained: "same" parameters as with `BASE`, up to rounding; "near" ones; or "other" ones.
        check: what else there is to see, of the trainer and its metrics.
        trainer: further arguments of the Trainer.
        classifier: makes the classifier.
    """

    arguments: dict[str, Any]
    trained: str = "same"
    check: Callable[[Trainer, dict], None] = lambda trainer, metrics: None
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    classifier: Callable[[], SEPClassifier] = make_classifier


def train(folder: Path, run: Run) -> tuple[Trainer, dict]:
    arguments = TrainingArguments(output_dir=str(folder), **BASE | run.arguments)
    trainer = Trainer(run.classifier(), arguments, train_dataset=Images(), eval_dataset=Images(), **run.trainer)
    trainer.train()
    return trainer, trainer.evaluate()


def vector(classifier: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in classifier.parameters() if p.requires_grad])


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """As they were: `full_determinism` and `log_level` change them for all that follows."""
    environment, level = dict(os.environ), transformers.logging.get_verbosity()
    yield
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity(level)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> torch.Tensor:
    return vector(train(tmp_path_factory.mktemp("plain"), Run({}))[0].model)


# what is to be seen


class Steps(TrainerCallback):
    """Counts what Trainer does."""

    counts: ClassVar[dict[str, int]] = {}

    def on_train_begin(self, *args, **kwargs):
        Steps.counts = dict.fromkeys(("log", "evaluate", "save"), 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        Steps.counts["log"] += "loss" in logs

    def on_evaluate(self, *args, **kwargs):
        Steps.counts["evaluate"] += 1

    def on_save(self, *args, **kwargs):
        Steps.counts["save"] += 1


def logits_are_those_of_the_classifier(trainer: Trainer, metrics: dict) -> None:
    expected = logits_of(trainer.model).numpy()
    assert trainer.predict(Images()).predictions == pytest.approx(expected, rel=1e-4, abs=1e-5)


def of_batches(prediction, compute_result: bool) -> dict:
    """Metrics that are given a batch at a time."""
    assert prediction.inputs["pixel_values"].shape[1:] == IMAGES.shape[1:]
    return {"last_losses": len(prediction.losses)} if compute_result else {}


def of_all(prediction) -> dict:
    return {"inputs": prediction.inputs.shape, "losses": prediction.losses.shape}


def evaluated_and_logged(trainer: Trainer, metrics: dict) -> None:
    assert Steps.counts == {"log": 2, "evaluate": 4, "save": 0}  # on start, after each step, and afterwards
    assert metrics["eval_last_losses"] == 2
    assert trainer.state.num_input_tokens_seen == IMAGES.numel()


def inputs_and_losses(trainer: Trainer, metrics: dict) -> None:
    assert metrics["eval_inputs"] == tuple(IMAGES.shape)
    assert metrics["eval_losses"] == (len(IMAGES),)


def parts_of_two(trainer: Trainer, metrics: dict) -> None:
    assert [len(part) for part in metrics["eval_parts"]] == [2, 2, 1]


def loss_is_right(trainer: Trainer, metrics: dict) -> None:
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits_of(trainer.model), LABELS).item(), rel=1e-4)


def best_is_loaded(trainer: Trainer, metrics: dict) -> None:
    """The first step's weights are the worse ones, so they are the best where more is better."""
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1] and trainer.state.best_global_step == 1
    assert metrics["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert Steps.counts["save"] == 2
    kept = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2"]  # the best and the last
    assert not list(Path(trainer.args.output_dir).rglob("optimizer.*"))


def is_checkpointed(trainer: Trainer, metrics: dict) -> None:
    layers = find_towers(trainer.model)["vision"].base_layer.encoder.layers
    assert layers[0].gradient_checkpointing


def smoothed(trainer: Trainer, metrics: dict) -> None:
    """Smoothed cross entropy of the logits alone, so the prototypes stay where they were."""
    expected = F.cross_entropy(logits_of(trainer.model), LABELS, label_smoothing=0.3).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert torch.equal(trainer.model.prototypes, make_classifier().prototypes)


def optimizer_is_as_told(trainer: Trainer, metrics: dict) -> None:
    (decayed, others) = trainer.optimizer.param_groups
    assert {key: decayed[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.0,  # after half of a cosine
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.1,
    }
    assert others["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        [p for p in trainer.model.parameters() if p.requires_grad]
    )
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 2 and all(norm > 0.05 for norm in norms)  # which were clipped
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.01, 0.005])


def epochs_of_two(trainer: Trainer, metrics: dict) -> None:
    assert trainer.state.global_step == 2  # an epoch of 5 images has one batch of 4, the rest is left out


def computes_in(dtype: torch.dtype) -> Callable[[Trainer, dict], None]:
    def check(trainer: Trainer, metrics: dict) -> None:
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}
        assert metrics["eval_loss"] == pytest.approx(
            F.cross_entropy(logits_of(trainer.model.float()), LABELS).item(), rel=0.02
        )

    return check


def no_noise_in_evaluation(trainer: Trainer, metrics: dict) -> None:
    assert not trainer.model.get_input_embeddings()._forward_hooks
    logits_are_those_of_the_classifier(trainer, metrics)


def shallow() -> SEPClassifier:
    return make_classifier(config={"clip": make_clip("sdpa", 1, 1), "fusion": "none", "num_text_prompts": 0})


RUNS = {
    "loading": Run(
        {
            "dataloader_num_workers": 1,
            "dataloader_prefetch_factor": 1,
            "dataloader_persistent_workers": True,
            "dataloader_multiprocessing_context": "fork",
            "dataloader_in_order": False,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "accelerator_config": {"non_blocking": True},
            "auto_find_batch_size": True,
            "torch_empty_cache_steps": 1,
            "skip_memory_metrics": False,
            "use_cache": True,
        },
        check=logits_are_those_of_the_classifier,
    ),
    "accumulating": Run({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
    "evaluating and logging": Run(
        {
            "logging_strategy": "epoch",
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "log_on_each_node": False,
            "log_level": "error",
            "log_level_replica": "error",
            "run_name": "run",
            "include_num_input_tokens_seen": "all",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_delay": 0.5,
            "eval_on_start": True,
            "eval_accumulation_steps": 1,
            "eval_use_gather_object": True,
            "per_device_eval_batch_size": 3,
            "batch_eval_metrics": True,
            "include_for_metrics": ["inputs", "loss"],
        },
        check=evaluated_and_logged,
        trainer={"compute_metrics": of_batches},
    ),
    "metrics of all": Run(
        {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2},
        check=inputs_and_losses,
        trainer={"compute_metrics": of_all},
    ),
    "batches apart": Run(
        {"eval_do_concat_batches": False, "per_device_eval_batch_size": 2, "include_for_metrics": ["inputs"]},
        check=parts_of_two,
        trainer={"compute_metrics": lambda prediction: {"parts": prediction.inputs}},
    ),
    "loss alone": Run(
        {"prediction_loss_only": True},
        check=lambda trainer, metrics: (
            F.cross_entropy(logits_of(trainer.model), LABELS).item() == pytest.approx(metrics["eval_loss"], rel=1e-4)
        ),
    ),
    "saving": Run(
        {
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "save_only_model": True,
            "save_on_each_node": True,
            "enable_jit_checkpoint": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
        "other",
        best_is_loaded,
    ),
    "checkpointing": Run(
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        check=is_checkpointed,
    ),
    "every second layer": Run(
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        check=is_checkpointed,
    ),
    "checkpointing by its older name": Run(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        check=is_checkpointed,
    ),
    "label smoothing": Run({"label_smoothing_factor": 0.3}, "other", smoothed),
    "noise": Run({"neftune_noise_alpha": 5.0}, "other", no_noise_in_evaluation),
    "optimizer": Run(
        {
            "learning_rate": 0.01,
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-6,
            "max_grad_norm": 0.01,
            "lr_scheduler_type": "cosine",
            "lr_scheduler_kwargs": {"num_cycles": 0.5},
            "warmup_steps": 0.0,
            "logging_steps": 1,
        },
        "other",
        optimizer_is_as_told,
    ),
    "order": Run({"train_sampling_strategy": "sequential"}, "other", logits_are_those_of_the_classifier),
    "other order": Run({"data_seed": 3}, "other"),
    "epochs": Run(
        {
            "max_steps": -1,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "dataloader_drop_last": True,
            "full_determinism": True,
        },
        "other",
        epochs_of_two,
    ),
    "bf16": Run({"bf16": True}, "near"),
    "evaluation in bf16": Run({"bf16_full_eval": True}, "near", computes_in(torch.bfloat16)),
    "evaluation in fp16": Run({"fp16_full_eval": True}, "near", computes_in(torch.float16)),
    "debugging": Run(
        {"debug": "underflow_overflow"},
        classifier=lambda: make_classifier(config={"clip": make_clip("eager")}),
    ),
    "compiled": Run({"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}, classifier=shallow),
}


#: What other tests give arguments to, and the file.
ELSEWHERE = {
    "average_tokens_across_devices": "batching.py",
    "ddp_backend": "batching.py",
    "ddp_broadcast_buffers": "batching.py",
    "ddp_bucket_cap_mb": "batching.py",
    "ddp_find_unused_parameters": "batching.py",
    "ddp_static_graph": "batching.py",
    "ddp_timeout": "batching.py",
    "hub_always_push": "test_hub.py",
    "hub_model_id": "test_hub.py",
    "hub_private_repo": "test_hub.py",
    "hub_revision": "test_hub.py",
    "hub_strategy": "test_hub.py",
    "hub_token": "test_hub.py",
    "push_to_hub": "test_hub.py",
}

#: What `train` and `test_resumed` give.
BESIDE_RUNS = {"ignore_data_skip", "output_dir", "restore_callback_states_from_checkpoint"}

#: What no test here gives a value to, and why.
WITHOUT_MEANING = {
    "deepspeed": "another package, for many GPUs",
    "do_eval": "read by scripts of transformers, not by Trainer",
    "do_predict": "read by scripts of transformers, not by Trainer",
    "do_train": "read by scripts of transformers, not by Trainer",
    "fp16": "a GPU's mixed precision: on a CPU Trainer trains in fp32",
    "fsdp": "shards what is large, and a SEP adapter is small; needs GPUs",
    "fsdp_config": "of fsdp",
    "length_column_name": "images have no lengths to be grouped by",
    "liger_kernel_config": "of use_liger_kernel",
    "local_rank": "set by launchers",
    "optim_args": "of optimizers of other packages",
    "optim_target_modules": "of optimizers for the weights of the base model, which are frozen",
    "parallelism_config": "splits what is large over many GPUs",
    "project": "of a service that logs are sent to",
    "report_to": "services that logs are sent to; they read `config`, as `test_what_trainer_asks_of_a_model` does",
    "resume_from_checkpoint": "read by scripts of transformers; Trainer.train takes it, see `test_resumed`",
    "tf32": "of Nvidia's GPUs",
    "torch_compile_mode": "of the compiler inductor, which the tests do without: it needs a C++ compiler",
    "trackio_bucket_id": "of a service that logs are sent to",
    "trackio_space_id": "of a service that logs are sent to",
    "trackio_static_space_id": "of a service that logs are sent to",
    "use_liger_kernel": "kernels for text decoders, which no model with an image tower has here",
}


def test_every_argument_is_looked_at():
    """A new argument of Trainer belongs into a run, or into one of the two tables."""
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    in_runs = {name for run in RUNS.values() for name in run.arguments} | set(BASE)
    tested = [*in_runs, *BESIDE_RUNS, *ELSEWHERE]
    assert len(set(tested) | set(WITHOUT_MEANING)) == len([*tested, *WITHOUT_MEANING])
    assert not set(fields) - {*tested, *WITHOUT_MEANING}
    if Version(transformers.__version__) >= Version("5.23"):  # older ones have not all of them
        assert not {*tested, *WITHOUT_MEANING} - set(fields)
    for name, file in ELSEWHERE.items():
        text = Path(__file__).with_name(file).read_text()
        assert f"{name}=" in text or f'"{name}":' in text, name
    for name in (in_runs - {"seed"}) & set(fields):  # given a value that it does not have anyway
        assert any(fields[name].default != run.arguments.get(name, BASE.get(name)) for run in RUNS.values()), name


@pytest.mark.parametrize("name", RUNS)
def test_run(name, plain, tmp_path):
    run = RUNS[name]
    if missing := set(run.arguments) - {field.name for field in dataclasses.fields(TrainingArguments)}:
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(sorted(missing))}")
    trainer, metrics = train(tmp_path, dataclasses.replace(run, trainer=run.trainer | {"callbacks": [Steps()]}))
    if run.classifier is not make_classifier or run.arguments.get("max_steps", 2) == 1:
        alone = {key: value for key, value in run.arguments.items() if key in ("max_steps",)}
        plain = vector(train(tmp_path, dataclasses.replace(run, arguments=alone))[0].model)
    run.check(trainer, metrics)
    difference = (vector(trainer.model) - plain).abs().max()
    low, high = {"same": (0, 1e-5), "near": (1e-6, 0.02), "other": (1e-3, 10)}[run.trained]
    assert low <= difference <= high


def test_resumed(plain, tmp_path):
    """After the first of two steps: parameters are those of two steps, unless the first images are to come again."""
    save = {"save_strategy": "steps", "save_steps": 1}
    found = []
    for again in ({}, {"ignore_data_skip": True}):
        folder = tmp_path / str(len(found))
        train(folder, Run({"max_steps": 1, **save}))
        callbacks = {"restore_callback_states_from_checkpoint": True}
        arguments = TrainingArguments(output_dir=str(folder), **BASE | save | again | callbacks)
        trainer = Trainer(make_classifier(), arguments, train_dataset=Images())
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2
        found.append(vector(trainer.model))
    torch.testing.assert_close(found[0], plain, rtol=0, atol=1e-6)
    assert (found[1] - plain).abs().max() > 1e-3


# what Trainer asks beside the forward


def test_what_trainer_asks_of_a_model():
    classifier = make_classifier()
    base = classifier.model.get_base_model()
    assert classifier.config is base.config  # what services for logs are sent
    assert classifier.get_input_embeddings() is base.text_model.base_layer.get_input_embeddings()
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"  # the older name
    for way, expected in (("disable", False), ("enable", True), ("disable", False)):
        getattr(classifier, f"{kind}_checkpointing_{way}")()
        assert getattr(classifier, f"is_{kind}_checkpointing") is expected
        assert getattr(base, f"is_{kind}_checkpointing") is expected
    assert not hasattr(classifier, "hf_device_map")  # nothing is said of a model that lies on one device
    with raises("'SEPClassifier' object has no attribute 'num_parameters'", AttributeError):
        classifier.num_parameters()


def test_a_model_on_many_devices_is_left_there(tmp_path):
    classifier = make_classifier()
    classifier.model.get_base_model().hf_device_map = {"text_model": "cuda:0", "vision_model": "cuda:1"}
    trainer = Trainer(classifier, TrainingArguments(output_dir=str(tmp_path), **BASE))
    assert trainer.is_model_parallel and not trainer.place_model_on_device


def test_training_without_labels_says_what_is_left_out(caplog):
    classifier = make_classifier()
    with caplog.at_level(logging.WARNING, "sep_peft"):
        classifier(IMAGES, LABELS)
        with torch.no_grad():
            classifier(IMAGES)
        classifier.eval()(IMAGES)
        assert caplog.messages == []
        classifier.train()(IMAGES)
        classifier(IMAGES)
    assert caplog.messages == [
        "The classifier trains without labels, so SEP's objective is not computed: neither the consistency with the "
        "frozen model nor the prototypes are trained. Trainer's label_smoothing_factor and compute_loss_func keep the "
        "labels back and take the logits alone."
    ]


def test_model_card(tmp_path):
    """Trainer's draft, and in a folder with a saved classifier our card around it."""
    trainer, _ = train(tmp_path, Run({}))
    trainer.create_model_card(tags="mine")
    draft = ModelCard.load(tmp_path / "README.md")
    assert draft.data.tags == ["mine", "generated_from_trainer"]
    trainer.model.save_pretrained(tmp_path)
    trainer.create_model_card(model_name="my crabs")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert set(card.data.tags) >= {"sep", "generated_from_trainer"}
    for text in ("class 0", "# my crabs", "Training hyperparameters"):
        assert text in card.text, text
