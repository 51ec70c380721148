"""What to know before a measured accuracy is trusted: sentences on the images, the classes and the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..classifier.calibration import Calibration
from ..words import are, counted
from .duplicates import Duplicate
from .evaluation import Evaluation
from .folders import Samples
from .history import History


#: Classes are uneven where one has so many times the images of another.
UNEVEN = 3


class Finding(NamedTuple):
    """Something to know.

    Args:
        text: a sentence.
        items: what it counts, one by one; may be empty.
    """

    text: str
    items: Sequence[str] = ()


def find(
    names: Sequence[str],
    evaluations: Mapping[str, Evaluation],
    zero_shot: Mapping[str, Evaluation],
    training: Samples,
    calibration: Calibration | None,
    history: History | None,
    unreadable: Mapping[Any, str],
    duplicates: Mapping[str, Sequence[Duplicate]],
) -> list[Finding]:
    """Everything that was found, what weighs most first; arguments as for `write_report`."""
    found = [*_of_results(evaluations, zero_shot), *_of_duplicates(duplicates, evaluations)]
    if history is not None and history.stopped is not None:
        found.append(Finding(f"The training was stopped by {history.stopped} {history}."))
    found += not_tested(names, evaluations, training)
    counts = {"training": Counter(name for _, name in training)} if training else {}
    counts |= {part: Counter(each.count) for part, each in evaluations.items()}
    found += [finding for part, count in counts.items() if (finding := uneven(part, count)) is not None]
    found += of_unreadable(unreadable)
    if calibration is None:
        found.append(Finding("Scores are not calibrated: they may be far surer than they are right."))
    return found


def _of_results(evaluations: Mapping[str, Evaluation], zero_shot: Mapping[str, Evaluation]) -> Iterable[Finding]:
    for part, each in evaluations.items():
        base = zero_shot.get(part)
        if base is not None and each.accuracy < base.accuracy:
            yield Finding(
                f"On {part} the adapter is worse than zero-shot: {each.accuracy:.1f} % where the base model alone has "
                f"{base.accuracy:.1f} %."
            )
    if not evaluations:
        yield Finding("There were no images to test on, so nobody knows how often the adapter is right.")


def _of_duplicates(
    duplicates: Mapping[str, Sequence[Duplicate]], evaluations: Mapping[str, Evaluation]
) -> Iterable[Finding]:
    for part, found in duplicates.items():
        if not found:
            continue
        other = sum(each.label != each.other_label for each in found)
        told = f" {other} of them {'has' if other == 1 else 'have'} another class there." if other else ""
        count, verb = (
            f"{len(found)} of {counted(evaluations[part].images, 'image')} of {part}",
            are(len(found)),
        )
        yield Finding(
            f"{count} {verb} nearly the same as one that was trained on: on those, accuracy says little.{told}"
        )


def not_tested(names: Sequence[str], evaluations: Mapping[str, Evaluation], training: Samples) -> list[Finding]:
    """Of classes without an image to test on."""
    tested = {name for each in evaluations.values() for name in each.count}
    counts = Counter(name for _, name in training)
    missing = [name for name in names if name not in tested]
    if not missing or not evaluations:
        return []
    items = [
        f"{name}: {counted(counts[name], 'image')}, all used for training" if counts[name] else f"{name}: no images"
        for name in missing
    ]
    noun = counted(len(missing), "class", "classes")
    return [Finding(f"{noun} {_were(len(missing))} not tested.", items)]


def uneven(part: str, counts: Mapping[str, int]) -> Finding | None:
    """Of classes that have many more images than others; None where they are even."""
    if not counts:
        return None
    (most, high), (least, low) = (pick(counts.items(), key=lambda item: item[1]) for pick in (max, min))
    if high < UNEVEN * low:
        return None
    weighs = "" if part == "training" else " The mean over classes weighs them all alike."
    return Finding(f"Images of {part} are uneven: {low} of {least}, but {high} of {most}.{weighs}")


def of_unreadable(unreadable: Mapping[Any, str]) -> list[Finding]:
    """Of images that were left out, each with what is wrong with it."""
    if not unreadable:
        return []
    text = f"{counted(len(unreadable), 'image')} cannot be read and {_were(len(unreadable))} left out."
    return [Finding(text, list(unreadable.values()))]


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
