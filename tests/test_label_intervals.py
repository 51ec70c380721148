"""Bootstrap intervals of mean average precision and F1, against scikit-learn and a bootstrap image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from sep_peft.training import label_intervals as intervals
from sep_peft.training.label_evaluation import LabelEvaluation


@pytest.fixture(scope="module")
def told() -> LabelEvaluation:
    """40 images of 4 classes, of which the last is rare; scores that are equal now and then."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(40, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.2, 0.03])
    targets[0, 3] = True
    scores = (torch.rand(40, 4, generator=generator) * 0.7 + 0.3 * targets).mul(20).round().div(20).double()
    names = ["a", "b", "c", "d"]
    samples = [(row, [names[column] for column in own.nonzero()[:, 0].tolist()]) for row, own in enumerate(targets)]
    return LabelEvaluation(names, samples, scores, torch.tensor([0.5, 0.4, 0.6, 0.5], dtype=torch.double))


def test_images_that_count_several_times_are_those_of_scikit_learn(told):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(0, 3, (5, 40), generator=generator).double()
    weights[2, told.targets[:, 3]] = 0  # a draw without an image of the rare class
    found = intervals.weighted_measures(told.scores, told.named, told.targets, weights)
    for row, own in zip(found.tolist(), weights, strict=True):
        tested = [c for c in range(4) if (own * told.targets[:, c]).any()]
        columns = [(told.targets[:, c].numpy(), told.scores[:, c].numpy(), told.named[:, c].numpy()) for c in tested]
        precisions = [average_precision_score(have, scores, sample_weight=own) for have, scores, _ in columns]
        each = [f1_score(have, said, sample_weight=own, zero_division=0) for have, _, said in columns]
        micro = f1_score(told.targets, told.named, average="micro", sample_weight=own, zero_division=0)
        assert row == pytest.approx([np.mean(precisions), micro, np.mean(each)])
    assert len(tested) == 4 and not (weights[2] * told.targets[:, 3]).any()


def test_images_that_count_once_give_what_was_measured(told):
    found = intervals.weighted_measures(told.scores, told.named, told.targets, torch.ones(1, 40, dtype=torch.double))
    assert (100 * found[0]).tolist() == pytest.approx([told.mean_average_precision, told.micro_f1, told.macro_f1])


def test_an_interval_is_the_middle_of_images_drawn_anew(told, monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 30)
    monkeypatch.setattr(intervals, "SIZE", 7 * 40)  # 7 draws at a time
    found = intervals.label_intervals(told.scores, told.named, told.targets, seed=5)
    chosen = torch.randint(40, (30, 40), generator=torch.Generator().manual_seed(5))
    drawn = [
        LabelEvaluation(told.names, [told.samples[i] for i in own], told.scores[own], told.thresholds) for own in chosen
    ]
    for name, ends in found.items():
        expected = np.percentile([getattr(each, name) for each in drawn], [2.5, 97.5])
        assert ends == pytest.approx(expected)
        assert ends[0] < getattr(told, name) < ends[1]


def test_many_images_are_drawn_less_often(told, monkeypatch):
    draws = []
    measure = intervals.weighted_measures
    monkeypatch.setattr(intervals, "weighted_measures", lambda *given: draws.append(len(given[3])) or measure(*given))
    monkeypatch.setattr(intervals, "WORK", 160 * 300)
    intervals.label_intervals(told.scores, told.named, told.targets)
    monkeypatch.setattr(intervals, "WORK", 1)
    intervals.label_intervals(told.scores, told.named, told.targets)
    assert draws == [300, intervals.MIN_DRAWS]


def test_one_image_says_nothing_else_when_it_is_drawn_anew(told):
    one = LabelEvaluation(told.names, told.samples[:1], told.scores[:1], told.thresholds)
    assert all(low == high == pytest.approx(getattr(one, name)) for name, (low, high) in one.intervals.items())
