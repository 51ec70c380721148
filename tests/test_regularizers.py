"""Losses of other methods that hold an adapter near the frozen model: their equations, and a training step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_classifier import IMAGES, LABELS, make_classifier

from sep_peft.method.recipe import REGULARIZER_WEIGHTS
from sep_peft.method.regularizers import agreement, distance, geometry, regularizers


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_agreement_is_a_divergence_from_zero_shot():
    logits, zero_shot = made(3, 4), made(3, 4, seed=1)
    p, p0 = logits.softmax(dim=1), zero_shot.softmax(dim=1)
    expected = sum(p0[b, c] * (p0[b, c].log() - p[b, c].log()) for b in range(3) for c in range(4)) / 12
    torch.testing.assert_close(agreement(logits, zero_shot), expected)
    assert agreement(zero_shot + 5, zero_shot) == pytest.approx(0, abs=1e-6)
    assert agreement(logits.half(), zero_shot.half()).dtype == torch.float32


def test_distance_is_of_embeddings_of_unit_length():
    ours, theirs = made(3, 5), made(3, 5, seed=1)
    unit = [each / each.norm(dim=1, keepdim=True) for each in (ours, theirs)]
    torch.testing.assert_close(distance(ours, 7 * theirs), (unit[0] - unit[1]).abs().mean())


def test_geometry_lets_all_turn_together():
    ours, theirs = made(4, 5), made(4, 5, seed=1)
    turn = torch.linalg.qr(made(5, 5, seed=2)).Q
    assert geometry(ours @ turn, ours) == pytest.approx(0, abs=1e-6)
    unit = [each / each.norm(dim=1, keepdim=True) for each in (ours, theirs)]
    pairs = [(unit[0][i] @ unit[0][j] - unit[1][i] @ unit[1][j]) ** 2 for i in range(4) for j in range(4) if i != j]
    torch.testing.assert_close(geometry(ours, theirs), sum(pairs) / 12)
    assert geometry(ours[:1], theirs[:1]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", REGULARIZER_WEIGHTS)
def test_a_training_step_adds_what_the_recipe_weighs(name):
    """Its parts are SEP's, its total has the regularizer, and without an adapter's drift nothing is added."""
    classifier = make_classifier().train()
    plain = classifier(IMAGES, LABELS)
    classifier.recipe = replace(classifier.recipe, **{name: 2.5})
    output = classifier(IMAGES, LABELS)
    assert output.parts[1:] == plain.parts[1:]
    v, v0 = classifier.image_embeds(IMAGES)
    weights = classifier.encoder.weights(training=True)
    zero_shot = classifier.model.logit_scale.exp() * v0 @ weights.frozen_text_embeds.T
    embeds = v, v0, weights.text_embeds, weights.frozen_text_embeds
    added = regularizers(output.logits, zero_shot, *embeds, **{name: 2.5})
    assert added > 1e-5
    torch.testing.assert_close(output.loss, plain.loss + added)
    output.loss.backward()
    still = regularizers(zero_shot, zero_shot, v0, v0, *embeds[3:], embeds[3], **{name: 2.5})
    assert still.item() == pytest.approx(0, abs=1e-6)
