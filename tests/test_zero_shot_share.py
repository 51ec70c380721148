"""A share of zero-shot in predictions, for classes that the adapter was not trained on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_classifier import IMAGES, LABELS, logits_of, make_classifier, make_model, raises
from test_prototypes import with_prototypes

from sep_peft import ImageScorer, SEPClassifier, TaskClasses, scoring


def with_share(share: float, classifier: SEPClassifier | None = None) -> SEPClassifier:
    classifier = classifier or make_classifier()
    return classifier.set_classes(classifier.classes, zero_shot_share=share)


def reference(share: float) -> torch.Tensor:
    """SEP's logits and those of the model without its adapter, each by a forward of its own."""
    classifier = make_classifier()
    adapted = logits_of(classifier)
    with classifier.model.disable_adapter():
        zero_shot = logits_of(classifier)
    assert not torch.allclose(adapted, zero_shot, atol=1e-3)
    return (1 - share) * adapted + share * zero_shot


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1])
def test_logits_are_shared_out(share):
    torch.testing.assert_close(logits_of(with_share(share)), reference(share))


def test_kept_prototypes_are_added_to_the_shared_logits():
    plain, kept = with_prototypes(None), with_prototypes(2.0)
    added = logits_of(kept) - logits_of(plain)
    torch.testing.assert_close(logits_of(with_share(0.5, kept)), logits_of(with_share(0.5, plain)) + added)


def test_the_loss_of_training_stays_that_of_the_paper():
    plain, shared = make_classifier().train(), with_share(0.75, make_classifier().train())
    before, after = plain(IMAGES, LABELS), shared(IMAGES, LABELS)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_other_classes_start_without_a_share():
    classifier = with_share(0.75)
    plain = replace(classifier.classes, zero_shot_share=0.0)
    assert classifier.set_classes(plain).classes.zero_shot_share == 0
    torch.testing.assert_close(logits_of(classifier), reference(0))


def test_saved_and_loaded(tmp_path):
    classifier = with_share(0.75)
    classifier.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(make_model().get_base_model(), tmp_path)
    assert loaded.classes.zero_shot_share == 0.75
    assert torch.equal(logits_of(loaded), logits_of(classifier))


def test_a_class_list_from_before_the_share_has_none():
    data = make_classifier().classes.to_json()
    del data["zero_shot_share"]
    assert TaskClasses.from_json(data).zero_shot_share == 0


def test_a_task_has_its_own_share():
    classifier = make_classifier().eval()
    for share in (0.0, 0.75):
        classifier.add_task(f"task {share}", classifier.classes, adapter="default", zero_shot_share=share)
    names, score = ["task 0.75", "task 0.0"], partial(scoring.logits_of, classifier.vision_tower)
    inputs = {"pixel_values": IMAGES[:2]}
    with torch.no_grad():
        scored = classifier.tasks.logits(names, inputs, classifier.image_embeds, score)
        found = {rows[0]: logits for rows, logits, _ in scored}
    torch.testing.assert_close(found[0][0], reference(0.75)[0])
    torch.testing.assert_close(found[1][0], reference(0.0)[1])


def test_a_scorer_has_the_share():
    classifier = with_share(0.75).eval()
    scorer = ImageScorer(classifier).eval()
    torch.testing.assert_close(scorer(IMAGES), logits_of(classifier).softmax(dim=-1))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    classifier = make_classifier()
    expected = logits_of(classifier)
    with raises(f"zero_shot_share must be between 0 and 1, but got {share!r}."):
        classifier.set_classes(classifier.classes, zero_shot_share=share)
    assert torch.equal(logits_of(classifier), expected)
