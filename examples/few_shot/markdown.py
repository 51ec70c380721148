"""Tables as Markdown: accuracies in percent with their spread and intervals, and paired differences."""

from __future__ import annotations

from typing import Any

from intervals import BASE_TO_NEW, CROSS_DATASET, FEW_SHOT, SHIFTED
from tables import EACH_HELD_OUT, WITHOUT, ZERO_SHOT, Key, title_of


#: What the score of a protocol is called in a table; few-shot has it as its only column.
SCORES = {BASE_TO_NEW: "H", CROSS_DATASET: "average of targets", SHIFTED: "average of shifted", FEW_SHOT: None}


def score_name(protocol: str, dataset: str) -> str | None:
    """What the score of a table is called; None where its only column has it."""
    if protocol == SHIFTED and EACH_HELD_OUT in dataset:
        return "average of domains"
    if protocol == SHIFTED and WITHOUT in dataset:
        return "held-out domain"
    return SCORES.get(protocol, "average")


def to_markdown(key: Key, rows: dict[str, dict[str, Any]], against: str, note: str = "") -> str:
    """A table of accuracies, and one of the differences from `against`, where there are any.

    Accuracies are means and standard deviations over seeds, the score with its interval of 95 %; the best of each
    column is bold. Differences are bold where their interval leaves out 0.

    Args:
        note: a line below the accuracies.
    """
    protocol, dataset, _ = key
    score = score_name(protocol, dataset)
    lines = [f"### {protocol}, {title_of(key)}", ""]
    lines += accuracies(rows, score) if rows else ["No method has all of its cells."]
    lines += ["", note] if note else []
    if rows and ZERO_SHOT not in rows:
        lines += ["", "Zero-shot is missing here; run it with `--method zero-shot`."]
    if any(row.get("differences") for row in rows.values()):
        lines += ["", f"Differences from {against}, of the same runs and images:", ""]
        lines += differences(rows, score)
    return "\n".join([*lines, ""])


def accuracies(rows: dict[str, dict[str, Any]], score: str | None) -> list[str]:
    names = list(next(iter(rows.values()))["columns"])
    head = ["method", *names, *([score] if score else []), "ECE", "trained parameters", "seconds", "seeds"]
    best = {name: largest([row["columns"].get(name) for row in rows.values()]) for name in names}
    scores = {
        method: None if row["score"] is None else {"mean": row["score"], "std": None, "interval": row["interval"]}
        for method, row in rows.items()
    }
    lines = heading(head)
    for method, row in rows.items():
        cells = [cell(row["columns"].get(name), best[name]) for name in names]
        cells += [cell(scores[method], largest(list(scores.values())), with_interval=True)] if score else []
        error = "–" if row["ece"] is None else f"{row['ece']:.1f}"
        cells += [error, parameters(row), f"{row['seconds']:.0f}", seeds(row)]
        lines.append(line(method, cells))
    return lines


def parameters(row: dict[str, Any]) -> str:
    """How many are trained: "1,234", or "1,234 to 5,678" in an average over models."""
    numbers = row["parameters"] if isinstance(row["parameters"], list) else [row["parameters"]]
    return " to ".join(f"{number:,}" for number in numbers)


def seeds(row: dict[str, Any]) -> str:
    """How many runs there are: "3", or "1 to 3" where cells have different numbers."""
    each = row["seeds"] if isinstance(row["seeds"][0], list) else [row["seeds"]]
    counts = sorted({len(own) for own in each})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def differences(rows: dict[str, dict[str, Any]], score: str | None) -> list[str]:
    found = {method: row["differences"] for method, row in rows.items() if row.get("differences")}
    names = [name for name in next(iter(rows.values()))["columns"] if any(name in row for row in found.values())]
    shown = [*names, *(["score"] if score and any("score" in row for row in found.values()) else [])]
    lines = heading(["method", *(score if name == "score" else name for name in shown)])
    return [*lines, *(line(method, [signed(row.get(name)) for name in shown]) for method, row in found.items())]


def heading(names: list[str]) -> list[str]:
    return [line(names[0], names[1:]), "|---" * len(names) + "|"]


def line(method: str, cells: list[str]) -> str:
    return f"| {method} | " + " | ".join(cells) + " |"


def largest(values: list[dict[str, Any] | None]) -> float | None:
    return max((value["mean"] for value in values if value), default=None)


def cell(value: dict[str, Any] | None, best: float | None, with_interval: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")
    if with_interval and value["interval"]:
        text += " ({:.1f} to {:.1f})".format(*value["interval"])
    return f"**{text}**" if value["mean"] == best else text


def signed(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    low, high = value["interval"]
    text = f"{value['mean']:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text
