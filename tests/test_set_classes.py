"""`SEPClassifier.set_classes`: other classes without training."""

from __future__ import annotations

import re

import pytest
import torch
from bundled import IMAGE_FILES, NAMES, scores_of
from small_clip import make_images

from sep_peft import SEPClassifier


def test_set_classes_swaps_them_without_training(imaged):
    """Among the old names the new probabilities are the old ones but for a factor."""
    state = {key: value.clone() for key, value in imaged.model.state_dict().items()}
    before = imaged.predict(IMAGE_FILES)
    names = ["umbrella", *reversed(NAMES)]
    assert imaged.set_classes(names, zero_shot_margin=0.0) is imaged
    assert imaged.class_names == names
    assert imaged.prototypes.shape[0] == 5
    for prediction, old in zip(imaged.predict(IMAGE_FILES), before, strict=True):
        scores = scores_of(prediction)
        assert sum(scores) < 1
        assert [score / sum(scores) for score in scores] == pytest.approx(scores_of(old), abs=1e-4)
    for key, value in imaged.model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("template", ["a {}.", ["a {}.", "the {}."]], ids=["one", "two"])
def test_set_classes_keeps_the_template_unless_told_otherwise(template, small_model, processor):
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES, template)
    templates = (template,) if isinstance(template, str) else tuple(template)
    assert classifier.set_classes(["cup", "lamp"]).classes.templates == templates
    assert classifier.set_classes(["cup"], template="one {}").classes.templates == ("one {}",)
    assert classifier.set_classes(["lamp"]).classes.templates == ("one {}",)


def test_set_classes_equals_a_new_classifier(imaged, small_model, processor):
    names = ["crab", "cup", "lamp"]
    pixel_values = make_images(2).new_zeros(2, 3, 64, 64).normal_(generator=torch.Generator().manual_seed(0))
    fresh = SEPClassifier.from_class_names(small_model, processor, names)
    imaged.set_classes(names, zero_shot_margin=0.0)
    for training in (True, False):
        logits = [c.train(training)(pixel_values).logits for c in (imaged, fresh)]
        torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "The class list is empty"),
        (["cup", "cup"], "Class names must differ"),
        ("cup", "Class names must be a list of names, but got the single string 'cup'."),
        (["cup", "word " * 72], "A text of 75 tokens does not fit: the text tower has 77 positions and 3 are taken by"),
        # the bare name has 74 tokens and fits beside 3 prompts, the template has 78
        (["cup", "word " * 71], "A text of 78 tokens does not fit: the text tower has 77 positions (BOS and EOS incl"),
    ],
    ids=lambda item: str(item)[:20],
)
def test_bad_classes_leave_the_old_ones(names, message, imaged):
    before = imaged.predict(IMAGE_FILES[0])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        imaged.set_classes(names)
    assert imaged.class_names == NAMES
    assert imaged.predict(IMAGE_FILES[0]) == before
