"""Training that ends early loses nothing: checkpoints, signals, kills, and what is gone on with bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from epoch_images import Images
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_classifier import make_classifier, raises
from transformers.models.clip.modeling_clip import CLIPAttention

from sep_peft import SEPClassifier
from sep_peft.method.pairs_recipe import PairsRecipe
from sep_peft.training import History, Limits, Recipe, TrainingInterrupted, train
from sep_peft.training.checkpoint import CHECKPOINT_FILE, ENTRY, history_in, read_entry
from sep_peft.training.optimizer import trainable
from sep_peft.training.signals import Signals


RECIPE = Recipe(epochs=4, batch_size=2, learning_rate=0.01)


class Measured:
    """Gives the accuracies of a list, one after the other, as a validation does."""

    def __init__(self, *accuracies: float, done: int = 0):
        self._accuracies, self.asked = list(accuracies)[done:], 0

    def zero_shot(self) -> float:
        self.asked += 1
        return 10.6

    def measure(self) -> dict[str, float]:
        return {"val_accuracy": self._accuracies.pop(0)}


def make() -> SEPClassifier:
    """With dropout, so that random numbers matter."""
    classifier = make_classifier(prototype_weight=0.5)
    for module in classifier.modules():
        if isinstance(module, CLIPAttention):
            module.dropout = 0.2
    return classifier


def run(classifier: SEPClassifier, path: Path | None = None, recipe: Recipe = RECIPE, **options) -> History:
    return train(classifier, Images(), recipe, checkpoint=path, quiet=True, **options)


def weights(classifier: SEPClassifier) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(classifier).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


class After:
    """A callback that does something after some epochs."""

    def __init__(self, epochs: int, act):
        self._epochs, self._act = epochs, act

    def __call__(self, history: History) -> None:
        if len(history) == self._epochs:
            self._act(history)


class Killed(Exception):
    """In the place of a kill."""


def die(history: History) -> None:
    raise Killed


@pytest.fixture(scope="module")
def unbroken():
    """The history of an unbroken training, and the weights after each epoch; those at the end are the best epoch's."""
    classifier, kept = make(), []
    history = run(
        classifier, validation=Measured(20.0, 50.0, 50.0, 40.0), callbacks=[lambda _: kept.append(weights(classifier))]
    )
    assert same(weights(classifier), kept[2]) and not same(kept[2], kept[3])
    plain = make_classifier(prototype_weight=0.5)
    run(plain)
    assert not same(weights(plain), kept[3])  # dropout is on
    return history, kept


# going on


@pytest.mark.parametrize("epochs", [1, 4])
def test_what_goes_on_is_what_was_not_interrupted_bit_for_bit(epochs, unbroken, tmp_path):
    accuracies, path = (20.0, 50.0, 50.0, 40.0), tmp_path / "new" / CHECKPOINT_FILE
    with pytest.raises(Killed):
        run(make(), path, validation=Measured(*accuracies), callbacks=[After(epochs, die)])
    assert [file.name for file in path.parent.iterdir()] == [CHECKPOINT_FILE]
    told = history_in(path.parent, unfinished=True)
    assert told is None if epochs == 4 else str(told) == f"after {epochs} of 4 epochs"
    resumed, steps, validation = make(), [], Measured(*accuracies, done=epochs)
    resumed.register_forward_hook(lambda *_: steps.append(1))
    history = run(resumed, path, validation=validation)
    assert history == unbroken[0] and len(history.seconds) == 4
    assert len(steps) == 3 * (4 - epochs) and validation.asked == 0  # zero-shot is known
    assert same(weights(resumed), unbroken[1][2])
    last = make()
    run(last, path, validation=Measured(), limits=Limits(keep="last"))  # nothing is left to train
    assert same(weights(last), unbroken[1][3])


def test_a_checkpoint_is_small_and_holds_no_pickle(unbroken, tmp_path):
    classifier = make()
    run(classifier, tmp_path / "file", validation=Measured(1.0, 2.0, 3.0, 4.0))
    trained = sum(p.numel() * p.element_size() for p in trainable(classifier).values())
    assert trained * 4 < (tmp_path / "file").stat().st_size < trained * 4 + 60_000
    names = {name.split("/")[0] for name in load_file(tmp_path / "file")}
    assert names == {"parameters", "best", "optimizer"}
    assert History.from_json(read_entry(tmp_path / "file")["history"]).best == 4


def test_a_checkpoint_of_another_training(tmp_path):
    path = tmp_path / "file"
    run(make(), path, replace(RECIPE, epochs=1), settings={"classes": "a"})
    for recipe, config, settings, differ in (
        (replace(RECIPE, epochs=1, batch_size=3), {}, {"classes": "a"}, "batch_size"),
        (replace(RECIPE, epochs=2), {}, {"classes": "a"}, "epochs"),
        (replace(RECIPE, epochs=1), {}, {"classes": "b"}, "classes"),
        (replace(RECIPE, epochs=1), {"num_text_prompts": 4}, {"classes": "a"}, "parameters"),
    ):
        classifier = make_classifier(config=config, prototype_weight=0.5)
        before = weights(classifier)
        with raises(
            f"{path} is a checkpoint of another training ({differ} differ). Go on as it was begun, or remove the file."
        ):
            run(classifier, path, recipe, settings=settings)
        assert same(weights(classifier), before)


def without(path: Path, *names: str) -> None:
    """Makes a checkpoint one of a training that did not know these settings."""
    tensors, data = load_file(path), read_entry(path)
    for name in names:
        del data["made_for"][name]
    save_file(tensors, path, metadata={ENTRY: json.dumps(data)})


def test_a_training_goes_on_that_was_begun_without_a_setting(unbroken, tmp_path):
    """With the value that does nothing; another value is another training."""
    path = tmp_path / "file"
    with pytest.raises(Killed):
        run(make(), path, callbacks=[After(1, die)])
    without(path, *Recipe.UNKNOWN)
    differ = "agreement_weight, class_sample"
    with raises(
        f"{path} is a checkpoint of another training ({differ} differ). Go on as it was begun, or remove the file."
    ):
        run(make(), path, replace(RECIPE, agreement_weight=1.0))
    resumed = make()
    unknown = {"class_sample": None}  # which draws none of two classes
    run(resumed, path, replace(RECIPE, zero_shot_margin=3.0, calibration_folds=0), unknown=unknown)
    assert same(weights(resumed), unbroken[1][3])


#: What the first checkpoints named of each recipe.
NAMED = {
    Recipe: "epochs batch_size learning_rate prototype_learning_rate adam_epsilon weight_decay warmup_epochs max_steps "
    "smallest_crop views text_weight vision_weight prototype_weight prototype_logit_weight seed",
    PairsRecipe: "epochs batch_size learning_rate adam_epsilon weight_decay warmup_epochs max_steps smallest_crop "
    "mirror text_weight vision_weight loss seed",
}


@pytest.mark.parametrize("recipe", [Recipe, PairsRecipe])
def test_each_setting_that_was_added_says_what_a_training_without_it_did(recipe):
    assert set(recipe().of_steps) == {*NAMED[recipe].split(), *recipe.UNKNOWN}
    own = {field.name: field.default for field in fields(recipe)}
    neutral = {name: value for name, value in recipe.UNKNOWN.items() if name != "class_sample"}
    assert all(own[name] == value for name, value in neutral.items())  # so that defaults go on


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage(change):
    """Rewrites a checkpoint after `change(tensors, data)`."""

    def damage(path: Path) -> None:
        tensors, data = load_file(path), read_entry(path)
        change(tensors, data)
        save_file(tensors, path, metadata={ENTRY: json.dumps(data)})

    return damage


def without_entry(path: Path) -> None:
    save_file(load_file(path), path)


def no_state(tensors, data):
    name = next(name for name in tensors if name.startswith("optimizer/0/exp_avg"))
    tensors[name] = torch.zeros(3)


def not_a_number(tensors, data):
    next(value for name, value in tensors.items() if name.startswith("parameters/")).fill_(torch.nan)


DAMAGES = {
    "cut short": (cut, SafetensorError, "cut short or no safetensors file"),
    "nothing said": (without_entry, ValueError, "or damaged (it says nothing of a training). Remove it to begin anew."),
    "newer": (damage(lambda t, d: d.update(format_version=9)), ValueError, "has format version 9, but this version of"),
    "no history": (damage(lambda t, d: d.pop("history")), ValueError, "or damaged ('history'). Remove it"),
    "epochs": (damage(lambda t, d: d["history"]["rows"][0].update(epoch=7)), ValueError, "epoch 1 of its history is"),
    "text": (damage(lambda t, d: d["history"]["rows"][0].update(lr="x")), ValueError, "something else than numbers"),
    "groups": (damage(lambda t, d: d["groups"].pop()), ValueError, "its optimizer has other groups"),
    "schedule": (damage(lambda t, d: d["parts"]["schedule"].update(step=1)), ValueError, "its schedule has other"),
    "shape": (damage(no_state), ValueError, "has another shape than the parameter it belongs to"),
    "not finite": (damage(not_a_number), ValueError, "holds numbers that are not finite or larger than"),
}


@pytest.mark.parametrize(("change", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_refused_before_anything_changes(change, error, message, tmp_path):
    path, recipe = tmp_path / CHECKPOINT_FILE, replace(RECIPE, epochs=1)
    run(make(), path, recipe)
    change(path)
    classifier = make()
    before = weights(classifier)
    with pytest.raises(error) as found:
        run(classifier, path, recipe)
    assert message in str(found.value) and str(path) in str(found.value)
    assert same(weights(classifier), before)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(unbroken, tmp_path):
    (tmp_path / "file").write_text("mine")
    classifier = make()
    with pytest.warns(UserWarning, match=r"^No checkpoint could be written after [1-4] of 4 epochs \("):
        history = run(classifier, tmp_path / "file" / CHECKPOINT_FILE)
    assert len(history) == 4 and same(weights(classifier), unbroken[1][3])


# signals and kills


def interrupt(number: int, at: int):
    """A hook that sends this process a signal in the `at`-th step."""
    steps: list[int] = []

    def hook(*_):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), number)

    return hook


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_training_with_what_the_epochs_left(number, name, unbroken, tmp_path):
    before, path = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], tmp_path / "file"
    classifier = make()
    classifier.register_forward_hook(interrupt(number, at=8))  # the second step of the third epoch
    with raises(f"stopped by {name} after 2 of 4 epochs", TrainingInterrupted) as stop:
        run(classifier, path)
    assert (len(stop.value.history), stop.value.history.stopped) == (2, name)
    assert same(weights(classifier), unbroken[1][1])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = make()
    assert run(resumed, path).stopped is None
    assert same(weights(resumed), unbroken[1][3])


def test_a_signal_in_the_first_epoch(tmp_path):
    classifier = make()
    before = weights(classifier)
    classifier.register_forward_hook(interrupt(signal.SIGTERM, at=2))
    with raises("stopped by SIGTERM after 0 of 4 epochs", TrainingInterrupted):
        run(classifier, tmp_path / "file")
    assert same(weights(classifier), before) and not (tmp_path / "file").exists()


def test_a_signal_waits_for_what_belongs_together_but_not_twice():
    done = []
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt), signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("held")
        with pytest.raises(KeyboardInterrupt), signals.held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("not reached")
    assert (done, signals.received) == (["held"], "SIGTERM")


def test_signals_that_are_ignored_stay_so_and_other_threads_change_nothing():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def look() -> None:
        with Signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_killed_process_loses_one_epoch_at_most(unbroken, tmp_path):
    """SIGKILL at several moments; what a fork of this process left is gone on with here."""
    path, fork = tmp_path / CHECKPOINT_FILE, multiprocessing.get_context("fork")
    process = fork.Process(target=run, args=(make(), path), kwargs={"callbacks": [lambda _: time.sleep(0.2)]})
    process.start()
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.25)  # in or after the second epoch
    process.kill()
    process.join()
    done = len(history_in(tmp_path))
    assert 1 <= done < 4
    resumed = make()
    steps = []
    resumed.register_forward_hook(lambda *_: steps.append(1))
    run(resumed, path)
    assert len(steps) == 3 * (4 - done) and same(weights(resumed), unbroken[1][3])
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT_FILE]


# ending early


def test_patience(unbroken, tmp_path):
    """Ends after two epochs without progress, and is not gone on with."""
    classifier, recipe = make(), replace(RECIPE, epochs=9)
    options = {"limits": Limits(patience=2)}
    history = run(classifier, tmp_path / "file", recipe, validation=Measured(30.0, 20.0, 30.0), **options)
    assert (len(history), history.stopped, history.best, history.without_progress) == (3, "patience", 3, 2)
    again = run(make(), tmp_path / "file", recipe, validation=Measured(), **options)
    assert again.rows == history.rows
    further = run(
        make(), tmp_path / "file", recipe, validation=Measured(40.0, 20.0, 20.0, 20.0), limits=Limits(patience=3)
    )
    assert (len(further), further.stopped, further.best) == (7, "patience", 4)


def test_time_ends_before_an_epoch_that_would_take_too_long(unbroken):
    classifier = make()
    history = run(classifier, limits=Limits(seconds=1e-9))  # the first epoch always ends
    assert (len(history), history.stopped, str(history)) == (1, "time", "after 1 of 4 epochs")
    assert same(weights(classifier), unbroken[1][0])
    assert run(make(), limits=Limits(seconds=1e9)).stopped is None


def test_a_callback_sees_every_epoch_and_ends_the_training(unbroken):
    seen, classifier = [], make()
    history = run(classifier, callbacks=[lambda h: seen.append(h[-1]["epoch"]), After(2, lambda h: h.stop("enough"))])
    assert (seen, history.stopped, len(history)) == ([1, 2], "enough", 2)
    assert same(weights(classifier), unbroken[1][1])


def test_a_loss_that_is_not_finite_ends_the_training_before_it_spoils_anything(unbroken, tmp_path):
    classifier, path = make(), tmp_path / "file"

    def spoil(history: History) -> None:
        next(iter(trainable(classifier).values())).data.fill_(torch.nan)

    with raises(
        "The loss is nan in epoch 3. Train with a lower learning rate; what the epochs before it left is kept."
    ):
        run(classifier, path, callbacks=[After(2, spoil)])
    assert same(weights(classifier), unbroken[1][1])
    assert str(unfinished_of(path)) == "after 2 of 4 epochs"


def unfinished_of(path: Path) -> History:
    return History.from_json(read_entry(path)["history"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "max_seconds must be None or a finite number above 0, but got 0."),
        ({"seconds": "10m"}, "max_seconds must be None or a finite number above 0, but got '10m'."),
        ({"patience": 0}, "patience must be None or an integer of at least 1, but got 0."),
        ({"patience": True}, "patience must be None or an integer of at least 1, but got True."),
        ({"keep": "first"}, 'keep must be "best" or "last", but got \'first\'.'),
    ],
)
def test_limits_that_are_not_allowed(options, message):
    with raises(message):
        Limits(**options)


# what is shown


def test_a_line_for_every_epoch(capsys):
    train(make(), Images(), replace(RECIPE, epochs=2), validation=Measured(36.123, 40.0))
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "%|" not in line]
    shown = [line.strip() for line in lines if line.strip()]
    assert len(shown) == 2, shown
    first, second = (line.split(" loss ")[1].split(" ", 1) for line in shown)
    assert shown[0].startswith("epoch 1/2 loss ") and shown[1].startswith("epoch 2/2 loss ")
    assert (first[1], second[1]) == ("val 36.1 % (zero-shot 10.6)", "val 40.0 % (zero-shot 10.6)")
    train(make(), Images(), replace(RECIPE, epochs=1))
    assert " train " in capsys.readouterr().err


def test_nothing_is_shown_when_quiet(capsys):
    run(make(), validation=Measured(1.0, 2.0, 3.0, 4.0))
    assert capsys.readouterr() == ("", "")
