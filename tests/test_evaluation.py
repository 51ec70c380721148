"""Evaluations: every measure against a plain reference, what is wrong, what is suspected, and drawings."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from bundled import IMAGE_FILES, NAMES
from PIL import Image
from small_classifier import raises

from sep_peft.classifier.calibration import Calibration
from sep_peft.training import evaluate
from sep_peft.training.evaluation import Evaluation, Mistake
from sep_peft.training.metrics import (
    bootstrap_interval,
    calibration_error,
    confusion_matrix,
    error_by_chance,
    negative_log_likelihood,
    reliability,
    suspects,
)


def random_scores(count: int, classes: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = (3 * torch.randn(count, classes, generator=generator)).softmax(dim=1)
    return scores, torch.randint(classes, (count,), generator=generator)


def make(scores: list[list[float]], labels: list[int], names=("ant", "bee", "cow")) -> Evaluation:
    samples = [(f"{index}.jpg", names[label]) for index, label in enumerate(labels)]
    return Evaluation(list(names), samples, torch.tensor(scores))


FOUR = make([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.9, 0.1, 0.0]], [0, 1, 1, 1])


# measures


def test_sets_are_those_that_predict_names(imaged):
    """Counted by hand, of images whose classes are what the classifier says second."""
    scores = tuple(sorted(row["score"] for row in imaged.finish_training().predict(IMAGE_FILES[0])))
    imaged.calibrate(Calibration(1.0, label_scores=scores))
    samples = [
        (path, prediction[1]["label"])
        for path, prediction in zip(IMAGE_FILES, imaged.predict(IMAGE_FILES), strict=True)
    ]
    found = evaluate(imaged, samples)
    for coverage in (0.1, 0.5, 0.75):
        named = [[row["label"] for row in own] for own in imaged.predict(IMAGE_FILES, coverage=coverage)]
        held = [label in own for (_, label), own in zip(samples, named, strict=True)]
        assert found.sets(coverage) == pytest.approx(
            (100 * coverage, 100 * sum(held) / len(held), sum(map(len, named)) / len(named))
        )
    assert found.sets(0.9).held == 100  # of four scores no promise of 0.9 can be kept but by all classes
    imaged.calibrate(None)
    assert evaluate(imaged, samples).sets() is None and FOUR.sets() is None


@pytest.mark.parametrize(("count", "classes", "bins"), [(200, 4, 15), (7, 2, 3), (1, 5, 15)])
def test_calibration_error(count, classes, bins):
    scores, labels = random_scores(count, classes)
    groups: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        best = max(row)
        groups.setdefault(math.ceil(best * bins), []).append((best, row.index(best) == label))
    expected = 0.0
    for group in groups.values():
        mean = sum(best for best, _ in group) / len(group)
        expected += len(group) / count * abs(mean - sum(right for _, right in group) / len(group))
    assert calibration_error(scores, labels, bins) == pytest.approx(100 * expected, abs=1e-4)
    found = reliability(scores, labels, bins)
    assert len(found) == bins and sum(each.count for each in found) == count


def test_what_scores_that_are_right_would_show():
    """Of one score for all, the mean absolute deviation of a share of N images; sure ones cannot be wrong."""
    scores = torch.tensor([[0.75, 0.25]]).expand(100, -1)
    share = [math.comb(100, k) * 0.75**k * 0.25 ** (100 - k) * abs(k / 100 - 0.75) for k in range(101)]
    assert error_by_chance(scores, draws=400) == pytest.approx(100 * sum(share), rel=0.1)
    assert error_by_chance(torch.eye(3)) == 0
    few, many = (error_by_chance(random_scores(count, 5)[0], draws=20) for count in (100, 2000))
    assert few > 3 * many


def test_the_ends_of_bins():
    scores, labels = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.6, 0.4]]), torch.tensor([0, 0, 1])
    assert [each.count for each in reliability(scores, labels, 2)] == [1, 2]
    assert calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0


def test_negative_log_likelihood():
    scores, labels = random_scores(50, 4)
    expected = -sum(math.log(row[label]) for row, label in zip(scores.tolist(), labels.tolist(), strict=True)) / 50
    assert negative_log_likelihood(scores, labels) == pytest.approx(expected, rel=1e-5)
    impossible = negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert impossible == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


def test_confusion():
    said, labels = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([0, 2, 1, 1, 2])
    counts = Counter(zip(labels.tolist(), said.tolist(), strict=True))
    found = confusion_matrix(said, labels, 4)
    assert found.tolist() == [[counts[row, column] for column in range(4)] for row in range(4)]


@pytest.mark.parametrize("groups", [[[1] * 300 + [0] * 100], [[1] * 8 + [0] * 2, [0] * 4 + [1], [1] * 20]])
def test_intervals_are_those_of_images_drawn_anew(groups):
    """Image by image, with another generator: both ends within what the draws leave open."""
    rng, means = random.Random(1), []
    for _ in range(4000):
        shares = [sum(rng.choices(group, k=len(group))) / len(group) for group in groups]
        means.append(100 * sum(shares) / len(shares))
    means.sort()
    low, high = bootstrap_interval([sum(group) for group in groups], [len(group) for group in groups])
    assert low == pytest.approx(means[100], abs=1.5) and high == pytest.approx(means[3899], abs=1.5)
    assert bootstrap_interval([5], [5]) == (100, 100)


def slow_suspects(scores: list[list[float]], labels: list[int]) -> set[int]:
    """As the paper says: each class's mean own score is its threshold."""
    thresholds = {}
    for label in set(labels):
        own = [row[label] for row, other in zip(scores, labels, strict=True) if other == label]
        thresholds[label] = sum(own) / len(own)
    found = set()
    for index, (row, label) in enumerate(zip(scores, labels, strict=True)):
        for other, threshold in thresholds.items():
            if other != label and row[other] >= threshold and row[other] > row[label]:
                found.add(index)
    return found


def test_suspects():
    scores, labels = random_scores(80, 4)
    labels[:60] = scores[:60].argmax(dim=1)
    found = suspects(scores, labels)
    assert set(found) == slow_suspects(scores.double().tolist(), labels.tolist()) and 0 < len(found) < 30
    wrong = scores.clone().argmax(dim=1)
    wrong[5] = (wrong[5] + 1) % 4
    scores[5] = torch.tensor([0.001] * 4).scatter(0, scores[5].argmax(), 0.997)
    assert suspects(scores, wrong) == [5]
    assert suspects(torch.eye(3), torch.arange(3)) == []


# evaluations


def test_an_evaluation():
    assert (FOUR.images, FOUR.count, FOUR.right) == (4, {"ant": 1, "bee": 3}, {"ant": 1, "bee": 1})
    assert FOUR.accuracy == 50 and FOUR.class_mean == pytest.approx((100 + 100 / 3) / 2)
    assert FOUR.per_class == {"ant": 100, "bee": pytest.approx(100 / 3)}
    assert FOUR.confusion.tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]
    assert FOUR.interval[0] == 0 and FOUR.interval[1] == 100
    low, high = FOUR.class_mean_interval
    assert 50 <= low < FOUR.class_mean < high <= 100
    surest, other = FOUR.wrong
    assert surest == Mistake("3.jpg", "bee", "ant", pytest.approx(0.9), pytest.approx(0.1))
    assert other.image == "2.jpg"
    assert [mistake.image for mistake in FOUR.mislabelled] == ["3.jpg"]


def test_evaluate_keeps_the_scores_of_predict(imaged):
    samples = [(path, name) for path, name in zip(IMAGE_FILES, [*NAMES[:3], NAMES[0]], strict=True)]
    found = evaluate(imaged, samples, batch_size=3)
    assert found.names == NAMES and found.samples == samples
    for row, prediction in zip(found.scores.tolist(), imaged.predict(IMAGE_FILES), strict=True):
        assert row == pytest.approx([{e["label"]: e["score"] for e in prediction}[name] for name in NAMES], abs=1e-5)


# drawings


@pytest.mark.parametrize("classes", [3, 30, 70])
def test_drawings_of_the_confusion(classes, tmp_path):
    scores, labels = random_scores(40, classes)
    names = [f"class $_{index} with a name that goes on and on" for index in range(classes)]
    found = Evaluation(names, [("", names[label]) for label in labels.tolist()], scores)
    figure = found.plot_confusion(tmp_path / "confusion.png")
    axis = figure.axes[0]
    numbers = [text.get_text() for text in axis.texts]
    assert numbers == ([str(int(n)) for n in found.confusion.flatten() if n] if classes <= 20 else [])
    assert len(axis.get_yticklabels()) == classes if classes <= 60 else axis.get_ylabel() == "is"
    assert Image.open(tmp_path / "confusion.png").size[0] > 400


def test_a_drawing_of_the_reliability(tmp_path):
    figure = FOUR.plot_reliability(tmp_path / "reliability.png")
    upper, lower = figure.axes
    assert [bar.get_height() for bar in lower.patches] == [each.count for each in reliability(FOUR.scores, FOUR.labels)]
    assert upper.get_title() == f"calibration error {FOUR.calibration_error:.1f} %"
    assert (tmp_path / "reliability.png").exists()


def test_a_drawing_of_the_wrong_images(tmp_path):
    samples = [(path, "a_b $x$") for path in IMAGE_FILES[:3]]
    found = Evaluation(["a_b $x$", "c"], samples, torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6]]))
    figure = found.plot_wrong(tmp_path / "wrong.png")
    assert [axis.get_title() for axis in figure.axes] == ["c 80%\nis a b \\$x\\$", "c 60%\nis a b \\$x\\$"]
    assert [axis.get_title() for axis in found.plot_wrong(most=1).axes] == ["c 80%\nis a b \\$x\\$"]
    with raises("There is nothing to draw: every image was told."):
        make([[1.0, 0.0, 0.0]], [0]).plot_wrong()
