"""`fit` with images to validate on and a folder to go on from."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from shallow_classifier import NAMES, TRAIN, VAL, classifier_maker, same, weights
from small_classifier import contents, raises

from sep_peft.training import Recipe, TrainingInterrupted, evaluate, fit
from sep_peft.training.checkpoint import CHECKPOINT_FILE
from sep_peft.training.shipping import as_shipped
from sep_peft.tuner import disk
from sep_peft.tuner.disk import DiskFullError


RECIPE = Recipe(epochs=3, batch_size=3, learning_rate=0.02, calibration_folds=0)

UNCALIBRATED = (
    "; there is no calibration, which comes after the last epoch. Call fit(..., resume=True) with a classifier that is "
    "made anew, or sep_peft.training.calibrate(classifier, images)."
)


@pytest.fixture(scope="module")
def make():
    return classifier_maker(RECIPE)


def test_what_is_measured_in_an_epoch_is_what_would_be_shipped_then(make):
    """Each epoch's accuracy is that of a classifier whose training ends with the epoch, prototypes included."""
    classifier, found = make(), []

    def look(history) -> None:
        assert classifier.training and classifier.trained is None and classifier.classes.prototypes is None
        with as_shipped(classifier):
            assert classifier.classes.prototypes is not None and not classifier.training
            found.append(evaluate(classifier, VAL).accuracy)

    history = fit(classifier, TRAIN, eval_samples=VAL, callbacks=[look], quiet=True)
    assert [row["val_accuracy"] for row in history] == found
    assert evaluate(classifier, VAL).accuracy == max(found)
    plain = make()
    assert [row["loss"] for row in fit(plain, TRAIN, quiet=True)] == [row["loss"] for row in history]
    zero_shot = make()
    with zero_shot.model.disable_adapter():
        assert evaluate(zero_shot, VAL).accuracy == history.zero_shot


def test_fit_goes_on_in_its_folder(make, tmp_path):
    whole = make()
    expected = fit(whole, TRAIN, eval_samples=VAL, quiet=True)

    def interrupt(history) -> None:
        if len(history) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped, folder = make(), tmp_path / "run"
    with raises(f"stopped by SIGTERM after 2 of 3 epochs{UNCALIBRATED}", TrainingInterrupted):
        fit(stopped, TRAIN, eval_samples=VAL, folder=folder, callbacks=[interrupt], quiet=True)
    assert not stopped.training and stopped.classes.prototypes is not None  # as if it had ended there
    assert stopped.predict(VAL[0][0], top_k=1)[0]["label"] in NAMES
    before = contents(folder)
    message = (
        f"{folder} has a training that ended after 2 of 3 epochs. Pass resume=True to go on with it, or remove "
        f"{CHECKPOINT_FILE} there to begin anew."
    )
    with raises(message, FileExistsError):
        fit(make(), TRAIN, eval_samples=VAL, folder=folder, quiet=True)
    with pytest.raises(ValueError, match=r"is a checkpoint of another training \(eval_samples differ\)"):
        fit(make(), TRAIN, folder=folder, resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"is a checkpoint of another training \(samples differ\)"):
        fit(make(), [TRAIN[1], TRAIN[0], *TRAIN[2:]], eval_samples=VAL, folder=folder, resume=True, quiet=True)
    assert contents(folder) == before
    resumed = make()
    history = fit(resumed, TRAIN, eval_samples=VAL, folder=folder, resume=True, quiet=True)
    assert history == expected and same(weights(resumed), weights(whole))
    again = make()  # finished: there is nothing left to do, or it is begun anew
    assert fit(again, TRAIN, eval_samples=VAL, folder=folder, resume=True, quiet=True) == expected
    assert same(weights(again), weights(whole))
    assert len(fit(make(), TRAIN, Recipe(epochs=1, calibration_folds=0), folder=folder, quiet=True)) == 1


def test_a_signal_before_the_first_epoch_ends_leaves_the_classifier_as_it_was(make):
    classifier = make()
    before = {name: value for name, value in weights(classifier).items() if name != "prototypes"}
    classifier.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with raises("stopped by Ctrl-C after 0 of 3 epochs", TrainingInterrupted):
        fit(classifier, TRAIN, quiet=True)
    after = weights(classifier)
    assert all(torch.equal(after[name], value) for name, value in before.items()) and classifier.trained is None


def test_a_signal_while_scores_are_calibrated_leaves_what_was_trained(make, tmp_path):
    """By cross-fitting, which trains again; what is gone on with then only calibrates."""
    recipe, steps, classifier = replace(RECIPE, calibration_folds=2), [], make()

    def count(*_) -> None:
        steps.append(1)
        if len(steps) == 7:  # the whole training takes six
            os.kill(os.getpid(), signal.SIGTERM)

    classifier.register_forward_hook(count)
    with raises(f"stopped by SIGTERM after 3 of 3 epochs{UNCALIBRATED}", TrainingInterrupted):
        fit(classifier, TRAIN, recipe, folder=tmp_path, quiet=True)
    trained = make()
    fit(trained, TRAIN, quiet=True)
    assert same(weights(classifier), weights(trained)) and classifier.classes.calibration is None
    fit(classifier := make(), TRAIN, recipe, folder=tmp_path, resume=True, quiet=True)
    assert same(weights(classifier), weights(trained)) and classifier.classes.calibration is not None


MISTAKES = {
    "patience": ({"patience": 2}, "patience=2 needs eval_samples, on which the classifier gets better or does not."),
    "time": ({"max_seconds": -1}, "max_seconds must be None or a finite number above 0, but got -1."),
    "keep": ({"keep": "all"}, 'keep must be "best" or "last", but got \'all\'.'),
    "resume": (
        *({"resume": True},),
        "resume=True needs folder, where the training that is gone on with has its checkpoint.",
    ),
    "validation": ({"eval_samples": []}, "There are no images to validate on."),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_anything_changes(options, message, make):
    classifier = make()
    before, recipe = weights(classifier), classifier.recipe
    with raises(message):
        fit(classifier, TRAIN, Recipe(epochs=1), **options)
    assert classifier.recipe is recipe and same(weights(classifier), before)


def test_an_image_that_cannot_be_read_leaves_all_as_it_was(make, tmp_path):
    fit(classifier := make(), TRAIN[:3], Recipe(epochs=1, calibration_folds=0), folder=tmp_path, quiet=True)
    before, recipe, files = weights(classifier), classifier.recipe, contents(tmp_path)
    missing = [("/nowhere.jpg", NAMES[0])]
    for samples, options in [([*TRAIN, *missing], {"folder": tmp_path}), (TRAIN, {"eval_samples": missing})]:
        with raises("The image '/nowhere.jpg' cannot be read: there is no such file."):
            fit(classifier, samples, Recipe(epochs=1), quiet=True, **options)
        assert classifier.recipe is recipe and same(weights(classifier), before)
    assert contents(tmp_path) == files  # of a training that was finished


def test_the_folder_is_tried_before_training(make, tmp_path, monkeypatch):
    classifier = make()
    before = weights(classifier)
    (tmp_path / "file").write_text("mine")
    with raises(f"{tmp_path / 'file'} is a file; a folder is needed to save into.", NotADirectoryError):
        fit(classifier, TRAIN, folder=tmp_path / "file")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskFullError, match=r"needs room for [\d.]+ MB, but its disk has 0\.0 MB left"):
        fit(classifier, TRAIN, folder=tmp_path / "new")
    assert same(weights(classifier), before) and not (tmp_path / "new").exists()
