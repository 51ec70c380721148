"""The field's four protocols as plans: which images train, and what is evaluated afterwards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from readers import ImageSet
from sampling import Draw, draw, halves, sample_classes
from transforms import SHIFTS


@dataclass(frozen=True)
class Measurement:
    """One number to measure: accuracy on the test images of `data` among its classes.

    Args:
        name: of the number, such as "base".
        data: restricted to the classes that are told apart.
        shift: name of a shift that every image goes through, or "".
        split: "test", or "val" when tuning.
    """

    name: str
    data: ImageSet
    shift: str = ""
    split: str = "test"


@dataclass(frozen=True)
class Plan:
    """Train on `images` of `data`, then evaluate."""

    data: ImageSet
    images: Draw
    evaluations: list[Measurement]


def base_to_new(data: ImageSet, shots: int, seed: int) -> Plan:
    """Train on the first half of the classes; test both halves, each among its own classes."""
    base, new = (data.only(names) for names in halves(data.classes))
    # drawn from all classes first, as the field's code does
    images = keep(draw(data, shots, seed), len(base.classes))
    return Plan(base, images, [Measurement("base", base), Measurement("new", new)])


def few_shot(data: ImageSet, shots: int, seed: int) -> Plan:
    """Train and test on all classes."""
    return Plan(data, draw(data, shots, seed), [Measurement("all", data)])


def cross_dataset(data: ImageSet, shots: int, seed: int, targets: Sequence[ImageSet]) -> Plan:
    """Train on all classes of one data set, test on it and, with their class names, on others.

    Raises:
        ValueError: no target.
    """
    if not targets:
        raise ValueError("The cross-dataset protocol needs data sets to test on: name them with --targets.")
    evaluations = [Measurement(target.name, target) for target in (data, *targets)]
    return Plan(data, draw(data, shots, seed), evaluations)


def domain_generalization(data: ImageSet, shots: int, seed: int, held_out: str | None = None) -> Plan:
    """Train on what the model knows, test on what is shifted.

    With several domains: train on all but `held_out`, test on it. With one: test on the test images as they are
    ("source") and shifted in four ways.

    Raises:
        ValueError: `held_out` is no domain, or missing where there are several.
    """
    if len(data.domains) < 2:
        shifted = [Measurement(name, data, shift=name) for name in SHIFTS]
        return Plan(data, draw(data, shots, seed), [Measurement("source", data), *shifted])
    if held_out not in data.domains:
        raise ValueError(f"--held-out must be one of {', '.join(data.domains)}, but is {held_out!r}.")
    inside, outside = (
        replace(data, splits={k: [s for s in v if (s.domain == held_out) == out] for k, v in data.splits.items()})
        for out in (False, True)
    )
    # the held-out domain is never trained on, so all of its images test
    everything = [sample for samples in outside.splits.values() for sample in samples]
    outside = replace(outside, splits={**outside.splits, "test": everything})
    return Plan(inside, draw(inside, shots, seed), [Measurement("source", inside), Measurement(held_out, outside)])


def held_out_domains(wanted: str | None, data: ImageSet) -> list[str | None]:
    """The domains that are held out, each in cells of its own.

    Raises:
        ValueError: all are wanted, but there is one.
    """
    if wanted != "all":
        return [wanted]
    if len(data.domains) < 2:
        raise ValueError(f"--held-out all needs several domains, but {data.name} has one.")
    return list(data.domains)


PROTOCOLS = {
    "base-to-new": base_to_new,
    "few-shot": few_shot,
    "cross-dataset": cross_dataset,
    "domain-generalization": domain_generalization,
}


def without_domain(data: ImageSet, domain: str | None) -> ImageSet:
    """The images of all other domains.

    Raises:
        ValueError: it is no domain, or the only one.
    """
    if len(data.domains) < 2:
        raise ValueError(f"{data.name} has one domain; --held-out is for data sets of several.")
    if domain not in data.domains:
        raise ValueError(f"--held-out must be one of {', '.join(data.domains)}, but is {domain!r}.")
    return replace(data, splits={k: [s for s in v if s.domain != domain] for k, v in data.splits.items()})


def on_validation(plan: Plan) -> Plan:
    """The same plan measured on validation images, shifted ones as well, for tuning.

    Raises:
        ValueError: there are none.
    """
    for evaluation in plan.evaluations:
        if not evaluation.data.splits["val"]:
            raise ValueError(f"{evaluation.data.name} has no validation images, which tuning needs.")
    return replace(plan, evaluations=[replace(e, split="val") for e in plan.evaluations])


def with_shifts(plan: Plan) -> Plan:
    """The same plan, which measures its first evaluation, that of the classes that are trained, shifted as well."""
    first = plan.evaluations[0]
    shifted = [replace(first, name=shifted_name(first.name, shift), shift=shift) for shift in SHIFTS]
    return replace(plan, evaluations=[*plan.evaluations, *shifted])


def shifted_name(name: str, shift: str) -> str:
    """What an evaluation is called under a shift."""
    return f"{name}, {shift}"


def limited(plan: Plan, count: int) -> Plan:
    """The same plan measured on at most `count` images of each class, the same for every method and seed."""
    return replace(plan, evaluations=[replace(e, data=few(e.data, e.split, count)) for e in plan.evaluations])


def few(data: ImageSet, split: str, count: int) -> ImageSet:
    """At most `count` images of each class in one part of a data set, drawn with a seed of its own."""
    drawn = sample_classes(data.splits[split], count, random.Random(0))
    kept = {sample for samples in drawn.values() for sample in samples}
    return replace(data, splits={**data.splits, split: [sample for sample in data.splits[split] if sample in kept]})


def keep(images: Draw, count: int) -> Draw:
    """The part of the first `count` labels."""
    return replace(
        images,
        train=[sample for sample in images.train if sample.label < count],
        val=[sample for sample in images.val if sample.label < count],
    )
