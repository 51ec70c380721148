"""Zero-shot beside SEP in predictions, for classes that the adapter was not trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bundled import scores_of
from small_classifier import IMAGES, LABELS, logits_of, make_classifier, make_model, raises, with_prototypes

from sep_peft import ImageScorer, SEPClassifier, TaskClasses
from sep_peft.classifier.prediction import predict_batch


def with_margin(margin: float, classifier: SEPClassifier | None = None) -> SEPClassifier:
    classifier = classifier or make_classifier()
    return classifier.set_classes(classifier.classes, zero_shot_margin=margin)


def probabilities(classifier: SEPClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    """SEP's and those of the model without its adapter, each (B, C), each by a forward of its own."""
    adapted = logits_of(classifier).softmax(dim=1)
    with classifier.model.disable_adapter():
        zero_shot = logits_of(classifier).softmax(dim=1)
    assert not torch.allclose(adapted, zero_shot, atol=1e-3)
    return adapted, zero_shot


def reference(margin: float) -> torch.Tensor:
    """Class by class the larger one, zero-shot's counted `margin` times; as probabilities."""
    rows = [
        [max(p, margin * p0) for p, p0 in zip(*pair, strict=True)]
        for pair in zip(*(x.tolist() for x in probabilities(make_classifier())), strict=True)
    ]
    return torch.tensor([[value / sum(row) for value in row] for row in rows])


@pytest.mark.parametrize("margin", [0.0, 0.5, 1, 1.5, 20.0])
def test_the_more_confident_one_decides(margin):
    torch.testing.assert_close(logits_of(with_margin(margin)).softmax(dim=1), reference(margin))


def test_zero_shot_decides_unless_sep_is_far_ahead():
    adapted, zero_shot = probabilities(make_classifier())
    ahead = adapted.amax(dim=1) / zero_shot.amax(dim=1)
    assert ahead.max() > ahead.min()
    margin = (ahead.max() + ahead.min()).item() / 2
    expected = torch.where(ahead > margin, adapted.argmax(dim=1), zero_shot.argmax(dim=1))
    assert torch.equal(logits_of(with_margin(margin)).argmax(dim=1), expected)


def test_without_the_adapter_both_are_zero_shot():
    plain, both = make_classifier(), with_margin(1.5)
    with plain.model.disable_adapter(), both.model.disable_adapter():
        torch.testing.assert_close(logits_of(both).softmax(dim=1), logits_of(plain).softmax(dim=1))


def test_kept_prototypes_belong_to_sep():
    plain = with_prototypes(2.0)
    p, p0 = logits_of(plain).softmax(dim=1), probabilities(make_classifier())[1]
    torch.testing.assert_close(logits_of(with_margin(1.5, plain)), torch.maximum(p, 1.5 * p0).log())


def test_the_loss_of_training_stays_that_of_the_paper():
    plain, both = make_classifier().train(), with_margin(1.5, make_classifier().train())
    before, after = plain(IMAGES, LABELS), both(IMAGES, LABELS)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_other_classes_start_without_it():
    classifier = with_margin(1.5)
    plain = replace(classifier.classes, zero_shot_margin=0.0)
    assert classifier.set_classes(plain).classes.zero_shot_margin == 0
    torch.testing.assert_close(logits_of(classifier).softmax(dim=1), reference(0))


def test_saved_and_loaded(tmp_path):
    classifier = with_margin(1.5)
    classifier.save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_model().get_base_model())
    assert loaded.classes.zero_shot_margin == 1.5
    assert torch.equal(logits_of(loaded), logits_of(classifier))


def test_a_class_list_from_before_has_none():
    data = make_classifier().classes.to_json()
    del data["zero_shot_margin"]
    assert TaskClasses.from_json(data).zero_shot_margin == 0


def test_a_task_has_its_own():
    classifier = make_classifier().eval()
    for margin in (0.0, 1.5):
        classifier.add_task(f"task {margin}", classifier.classes, adapter="default", zero_shot_margin=margin)
    tasks = classifier.tasks.of_samples(["task 1.5", "task 0.0"], 2)
    with torch.no_grad():
        found = predict_batch(classifier.vision_tower, {"pixel_values": IMAGES[:2]}, tasks, None)
    assert scores_of(found[0], classifier.class_names) == pytest.approx(reference(1.5)[0].tolist(), abs=1e-5)
    assert scores_of(found[1], classifier.class_names) == pytest.approx(reference(0.0)[1].tolist(), abs=1e-5)


def test_a_scorer_has_it():
    classifier = with_margin(1.5).eval()
    scorer = ImageScorer(classifier).eval()
    torch.testing.assert_close(scorer(IMAGES), logits_of(classifier).softmax(dim=-1))


@pytest.mark.parametrize("margin", [-0.1, float("inf"), float("nan")])
def test_a_margin_out_of_range_is_refused(margin):
    classifier = make_classifier()
    expected = logits_of(classifier)
    with raises(f"zero_shot_margin must be at least 0 and finite, but got {margin!r}."):
        classifier.set_classes(classifier.classes, zero_shot_margin=margin)
    assert torch.equal(logits_of(classifier), expected)
