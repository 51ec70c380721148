"""Answers: none of these, and sets of classes that hold the right one as often as is promised."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from bundled import IMAGE_FILES, NAMES
from small_classifier import make_classifier, raises
from small_clip import make_clip, make_texts

from sep_peft import SEPClassifier
from sep_peft.classifier.answers import Answers
from sep_peft.classifier.calibration import (
    KEPT_SCORES,
    Calibration,
    fit_temperature,
    kept_scores,
    nearness,
    typical_logits,
)
from sep_peft.classifier.classes import TaskClasses
from sep_peft.classifier.prediction import Task, predict_batch
from sep_peft.training.calibrate import HeldOut


LOGITS = torch.tensor([[4.0, 1.0, 0.0, -1.0], [1.0, 1.5, 1.2, 0.9], [-6.0, -5.0, -9.0, -7.0]])
CLASSES = make_classifier().classes
CLASSES_OF_3 = TaskClasses(make_texts([3, 4, 5]))
KNOWN = Calibration(2.0, least_energy=0.5, label_scores=(0.05, 0.2, 0.3, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9))


def labels_of(rankings: list[list[dict]]) -> list[list[int]]:
    return [[int(entry["label"].removeprefix("class ")) for entry in ranking] for ranking in rankings]


def slow_sets(logits: torch.Tensor, calibration: Calibration, coverage: float) -> list[set[int]]:
    """The definition: a class is in the set unless its score is among the lowest of its rank with the held-out ones."""
    found = []
    for row in (logits).softmax(dim=1).tolist():
        own = set()
        for label, score in enumerate(row):
            rank = sum(other <= score for other in calibration.label_scores) + 1  # among n + 1, with itself
            if rank > (len(calibration.label_scores) + 1) * (1 - coverage) + 1e-9 or math.isclose(score, max(row)):
                own.add(label)
        found.append(own)
    return found


# sets


@pytest.mark.parametrize("coverage", [0.5, 0.75, 0.8, 0.9, 0.95])
def test_sets_are_those_of_the_definition(coverage):
    found = labels_of(Answers(coverage=coverage).of(LOGITS, CLASSES, KNOWN))
    expected = slow_sets(LOGITS, KNOWN, coverage)
    if coverage > 0.9:
        assert found == [sorted(range(4), key=lambda i: -row[i]) for row in LOGITS.tolist()]  # nine are too few
    else:
        assert [set(own) for own in found] == expected and all(found)


def test_sets_keep_their_promise():
    """On images that are drawn like the held-out ones, over many draws, and no more than that."""
    generator, held = torch.Generator().manual_seed(3), []
    for _ in range(300):
        logits = 2 * torch.randn(59, 4, generator=generator)
        labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
        calibration = HeldOut(logits[:29], logits[:29], labels[:29], "held-out images").calibration()
        found = labels_of(Answers(coverage=0.8).of(logits[29:] / calibration.temperature, CLASSES, calibration))
        held += [label in own for label, own in zip(labels[29:].tolist(), found, strict=True)]
    assert sum(held) / len(held) == pytest.approx(0.8, abs=0.015)


def test_many_scores_are_thinned_out_and_promise_no_more():
    scores = torch.rand(5003, generator=torch.Generator().manual_seed(4)).double()
    kept = kept_scores(scores)
    assert len(kept) == KEPT_SCORES and list(kept) == sorted(kept) and set(kept) <= set(scores.tolist())
    ordered = scores.sort().values
    for coverage in (0.5, 0.8, 0.9, 0.95, 0.99):
        least = Calibration(1.0, label_scores=kept).least_score(coverage)
        exact = ordered[math.floor(5004 * (1 - coverage) + 1e-9) - 1].item()
        assert exact - 0.002 < least <= exact
    assert kept_scores(scores[:5]) == tuple(scores[:5].sort().values.tolist())


def test_after_cross_fitting_sets_go_by_the_scores_of_labels():
    """They hold what they promise whatever the temperature is, as no rule does that goes by the scores alone."""
    generator, held = torch.Generator().manual_seed(3), {1.0: 0, 4.0: 0}
    for scale in held:
        for _ in range(40):
            logits = 2 * torch.randn(259, 4, generator=generator)
            labels = torch.multinomial((logits / scale).softmax(dim=1), 1, generator=generator)[:, 0]
            own = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
            calibration = Calibration(1.0, source="cross-fitting", label_scores=kept_scores(own[:59]))
            found = labels_of(Answers(coverage=0.8).of(logits[59:], CLASSES, calibration))
            held[scale] += sum(label in own for label, own in zip(labels[59:].tolist(), found, strict=True))
    assert held[1.0] / 8000 == pytest.approx(0.8, abs=0.03) and held[4.0] / 8000 == pytest.approx(0.8, abs=0.03)
    logits = 3 * torch.randn(50, 4, generator=generator)
    labels = logits.argmax(dim=1)
    own = (logits / fit_temperature(logits, labels)).softmax(dim=1).amax(dim=1)
    found = HeldOut(logits, logits, labels, "cross-fitting").calibration()
    assert found.label_scores == pytest.approx(own.sort().values)


# none of these


def test_by_score():
    best = LOGITS.softmax(dim=1).amax(dim=1)
    limit = best.sort().values[1].item()
    found = labels_of(Answers(min_score=limit - 1e-6, top_k=1).of(LOGITS, CLASSES, None))
    assert [bool(own) for own in found] == (best >= limit - 1e-6).tolist() and sum(map(bool, found)) == 2
    assert all(Answers(min_score=0.0).of(LOGITS, CLASSES, None))


def test_by_nearness():
    """An image is of a class if its logit is not far below what the class's images typically get."""
    typical = (3.0, 2.0, 0.0, -1.0)
    near = [max(value - own for value, own in zip(row, typical, strict=True)) for row in LOGITS.tolist()]
    calibration = replace(KNOWN, typical_logits=typical, least_nearness=1.1)
    found = labels_of(Answers(unknown=True).of(LOGITS, CLASSES, calibration))
    assert near == pytest.approx([1.0, 1.9, -6.0]) and list(map(bool, found)) == [False, True, False]
    both = labels_of(Answers(unknown=True, coverage=0.8).of(LOGITS, CLASSES, calibration))
    assert both[::2] == [[], []] and both[1] == labels_of(Answers(coverage=0.8).of(LOGITS, CLASSES, calibration))[1]


def test_without_typical_logits_by_energy():
    """As adapters have it that were saved with an energy alone."""
    energies = [math.log(sum(math.exp(value) for value in row)) for row in LOGITS.tolist()]
    found = labels_of(Answers(unknown=True).of(LOGITS, CLASSES, KNOWN))
    assert [bool(own) for own in found] == [energy >= KNOWN.least_energy for energy in energies] == [True, True, False]


def test_classes_of_few_images_are_typical_of_all():
    logits = torch.tensor([[5.0, 0.0, 1.0], [3.0, 1.0, 9.0], [2.0, 7.0, 0.0], [1.0, 9.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    mean = (5 + 3 + 7 + 9) / 4
    expected = [(5 + 3 + 8 * mean) / 10, (7 + 9 + 8 * mean) / 10, mean]
    assert typical_logits(logits, labels) == pytest.approx(expected)
    assert typical_logits(logits, labels, weight=0.5)[:2] == pytest.approx(
        [(8 + mean / 2) / 2.5, (16 + mean / 2) / 2.5]
    )


def test_a_class_that_takes_everything_does_not_take_strangers():
    """They give it as large a logit as other classes get from their own images, but for this class it is small."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(3).repeat(60)
    everything = torch.tensor([5.0, 0.0, 0.0])
    logits = 12 * torch.nn.functional.one_hot(labels, 3) + everything + 0.5 * torch.randn(180, 3, generator=generator)
    strange = 2.5 * everything + 0.5 * torch.randn(60, 3, generator=generator)
    found = HeldOut(logits, logits, labels, "held-out images").calibration()
    answers = Answers(unknown=True).of(strange / found.temperature, CLASSES_OF_3, found)
    assert found.accuracy == 100 and found.least_energy is None and answers == [[]] * 60
    energies = logits.logsumexp(dim=1)
    assert (strange.logsumexp(dim=1) >= energies.quantile(0.05)).sum() > 50  # by which hardly any is told


def test_what_is_found_on_held_out_images():
    logits = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(5))
    labels = logits.argmax(dim=1)
    found = HeldOut(logits, logits, labels, "held-out images").calibration()
    calibrated = logits / found.temperature
    assert found.typical_logits == pytest.approx(typical_logits(calibrated, labels))
    kept = nearness(calibrated, found.typical_logits) >= found.least_nearness
    assert kept.float().mean() == pytest.approx(0.95)
    own = sorted(row[label] for row, label in zip(calibrated.softmax(dim=1).tolist(), labels.tolist(), strict=True))
    assert found.label_scores == pytest.approx(own, abs=1e-6) and found.accuracy == 100


def test_predict(imaged):
    imaged.finish_training().calibrate(replace(KNOWN, temperature=1.0))
    plain = imaged.predict(IMAGE_FILES)
    for prediction, own in zip(plain, imaged.predict(IMAGE_FILES, coverage=0.7), strict=True):
        assert own == prediction[: len(own)] and own
    middle = sorted(prediction[0]["score"] for prediction in plain)[2]
    sure = imaged.predict(IMAGE_FILES, min_score=middle, top_k=1)
    assert [len(each) for each in sure] == [int(each[0]["score"] >= middle) for each in plain]
    for least, kept in ((-1e6, 4), (1e6, 0)):
        rule = {"typical_logits": (0.0,) * len(NAMES), "least_nearness": least}
        imaged.calibrate(Calibration(1.0, **rule))
        assert [len(each) for each in imaged.predict(IMAGE_FILES, unknown=True)] == [kept] * 4


def test_classes_in_another_order_are_told_alike(imaged):
    """Each class is compared with its own images, wherever it stands."""
    typical = tuple(50.0 * place for place in range(len(NAMES)))
    imaged.finish_training().calibrate(Calibration(1.0, typical_logits=typical, least_nearness=0.0))
    found = imaged.predict(IMAGE_FILES, unknown=True)
    turned = NAMES[::-1]
    assert imaged.set_classes(turned).classes.calibration.typical_logits == typical[::-1]
    again = imaged.predict(IMAGE_FILES, unknown=True)
    assert [[each["label"] for each in one] for one in again] == [[each["label"] for each in one] for one in found]
    assert imaged.set_classes(turned[:-1]).classes.calibration.typical_logits == ()


# files and mistakes


def test_saved_and_loaded(tmp_path):
    count = len(make_classifier().classes)
    for known in (KNOWN, replace(KNOWN, typical_logits=(0.5,) * count, least_nearness=-1.5)):
        make_classifier().calibrate(known).save_pretrained(tmp_path)
        assert SEPClassifier.from_pretrained(tmp_path, model=make_clip()).classes.calibration == known


TOGETHER = "typical_logits and least_nearness of the calibration belong together, but one of them is missing."
SCORES = "label_scores of the calibration must be"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"least_energy": float("inf")}, "Infinity"),
        ({"least_energy": "1"}, "least_energy of the calibration must be a finite number, but got '1'."),
        ({"label_scores": 1}, f"{SCORES} numbers from 0 to 1, but got 1."),
        ({"label_scores": [0.5, 1.5]}, f"{SCORES} numbers from 0 to 1, but got (0.5, 1.5)."),
        ({"label_scores": [0.5, float("nan")]}, "NaN"),
        ({"label_scores": [0.5, 0.25]}, f"{SCORES} at most 1000 and ascend, but are 2: (0.5, 0.25)."),
        ({"label_scores": [0] * 1001}, f"{SCORES} at most 1000 and ascend, but are 1001: (0, 0, 0, 0, 0, 0, ...)."),
        ({"typical_logits": "0"}, "typical_logits of the calibration must be finite numbers, but got '0'."),
        ({"typical_logits": [True]}, "typical_logits of the calibration must be finite numbers, but got (True,)."),
        ({"typical_logits": [0.5]}, TOGETHER),
        ({"least_nearness": 0.5}, TOGETHER),
        (
            {"typical_logits": [0.5], "least_nearness": 0},
            f"typical_logits of the calibration must be of {len(CLASSES)} classes, but are of 1.",
        ),
        ({"least_nearness": []}, "least_nearness of the calibration must be a finite number, but got []."),
        ({"accuracy": 101}, "accuracy of the calibration must be in percent, between 0 and 100, but got 101."),
    ],
)
def test_what_files_of_strangers_may_not_say(data, message, tmp_path):
    make_classifier().save_pretrained(tmp_path)
    file = tmp_path / "sep_classes.json"
    calibration = {"temperature": 2.0, **data}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": calibration}))
    no_number = f" is no valid JSON ({message} is no number of JSON). Copy or download it again."
    with raises(f"{file}: {message}" if " " in message else f"{file}{no_number}"):
        SEPClassifier.from_pretrained(tmp_path, model=make_clip())


NEEDS = (
    " needs held-out images of these classes, but their calibration has none. It is made for the classes that an "
    "adapter is trained on, by fit or sep_peft.training.calibrate."
)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"unknown": 1}, TypeError, "unknown must be True or False, but got 1."),
        ({"min_score": 1.5}, ValueError, "min_score must be a number from 0 to 1, but got 1.5."),
        ({"min_score": True}, ValueError, "min_score must be a number from 0 to 1, but got True."),
        ({"coverage": 1}, ValueError, "coverage must be a number above 0 and below 1, but got 1."),
        ({"coverage": 0.0}, ValueError, "coverage must be a number above 0 and below 1, but got 0.0."),
        (
            {"coverage": 0.5, "top_k": 2},
            ValueError,
            "coverage chooses how many classes to name. Leave out top_k, which is 2.",
        ),
        ({"unknown": True}, ValueError, "unknown=True" + NEEDS),
        ({"coverage": 0.5}, ValueError, "coverage" + NEEDS),
    ],
)
def test_what_cannot_be_asked(asked, error, message, imaged):
    with raises(message, error):
        imaged.predict("no such image.jpg", **asked)
    imaged.finish_training().calibrate(KNOWN).set_classes(["lobster", "crab"])
    with raises(message, error):
        imaged.predict("no such image.jpg", **asked)


def test_zero_shot_knows_no_rule():
    classifier = make_classifier().calibrate(KNOWN).eval()
    tasks = [Task("__base__", classifier.encoder)]
    with raises("unknown=True" + NEEDS), torch.no_grad():
        predict_batch(
            classifier.vision_tower, {"pixel_values": torch.zeros(1, 3, 24, 24)}, tasks, Answers(unknown=True)
        )


@pytest.mark.parametrize(("asked", "said"), [({"unknown": True}, "unknown=True"), ({"coverage": 0.5}, "coverage")])
def test_a_mixed_batch_is_refused_before_an_image_is_read(asked, said, imaged):
    """The classes of the task have a calibration, but zero-shot takes no part in it."""
    imaged.finish_training().calibrate(KNOWN)
    imaged.add_task("trained", imaged.classes, "default").add_task("plain", imaged.classes, "__base__")
    with raises(said + NEEDS):
        imaged.predict(["no such image.jpg", "nor this.jpg"], task=["trained", "plain"], **asked)
    assert len(imaged.predict(IMAGE_FILES[:1], task=["trained"], **asked)) == 1


def test_the_rule_is_that_of_the_names_that_were_trained(imaged):
    imaged.finish_training().calibrate(KNOWN)
    imaged.set_classes(["lobster", "crab"]).set_classes(NAMES)
    assert imaged.classes.calibration == KNOWN
