"""The few-shot draw and the protocols built on it."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from protocols import (
    base_to_new,
    cross_dataset,
    domain_generalization,
    few_shot,
    held_out_domains,
    on_validation,
    with_shifts,
    without_domain,
)
from readers import read_dataset
from sampling import draw, halves
from transforms import SHIFTS


@pytest.fixture
def pets(images, describe, tmp_path):
    for part, count in (("train", 9), ("val", 6), ("test", 4)):
        images(f"pets/{part}", {"ant": count, "bee": count, "cat": count, "dog": 2, "emu": count})
    return read_dataset(describe("pets", reader="folder"), tmp_path)


def reference_draw(data, shots, seed):
    """As the field's code: one global generator, first training images and then validation ones, class by class."""
    random.seed(seed)
    parts = []
    for split, count in (("train", shots), ("val", min(shots, 4))):
        by_label = defaultdict(list)
        for sample in data.splits[split]:
            by_label[sample.label].append(sample)
        parts.append(
            [s for own in by_label.values() for s in (random.sample(own, count) if len(own) >= count else own)]
        )
    return parts


@pytest.mark.parametrize(("shots", "seed"), [(1, 1), (3, 2), (4, 1), (16, 3)])
def test_draw_is_that_of_the_field(pets, shots, seed):
    drawn = draw(pets, shots, seed)
    assert [drawn.train, drawn.val] == reference_draw(pets, shots, seed)
    assert drawn.unreadable == []


def test_broken_images_are_replaced_and_named(pets, tmp_path):
    broken = draw(pets, 3, 1).train[0].key
    (tmp_path / "pets" / broken).write_bytes(b"no image")
    drawn = draw(pets, 3, 1)
    assert drawn.unreadable == [broken]
    assert len(drawn.train) == len({s.key for s in drawn.train}) == 14  # dog has two images only
    assert broken not in {s.key for s in drawn.train}


def test_class_without_a_readable_image(pets, tmp_path):
    for file in (tmp_path / "pets" / "train" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^pets: no training image that can be read for dog\.$"):
        draw(pets, 4, 1)


@pytest.mark.parametrize(("count", "base"), [(2, 1), (5, 3), (6, 3)])
def test_halves(count, base):
    names = tuple("abcdef"[:count])
    assert halves(names) == (list(names[:base]), list(names[base:]))


def test_base_to_new(pets):
    plan = base_to_new(pets, 4, 1)
    assert plan.data.classes == ("ant", "bee", "cat")
    assert {s.label for s in plan.images.train} == {0, 1, 2}
    assert plan.images.train == [s for s in reference_draw(pets, 4, 1)[0] if s.label < 3]  # drawn from all classes
    new = plan.evaluations[1].data
    assert (plan.evaluations[1].name, new.classes) == ("new", ("dog", "emu"))
    assert {s.label: s.key.split("/")[1] for s in new.splits["test"]} == {0: "dog", 1: "emu"}


def test_tuning_sees_no_test_image(pets):
    """In no protocol, and with shifted images beside."""
    plans = [base_to_new(pets, 4, 1), few_shot(pets, 4, 1), domain_generalization(pets, 4, 1)]
    for plan in (*plans, cross_dataset(pets, 4, 1, [pets.only(["cat", "dog"])])):
        tuned = with_shifts(on_validation(plan))
        assert [e.name for e in tuned.evaluations[: len(plan.evaluations)]] == [e.name for e in plan.evaluations]
        first = plan.evaluations[0].name
        assert [(e.name, e.shift) for e in tuned.evaluations[-4:]] == [(f"{first}, {s}", s) for s in SHIFTS]
        for evaluation in tuned.evaluations:
            assert {s.key.split("/")[0] for s in evaluation.data.splits[evaluation.split]} == {"val"}
    with pytest.raises(ValueError, match=r"^pets has no validation images, which tuning needs\.$"):
        on_validation(few_shot(replace(pets, splits={**pets.splits, "val": []}), 1, 1))


def test_few_shot(pets):
    plan = few_shot(pets, 2, 1)
    assert len(plan.images.train) == 10
    assert [(e.name, len(e.data.splits["test"])) for e in plan.evaluations] == [("all", 18)]


def test_cross_dataset(pets):
    other = pets.only(["cat", "dog"])
    plan = cross_dataset(pets, 2, 1, [other])
    assert [e.data.classes for e in plan.evaluations] == [pets.classes, ("cat", "dog")]
    with pytest.raises(ValueError, match=r"needs data sets to test on: name them with --targets\.$"):
        cross_dataset(pets, 2, 1, [])


def test_shifted_inputs(pets):
    plan = domain_generalization(pets, 2, 1)
    assert [(e.name, e.shift) for e in plan.evaluations] == [
        ("source", ""), ("grey", "grey"), ("blur", "blur"), ("noise", "noise"), ("edges", "edges"),
    ]  # fmt: skip


def test_held_out_domain(images, describe, tmp_path):
    for domain in ("clay", "photo", "sketch"):
        images(f"shapes/{domain}", {"disc": 8, "star": 8})
    data = read_dataset(describe("shapes", reader="domains"), tmp_path)
    plan = domain_generalization(data, 4, 1, held_out="clay")
    assert {s.domain for s in plan.images.train} == {"photo", "sketch"}
    source, target = plan.evaluations
    assert {s.domain for s in source.data.splits["test"]} == {"photo", "sketch"}
    assert (target.name, len(target.data.splits["test"])) == ("clay", 16)
    assert {s.domain for s in target.data.splits["test"]} == {"clay"}
    with pytest.raises(ValueError, match=r"^--held-out must be one of clay, photo, sketch, but is None\.$"):
        domain_generalization(data, 4, 1)
    assert held_out_domains("all", data) == ["clay", "photo", "sketch"]
    assert held_out_domains("clay", data) == ["clay"] and held_out_domains(None, data) == [None]
    assert {s.domain for split in without_domain(data, "clay").splits.values() for s in split} == {"photo", "sketch"}
    with pytest.raises(ValueError, match=r"^--held-out must be one of clay, photo, sketch, but is 'wood'\.$"):
        without_domain(data, "wood")
    alone = without_domain(without_domain(data, "clay"), "photo")  # one domain that has a name
    assert [e.name for e in domain_generalization(alone, 2, 1).evaluations] == ["source", *SHIFTS]
    with pytest.raises(ValueError, match=r"^shapes has one domain; --held-out is for data sets of several\.$"):
        without_domain(alone, "sketch")
    with pytest.raises(ValueError, match=r"^--held-out all needs several domains, but pets has one\.$"):
        held_out_domains("all", replace(data, name="pets", splits={"train": [], "val": [], "test": []}))
