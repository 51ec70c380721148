"""What tuning has tried: every candidate with its accuracies on validation images, and what it cost each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from intervals import BASE_TO_NEW, score_of
from markdown import heading, line, score_name
from protocols import shifted_name
from tables import read
from transforms import SHIFTS


#: What a budget counts, and its heading.
COUNTS = {
    "candidates": "candidates",
    "runs": "runs",
    "training_steps": "training steps",
    "training_images": "images in them",
    "training_seconds": "seconds of training",
    "evaluation_seconds": "of evaluation",
}
Run = dict[str, Any]
#: Evaluation -> accuracy.
Accuracies = dict[str, float | None]


def tried(folder: Path) -> dict[str, Any]:
    """Everything that was tuned for one protocol.

    Args:
        folder: with place/method/candidate/seed_*/.

    Returns:
        the "protocol"; by method the "budget": how many candidates, runs, training steps and images in their batches
        there were, and seconds of training and of evaluation; and "candidates", those of each method by their score,
        best first.
    """
    runs: list[Run] = [
        {**read(file.parent / "settings.json"), **read(file), "place": file.parts[-5], "candidate": file.parts[-3]}
        for file in sorted(folder.glob("*/*/*/seed_*/results.json"))
    ]
    grouped: dict[tuple, list[Run]] = {}
    for run in runs:
        key = (run["method"]["name"], run["candidate"], run["shots"], run["model"])
        grouped.setdefault(key, []).append(run)
    rows = [row_of(own, folder.name) for own in grouped.values()]
    rows.sort(key=lambda row: (row["method"], row["score"] is None, -(row["score"] or 0.0)))
    methods = sorted({run["method"]["name"] for run in runs})
    budget = {name: budget_of([run for run in runs if run["method"]["name"] == name]) for name in methods}
    return {"protocol": folder.name, "budget": budget, "candidates": rows}


def budget_of(runs: list[Run]) -> dict[str, float]:
    """What the runs of one method took together."""
    candidates = {(run["candidate"], run["shots"], run["model"]) for run in runs}
    sums = {name: sum(run[name] for run in runs) for name in COUNTS if name not in ("candidates", "runs")}
    return {"candidates": len(candidates), "runs": len(runs), **sums}


def row_of(runs: list[Run], protocol: str) -> dict[str, Any]:
    """One candidate: its means over seeds in each place, over places, and its score by which candidates are ordered."""
    by_place: dict[str, list[Run]] = {}
    for run in runs:
        by_place.setdefault(run["place"], []).append(run)
    places = {place: means_of([accuracies(run) for run in own]) for place, own in by_place.items()}
    own, shifted = zip(*(apart(found) for found in places.values()), strict=True)
    return {
        "method": runs[0]["method"]["name"],
        "candidate": runs[0]["candidate"],
        "shots": runs[0]["shots"],
        "model": runs[0]["model"],
        "config": runs[0]["method"]["config"],
        "recipe": runs[0]["method"]["recipe"],
        "score": score_over(own, protocol),
        "shifted": mean(mean(found.values()) for found in shifted) if all(shifted) else None,
        "columns": means_of(own) if len({tuple(found) for found in own}) == 1 else {},  # other sources or domains
        "seeds": min(map(len, by_place.values())),
        "places": places,
    }


def accuracies(run: Run) -> Accuracies:
    """In percent; None where the method cannot tell these classes apart."""
    return {name: result["accuracy"] if result else None for name, result in run["results"].items()}


def means_of(found: Sequence[Accuracies]) -> Accuracies:
    """Of each evaluation that all have; None where one of these is not defined."""
    names = [name for name in found[0] if all(name in each for each in found)]
    return {
        name: None if None in (values := [each[name] for each in found]) else float(np.mean(values)) for name in names
    }


def apart(found: Accuracies) -> tuple[Accuracies, Accuracies]:
    """What the protocol measures, and the first of it under each shift, which is measured beside it with --shifts."""
    beside = [shifted_name(next(iter(found)), shift) for shift in SHIFTS]
    return tuple({n: value for n, value in found.items() if (n in beside) == shifted} for shifted in (False, True))


def score_over(places: Sequence[Accuracies], protocol: str) -> float | None:
    """The protocol's score over places: of base-to-new of their average, as in tables, else the average of scores."""
    if any(value is None for found in places for value in found.values()):
        return None
    if protocol == BASE_TO_NEW:
        return float(score_of(protocol, means_of(places)))
    return float(np.mean([score_of(protocol, found) for found in places]))


def to_text(found: dict[str, Any]) -> str:
    """The best candidate of each method, and what all of them took, as Markdown."""
    places = sorted({place for row in found["candidates"] for place in row["places"]})
    score = score_name(found["protocol"], places[0]) or "accuracy"
    best = {row["method"]: row for row in reversed(found["candidates"])}
    shown = {"score": score} | (
        {"shifted": "shifted"} if any(row["shifted"] is not None for row in best.values()) else {}
    )
    lines = heading(["method", "best candidate", *shown.values()])
    for method, row in sorted(best.items()):
        values = ["–" if row[name] is None else f"{row[name]:.1f}" for name in shown]
        lines.append(line(method, [row["candidate"], *values]))
    lines += ["", *heading(["method", *COUNTS.values()])]
    for method, counts in found["budget"].items():
        lines.append(line(method, [f"{counts[name]:,.0f}" for name in COUNTS]))
    return "\n".join(lines)
