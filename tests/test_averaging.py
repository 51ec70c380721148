"""Weights averaged over epochs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_classifier import IMAGES, LABELS, make_classifier, raises

from sep_peft import SEPClassifier, SEPTrainer
from sep_peft.training import Limits, Recipe, TrainingInterrupted, train
from sep_peft.training.averaging import averaged, share_of_epoch
from sep_peft.training.data import EpochDataset
from sep_peft.training.optimizer import trainable


AVERAGING = Recipe(epochs=5, batch_size=2, learning_rate=0.01, average_center=0.6, average_width=0.2)


class Images(EpochDataset):
    """Five images that differ from epoch to epoch."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index] + 0.1 * self.epoch, "labels": LABELS[index]}


def make() -> SEPClassifier:
    return make_classifier(prototype_weight=0.5)


def gaussian(epoch: int) -> float:
    return math.exp(-((epoch - 0.6 * 5) ** 2) / (2 * (0.2 * 5) ** 2))


class Watched:
    """A validation that keeps what it measures; the accuracies are those of a list."""

    def __init__(self, classifier, *accuracies: float):
        self.classifier, self.accuracies, self.seen = classifier, list(accuracies), []

    def zero_shot(self) -> None:
        return None

    def measure(self) -> dict[str, float]:
        self.seen.append(values(self.classifier))
        return {"val_accuracy": self.accuracies.pop(0)}


def values(classifier) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(classifier).items()}


def close(found, expected) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def equal(found, expected) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def epochs() -> list[dict[str, torch.Tensor]]:
    """The weights after each epoch of the same training without an average."""
    classifier = make()
    watched = Watched(classifier, *range(5))
    train(classifier, Images(), replace(AVERAGING, average_center=None), validation=watched, quiet=True)
    return watched.seen


def mean(epochs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    weights = [gaussian(number) for number in range(1, len(epochs) + 1)]
    return {
        name: sum(w * epoch[name] for w, epoch in zip(weights, epochs, strict=True)) / sum(weights)
        for name in epochs[0]
    }


def test_it_is_the_gaussian_mean_of_all_epochs(epochs):
    classifier = make()
    history = train(classifier, Images(), AVERAGING, quiet=True)
    close(values(classifier), mean(epochs))
    assert not equal(values(classifier), epochs[-1]) and len(history) == 5


def test_what_would_be_shipped_is_measured_and_training_goes_on_without_it(epochs):
    """The best epoch leaves the average up to it."""
    classifier = make()
    watched = Watched(classifier, 1.0, 2.0, 9.0, 3.0, 4.0)
    train(classifier, Images(), AVERAGING, validation=watched, quiet=True)
    for count, seen in enumerate(watched.seen, 1):
        close(seen, mean(epochs[:count]))
    assert equal(values(classifier), watched.seen[2])
    last = make()
    train(last, Images(), AVERAGING, validation=Watched(last, *range(5)), limits=Limits(keep="last"), quiet=True)
    close(values(last), mean(epochs))


def test_it_goes_on_bit_for_bit(tmp_path):
    whole, halted = make(), make()
    train(whole, Images(), AVERAGING, quiet=True)
    stop = [lambda history: history.stop("enough") if len(history) == 3 else None]
    train(halted, Images(), AVERAGING, checkpoint=tmp_path / "file", callbacks=stop, quiet=True)
    again = make()
    train(again, Images(), AVERAGING, checkpoint=tmp_path / "file", quiet=True)
    assert equal(values(again), values(whole)) and not equal(values(halted), values(whole))


def test_measuring_the_average_leaves_drawn_class_texts_alone(tmp_path):
    """A training that goes on draws what an unbroken one does, with the same last embeddings of the other classes."""
    recipe = replace(AVERAGING, epochs=2, class_sample=1)
    whole, halted, again = (make_classifier(recipe=recipe) for _ in range(3))
    measured = {"validation": Watched(whole, 1.0, 2.0)}
    train(whole, Images(), recipe, **measured, quiet=True)
    measured = {"validation": Watched(halted, 1.0), "checkpoint": tmp_path / "file"}
    stop = [lambda history: history.stop("enough") if len(history) == 1 else None]
    train(halted, Images(), recipe, callbacks=stop, **measured, quiet=True)
    measured = {"validation": Watched(again, 2.0), "checkpoint": tmp_path / "file"}
    train(again, Images(), recipe, **measured, quiet=True)
    assert equal(values(again), values(whole)) and int(whole.steps_state()["steps"]) == 6  # a draw for each step


def test_an_interruption_leaves_the_average_so_far(epochs):
    def interrupt(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    classifier = make()
    with pytest.raises(TrainingInterrupted):
        train(classifier, Images(), AVERAGING, callbacks=[interrupt], quiet=True)
    close(values(classifier), mean(epochs[:2]))


def test_weights_that_are_too_small_for_a_float():
    """Of epochs far before the center each counts more than all before it."""
    recipe = Recipe(average_center=1.0, average_width=0.001)
    shares = [share_of_epoch(epoch, 30, recipe) for epoch in range(1, 31)]
    assert shares[0] == 1.0 and all(0.99 < share <= 1.0 for share in shares)
    wide = replace(recipe, average_width=1e9)
    assert [share_of_epoch(epoch, 4, wide) for epoch in (1, 2, 4)] == pytest.approx([1, 1 / 2, 1 / 4])
    values = {"a": torch.tensor([3.0])}
    assert averaged({"a": torch.tensor([1.0])}, values, 0.25)["a"] == 1.5
    first = averaged(None, values, 1.0)
    assert torch.equal(first["a"], values["a"]) and first["a"] is not values["a"]


def test_trainer_does_not_average():
    message = (
        "SEPTrainer averages no weights over epochs, but the recipe has average_center=0.6. Train by fit, or pass a "
        "recipe with average_center=None."
    )
    with raises(message):
        SEPTrainer(make(), recipe=AVERAGING)
