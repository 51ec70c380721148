"""The few-shot draw, and the halves of the classes for base-to-new, as https://github.com/KaiyangZhou/CoOp does it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import ceil

from readers import UNREADABLE, ImageSet, Sample


#: Validation images a class, at most.
VAL_SHOTS = 4


@dataclass(frozen=True)
class Draw:
    """Images to train and to tune on, and those that were drawn but cannot be read."""

    train: list[Sample]
    val: list[Sample]
    unreadable: list[str]


def draw(data: ImageSet, shots: int, seed: int) -> Draw:
    """`shots` training images a class and `min(shots, 4)` for validation, drawn with a seed.

    The order of draws is that of the field's code, so equal seeds and split files give equal images. One that cannot
    be read is replaced by another of its class, drawn afterwards.

    Raises:
        ValueError: a class has no image to train on that can be read.
    """
    rng = random.Random(seed)
    counts = {"train": shots, "val": min(shots, VAL_SHOTS)}
    drawn = {split: sample_classes(data.splits[split], count, rng) for split, count in counts.items()}
    unreadable: list[str] = []
    for split, classes in drawn.items():
        for label, samples in classes.items():
            taken = set(samples)
            spare = [s for s in data.splits[split] if s.label == label and s not in taken]
            random.Random(seed).shuffle(spare)
            classes[label] = [s for s in (replace_broken(data, s, spare, unreadable) for s in samples) if s]
    if empty := [data.classes[i] for i in range(len(data.classes)) if not drawn["train"].get(i)]:
        raise ValueError(f"{data.name}: no training image that can be read for {', '.join(empty)}.")
    train, val = ([s for samples in drawn[split].values() for s in samples] for split in ("train", "val"))
    return Draw(train, val, unreadable)


def sample_classes(samples: list[Sample], count: int, rng: random.Random) -> dict[int, list[Sample]]:
    """Label -> `count` of its samples, all where there are no more; classes in the order of their first sample."""
    classes: dict[int, list[Sample]] = {}
    for sample in samples:
        classes.setdefault(sample.label, []).append(sample)
    return {label: rng.sample(own, count) if len(own) >= count else own for label, own in classes.items()}


def replace_broken(data: ImageSet, sample: Sample, spare: list[Sample], unreadable: list[str]) -> Sample | None:
    """The sample itself, or the next of `spare` that can be read; None where none is left."""
    while True:
        try:
            data.open(sample.key)
            return sample
        except UNREADABLE:
            unreadable.append(sample.key)
            if not spare:
                return None
            sample = spare.pop()


def halves(classes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Base and new classes: the first ceil(C / 2) labels, and the rest."""
    middle = ceil(len(classes) / 2)
    return list(classes[:middle]), list(classes[middle:])
