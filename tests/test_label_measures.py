"""Measures, losses and calibration of several labels an image, against scikit-learn and plain references."""

from __future__ import annotations

import math

import pytest
import torch
from labelled import NAMES
from sklearn.metrics import average_precision_score, f1_score
from small_classifier import raises

from sep_peft.classifier.label_calibration import (
    MIN_IMAGES,
    LabelCalibration,
    LabelScale,
    best_threshold,
    fit_scale,
    is_rare,
)
from sep_peft.method.label_losses import asymmetric_loss, label_loss
from sep_peft.method.losses import PROTOTYPE_SCALE
from sep_peft.training.label_evaluation import LabelEvaluation
from sep_peft.training.metrics import LabelCounts, average_precision


def drawn(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets that have to do with each other, of classes that are the rarer the later."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0.5, 0.05, classes)
    targets = (torch.rand(images, classes, generator=generator) < shares).float()
    logits = 3 * torch.randn(images, classes, generator=generator) + 4 * targets + 20
    return logits, targets


# measures


@pytest.mark.parametrize("digits", [8, 1], ids=["scores that differ", "equal scores"])
def test_average_precision_is_that_of_scikit_learn(digits):
    logits, targets = drawn(200, 6)
    scores = (logits - 20).sigmoid().double().mul(10**digits).round().div(10**digits)
    for score, target in zip(scores.unbind(dim=1), targets.unbind(dim=1), strict=True):
        expected = average_precision_score(target.numpy(), score.numpy())
        assert average_precision(score, target) == pytest.approx(expected, abs=1e-12)


def test_average_precision_without_an_image_is_not_known():
    assert math.isnan(average_precision(torch.rand(3), torch.zeros(3)))


def test_f1_is_that_of_scikit_learn():
    logits, targets = drawn(150, 5)
    named = logits > 22
    counts = LabelCounts.of(named, targets.bool())
    assert counts.micro_f1() == pytest.approx(f1_score(targets, named, average="micro"))
    assert counts.f1().tolist() == pytest.approx(f1_score(targets, named, average=None, zero_division=0).tolist())


def test_an_evaluation_counts_classes_that_no_image_has_in_no_mean():
    samples = [(0, ("lamp",)), (1, ("lamp", "pizza")), (2, ())]
    scores = torch.tensor([[0.9, 0.2, 0.7], [0.6, 0.1, 0.1], [0.7, 0.3, 0.2]], dtype=torch.double)
    found = LabelEvaluation(NAMES, samples, scores, torch.full((3,), 0.5, dtype=torch.double))
    assert found.named.tolist() == [[True, False, True], [True, False, False], [True, False, False]]
    assert found.average_precisions[:2].tolist() == pytest.approx([100 * (1 + 2 / 3) / 2, 100 / 3])
    assert found.mean_average_precision == pytest.approx((100 * (1 + 2 / 3) / 2 + 100 / 3) / 2)
    assert found.micro_f1 == pytest.approx(100 * 2 * 2 / (4 + 3))
    assert found.macro_f1 == pytest.approx((80 + 0) / 2)
    assert found.not_tested == ["sunflower"] and math.isnan(found.per_class["sunflower"].f1)
    assert [(each.image, each.label, each.missed) for each in found.wrong] == [
        (1, "pizza", True),
        (0, "sunflower", False),
        (2, "lamp", False),
    ]


# losses


def test_without_focus_and_shift_the_loss_is_binary_cross_entropy():
    logits, targets = drawn(7, 4)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 7
    torch.testing.assert_close(asymmetric_loss(logits, targets, focus=0), expected)


@pytest.mark.parametrize(("focus", "shift"), [(2.0, 0.0), (4.0, 0.05), (0.0, 0.1)])
def test_the_asymmetric_loss_is_its_formula(focus, shift):
    logits, targets = drawn(7, 4)
    logits = (logits - 21).double()
    expected = 0.0
    for row in range(7):
        for column in range(4):
            p = 1 / (1 + math.exp(-logits[row, column].item()))
            if targets[row, column]:
                expected -= math.log(p) / 7
            else:
                q = max(p - shift, 0)
                expected -= q**focus * math.log(1 - q) / 7
    assert asymmetric_loss(logits, targets, focus=focus, shift=shift).item() == pytest.approx(expected, rel=1e-6)


def test_logits_without_bounds_give_finite_gradients():
    logits = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    asymmetric_loss(logits, torch.tensor([[0.0, 1.0, 0.0]])).backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0] > 0 > logits.grad[0, 1]


def test_the_whole_loss_is_the_sum_of_its_parts():
    generator = torch.Generator().manual_seed(3)
    image, frozen, text, frozen_text, prototypes = (torch.randn(n, 8, generator=generator) for n in (5, 5, 3, 3, 3))
    logits, targets, biases = image @ text.T, drawn(5, 3)[1], torch.tensor([-1.0, 0.5, 2.0])
    parts = label_loss(
        logits, targets, image, frozen, text, frozen_text, prototypes, biases, text_weight=2.0, focus=1.0
    )
    unit = torch.nn.functional.normalize
    expected = 0
    for embeds in (image, frozen):
        told = PROTOTYPE_SCALE * unit(embeds, dim=1) @ unit(prototypes, dim=1).T + biases
        expected += 0.5 * asymmetric_loss(told, targets, focus=1.0)
    torch.testing.assert_close(parts.prototypes, expected)
    torch.testing.assert_close(
        parts.text_consistency, 2 * (1 - torch.nn.functional.cosine_similarity(text, frozen_text).mean())
    )
    torch.testing.assert_close(parts.total, sum(parts[1:]))
    with raises("targets must have shape (5, 3) beside logits (5, 3), got (5, 2)."):
        label_loss(logits, targets[:, :2], image, frozen, text, frozen_text)


# calibration


def test_slope_and_biases_are_those_of_least_cross_entropy():
    """Where images are many, drawing the biases to each other says nothing: no other slope or bias is better."""
    logits, targets = drawn(4000, 3)
    scale = fit_scale(logits, targets)

    def loss(slope: float, biases) -> float:
        told = slope * logits.double() + torch.tensor(biases, dtype=torch.double)
        return torch.nn.functional.binary_cross_entropy_with_logits(told, targets.double()).item()

    best = loss(scale.slope, scale.biases)
    for factor in (0.97, 1.03):
        moved = [bias - (factor - 1) * scale.slope * 20 for bias in scale.biases]
        assert loss(factor * scale.slope, moved) > best
    for place in range(3):
        for step in (-0.1, 0.1):
            biases = [bias + step * (place == index) for index, bias in enumerate(scale.biases)]
            assert loss(scale.slope, biases) > best
    scores = (scale.slope * logits + torch.tensor(scale.biases)).sigmoid()
    torch.testing.assert_close(scores.mean(dim=0), targets.mean(dim=0), atol=3e-3, rtol=0)


def test_a_class_that_no_image_has_gets_no_bias_without_end():
    logits, targets = drawn(40, 3)
    targets[:, 2] = 0
    scale = fit_scale(logits, targets)
    assert all(abs(bias) < 100 for bias in scale.biases) and scale.slope > 0
    scores = (scale.slope * logits + torch.tensor(scale.biases)).sigmoid()
    assert 0 < scores[:, 2].mean() < scores[:, 1].mean()


def test_one_scale_for_all_classes_fits_classes_that_are_not_known():
    scale = fit_scale(*drawn(50, 3), shared=True)
    assert len(scale.biases) == len(scale.thresholds) == 1


def test_the_best_threshold_has_the_highest_f1_of_all():
    logits, targets = drawn(60, 1)
    scores, own = (logits[:, 0] - 20).sigmoid().double().mul(20).round().div(20), targets[:, 0]

    def f1(threshold: float) -> float:
        return f1_score(own, scores >= threshold, zero_division=0)

    best = best_threshold(scores, own)
    assert f1(best) == pytest.approx(max(f1(score) for score in scores.unique().tolist()))
    assert best not in scores.tolist() and best_threshold(scores, torch.zeros(60)) == 0.5


def test_classes_of_few_images_have_the_threshold_of_all():
    logits, targets = drawn(100, 4)
    targets[:, 3] = torch.arange(100) < MIN_IMAGES - 1
    assert is_rare(targets[:, 3]) and is_rare(1 - targets[:, 3]) and not is_rare(targets[:, 0])
    scale = fit_scale(logits, targets)
    scores = (scale.slope * logits.double() + torch.tensor(scale.biases, dtype=torch.double)).sigmoid()
    assert scale.thresholds[3] == best_threshold(scores.flatten(), targets.flatten())
    assert scale.thresholds[0] == best_threshold(scores[:, 0], targets[:, 0])


def test_a_calibration_survives_json_and_follows_its_classes():
    scale = LabelScale(0.5, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3))
    shared = LabelScale(0.2, (-1.0,), (0.4,))
    whole = LabelCalibration(scale, scale, shared, 12, "cross-fitting", (1,))
    assert LabelCalibration.from_json(whole.to_json() | {"rare": [1]}) == whole
    some = whole.for_some_classes([2, 1])
    assert some.trained == LabelScale(0.5, (3.0, 2.0), (0.3, 0.2)) and some.rare == (1,)
    assert whole.for_new_classes().trained == whole.for_new_classes().zero_shot == shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": 0}, "slope of the scores must be above 0 and at most 100, got 0."),
        ({"thresholds": [0.5, 2.0]}, "thresholds of the scores must be numbers from 0 to 1, got (0.5, 2.0)."),
        ({"biases": [0.0]}, "biases and thresholds of the scores must be as many, and one at least, but are 1 and 2."),
        ({"biases": ["a", 1.0]}, "biases of the scores must be numbers from -10000 to 10000, got ('a', 1.0)."),
    ],
)
def test_a_scale_from_a_file_is_checked(change, message):
    data = {"slope": 1.0, "biases": [0.0, 1.0], "thresholds": [0.5, 0.5]}
    with raises(message):
        LabelScale.from_json(data | change, "trained")
