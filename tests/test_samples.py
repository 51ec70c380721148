"""`fit` and `evaluate` say which samples they cannot use, before anything is done."""

from __future__ import annotations

import copy
from functools import partial

import pytest
from bundled import IMAGE_FILES, NAMES
from small_classifier import make_classifier, raises

from sep_peft.training import Recipe, evaluate, fit


HAS = "it has class 0, class 1, class 2, class 3."
PAIR = "A sample is an image and the name of its class, "
#: samples, error, message with the purpose in place of {}
MISTAKES = {
    "none": ([], ValueError, "There are no images to {}."),
    "a class that is not there": ([("a.jpg", "ant")], ValueError, f"The classifier has no classes ant; {HAS}"),
    "many of them": (
        [("a.jpg", f"ant {index:02}") for index in range(12)],
        ValueError,
        f"The classifier has no classes {', '.join(f'ant {index:02}' for index in range(10))} and 2 more; {HAS}",
    ),
    "a label": (
        [("a.jpg", "class 1"), ("b.jpg", 2)],
        ValueError,
        PAIR + "but sample 1 has 2 in the place of a name. Take it from classifier.class_names.",
    ),
    "an image alone": (["a.jpg"], ValueError, PAIR + "(image, name), but sample 0 is a str."),
    "three": ([("a.jpg", "class 1", 1)], ValueError, PAIR + "(image, name), but sample 0 is a tuple of 3."),
    "a generator": (
        (pair for pair in [("a.jpg", "class 1")]),
        TypeError,
        "samples must be a list of images and names of their classes, but got generator. Make a list of (image, name).",
    ),
    "a folder": (
        *("images", TypeError),
        "samples must be a list of images and names of their classes, but got str. Make a list of (image, name).",
    ),
}


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


@pytest.mark.parametrize(
    ("call", "purpose"), [(partial(fit, quiet=True), "train on"), (evaluate, "evaluate on")], ids=["fit", "evaluate"]
)
@pytest.mark.parametrize(("samples", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_samples_that_cannot_be_used(call, purpose, samples, error, message, classifier):
    prototypes = classifier.prototypes
    with raises(message.format(purpose), error):
        call(classifier, samples)
    assert classifier.training and classifier.prototypes is prototypes


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_batch_size(size, classifier):
    with raises(f"batch_size must be a whole number of at least 1, but got {size}."):
        evaluate(classifier, [("a.jpg", "class 1")], batch_size=size)


def test_number_of_epochs():
    with raises("epochs must be an integer of at least 1, but got -1."):
        Recipe(epochs=-1)


def test_a_loaded_adapter_is_evaluated(imaged):
    """Frozen as it is, in batches of any size."""
    imaged = copy.deepcopy(imaged)
    imaged.model.requires_grad_(False)
    samples = list(zip(IMAGE_FILES, NAMES, strict=True))
    predictions = imaged.predict(IMAGE_FILES, top_k=1)
    expected = [top[0]["label"] == name for (_, name), top in zip(samples, predictions, strict=True)]
    for size in (1, 3):
        found = evaluate(imaged, samples, batch_size=size)
        assert found.images == len(samples) and found.accuracy == pytest.approx(100 * sum(expected) / len(expected))
