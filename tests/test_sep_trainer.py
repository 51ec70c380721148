"""`SEPTrainer` trains by the recipe and saves what is shipped; checkpoints of any Trainer are without the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shallow_classifier import BASE, NAMES, TRAIN, VAL, classifier_maker, same, weights
from small_classifier import IMAGES, LABELS, make_classifier, raises, with_prototypes
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from sep_peft import SEPClassifier, SEPTrainer
from sep_peft.training import LabelledImages, Recipe, evaluate, fit
from sep_peft.training.optimizer import trainable
from sep_peft.training.trainer import by_recipe


RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=0.02, calibration_folds=0)


@pytest.fixture(scope="module")
def make():
    return classifier_maker(RECIPE)


def arguments(folder: Path, **options) -> TrainingArguments:
    given = {"save_strategy": "epoch", "eval_strategy": "epoch", "report_to": "none", "use_cpu": True}
    given |= {"dataloader_pin_memory": False, "disable_tqdm": True, "logging_strategy": "steps", "logging_steps": 1}
    return TrainingArguments(str(folder), **(given | options))


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A trainer that has trained, and its folder of checkpoints, one for each epoch of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = SEPTrainer(make(), arguments(folder), train_dataset=TRAIN, eval_dataset=VAL)
    trainer.train()
    return trainer, folder


def test_it_trains_as_fit_does(trained, make):
    trainer, _ = trained
    history = fit(make(), TRAIN, eval_samples=VAL, quiet=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    found = [(4 * a + 2 * b) / 6 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert found == pytest.approx([row["loss"] for row in history], rel=1e-4)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[:3] == [0, 0.01, 0.02] and rates[3] < 0.02  # warm-up of an epoch
    measured = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert measured == pytest.approx([row["val_accuracy"] for row in history])
    classifier = trainer.classifier
    assert not classifier.training and classifier.classes.prototypes is not None
    assert classifier.classes.calibration is not None
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(evaluate(classifier, VAL).accuracy)
    assert trainer.predict(LabelledImages(VAL, NAMES, classifier.processor)).predictions.shape == (10, 2)


def test_a_checkpoint_is_small_and_loads_as_what_is_shipped(trained):
    trainer, folder = trained
    size = sum(p.numel() * p.element_size() for p in trainable(trainer.classifier).values())
    for number, step in ((0, 2), (2, 6)):
        path = folder / f"checkpoint-{step}"
        assert sum(file.stat().st_size for file in path.iterdir()) < 4 * size + 150_000
        assert set(load_file(path / "model.safetensors")) == set(trainable(trainer.classifier))
        loaded = SEPClassifier.from_pretrained(path)
        measured = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
        assert evaluate(loaded, VAL).accuracy == pytest.approx(measured[number])
    assert PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), path).active_adapter == "default"
    assert loaded.class_names == NAMES and loaded.classes.prototype_logit_weight == 5


class Killed(Exception):
    """In the place of a kill."""


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self._step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise Killed


def test_it_goes_on_where_it_was_killed(trained, make, tmp_path):
    killed = SEPTrainer(make(), arguments(tmp_path), train_dataset=TRAIN, eval_dataset=VAL, callbacks=[KillAt(5)])
    with pytest.raises(Killed):
        killed.train()
    resumed = SEPTrainer(make(), arguments(tmp_path), train_dataset=TRAIN, eval_dataset=VAL)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert same(weights(resumed.classifier), weights(trained[0].classifier))
    assert torch.equal(resumed.classifier.classes.prototypes, trained[0].classifier.classes.prototypes)


def test_the_best_weights_are_loaded_at_the_end(make, tmp_path):
    """By a metric that says that the first epoch was the best."""
    found = []

    def worse(prediction) -> dict[str, float]:
        found.append(-len(found))
        return {"luck": found[-1]}

    options = {"load_best_model_at_end": True, "metric_for_best_model": "luck", "greater_is_better": True}
    trainer = SEPTrainer(
        make(), arguments(tmp_path, **options), train_dataset=TRAIN, eval_dataset=VAL, compute_metrics=worse
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = SEPClassifier.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(trainer.classifier.classes.prototypes, best.classes.prototypes)
    assert best.predict(VAL[0][0]) != SEPClassifier.from_pretrained(tmp_path / "checkpoint-6").predict(VAL[0][0])
    loaded = dict(best.model.named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in trainable(trainer.classifier.model).items())


def test_the_recipe_decides_how_to_train(tmp_path):
    given = arguments(tmp_path, num_train_epochs=9, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    args = by_recipe(given, Recipe(epochs=4, batch_size=8, seed=7, weight_decay=0.1))
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 4, 2)
    assert (args.seed, args.data_seed, args.max_grad_norm, args.weight_decay) == (7, 7, 0, 0.1)
    assert given.num_train_epochs == 9
    with raises(
        "A batch of 7 images cannot be shared out evenly among 2 devices and accumulated steps. Pass a recipe with a "
        "multiple of that as its batch_size."
    ):
        by_recipe(given, Recipe(batch_size=7))
    short = SEPTrainer(make_classifier(), arguments(tmp_path, eval_strategy="no"), train_dataset=Plain())
    assert short.args.max_steps == -1 and short.train().global_step == 30
    recipe = Recipe(epochs=2, batch_size=2, max_steps=4)
    short = SEPTrainer(make_classifier(), arguments(tmp_path, eval_strategy="no"), recipe=recipe, train_dataset=Plain())
    assert short.train().global_step == 4 and short.classifier.recipe is recipe


def test_mistakes(make, tmp_path):
    with raises("SEPTrainer trains a SEPClassifier, but got Linear.", TypeError):
        SEPTrainer(torch.nn.Linear(1, 1))
    with raises("The classifier has no classes ant; it has lamp, pizza."):
        SEPTrainer(make(), arguments(tmp_path), train_dataset=[("a.jpg", "ant")])
    with raises(
        "SEPTrainer fits no whitening, but the recipe has whiten=True. Train by fit, or pass a recipe with "
        "whiten=False and call classifier.fit_whitening after training."
    ):
        SEPTrainer(make(), arguments(tmp_path), recipe=Recipe(whiten=True))
    classifier = make()
    with pytest.raises(ValueError, match="eval_dataset"):  # which is Trainer's message
        SEPTrainer(classifier, arguments(tmp_path), recipe=Recipe(epochs=1), train_dataset=TRAIN)
    assert classifier.recipe == RECIPE


# plain Trainer, and states


class Plain(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


def test_a_plain_trainer_saves_what_is_trained(tmp_path, caplog):
    classifier = make_classifier()
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "seed": 0}
    trainer = Trainer(classifier, arguments(tmp_path, **options), train_dataset=Plain())
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) == set(trainable(classifier))
    again = make_classifier()
    Trainer(again, arguments(tmp_path, **options), train_dataset=Plain()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert same(weights(again), weights(classifier))
    assert "missing keys" not in caplog.text


def test_a_state_is_that_of_the_adapter_and_goes_back_into_any_classifier():
    first, second = with_prototypes(None), make_classifier(config={"seed": 9})
    assert not same(weights(first), weights(second))
    state = first.state_dict()
    assert set(state) == set(trainable(first)) and list(state) == [n for n in first.state_dict() if n in state]
    second.load_state_dict(state)  # strict
    assert same(weights(first), weights(second))
    first.model.requires_grad_(False)
    assert set(first.state_dict()) == set(state)  # frozen as it is, it is still what was trained
    whole = torch.nn.ModuleDict({"inner": second})
    assert set(whole.state_dict()) == {f"inner.{name}" for name in state}
    whole.load_state_dict(whole.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({name: value for name, value in state.items() if name != "prototypes"})
