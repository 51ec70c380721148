"""Finished runs -> tables: mean and spread over seeds, harmonic means, averages over data sets."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any


ZERO_SHOT = "zero-shot"
#: What the name of an average over data sets begins with.
AVERAGE = "average of"
#: A table's key -> its rows, each a method with mean and spread per column.
Tables = dict[tuple[str, str, int], dict[str, dict[str, Any]]]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Settings and outcome of every finished run."""
    files = sorted(folder.glob("*/*/*/shots_*/seed_*/results.json"))
    return [{"settings": read(file.parent / "settings.json"), **read(file)} for file in files]


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def make_tables(runs: list[dict[str, Any]]) -> Tables:
    """One table per protocol, data set and number of shots; zero-shot does not depend on shots and stands in each."""
    grouped: dict[tuple[str, str, int], dict[str, list]] = {}
    zero_shot = {}
    for run in runs:
        settings = run["settings"]
        place, name = (settings["protocol"], settings["dataset"]), settings["method"]["name"]
        grouped.setdefault((*place, settings["shots"]), {}).setdefault(name, []).append(run)
        if name == ZERO_SHOT:
            zero_shot[place] = grouped[(*place, settings["shots"])][name]
    for (*place, _), methods in grouped.items():
        if tuple(place) in zero_shot:
            methods.setdefault(ZERO_SHOT, zero_shot[tuple(place)])
    return {
        key: order({name: make_row(runs) for name, runs in methods.items()}) for key, methods in sorted(grouped.items())
    }


def make_row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every evaluation, and the harmonic mean of the averages."""
    columns = {}
    for name in runs[0]["results"]:
        values = [run["results"][name]["accuracy"] for run in runs if run["results"][name]]
        columns[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None} if values else None
    row = {"seeds": sorted(run["settings"]["seed"] for run in runs), "columns": columns}
    row["parameters"] = runs[0]["trained_parameters"]
    row["seconds"] = mean(run["training_seconds"] for run in runs)
    add_score(row)
    return row


def add_score(row: dict[str, Any]) -> None:
    """What methods are ordered by: the harmonic mean for base and new, else the mean of all columns but the source."""
    columns = row["columns"]
    if set(columns) == {"base", "new"}:
        base, new = (columns[name]["mean"] if columns[name] else 0.0 for name in ("base", "new"))
        row["harmonic"] = 2 * base * new / (base + new) if base and new else None
        row["score"] = row["harmonic"]
    else:
        values = [value["mean"] for value in columns.values() if value]
        shifted = values[1:] or values  # the first is the source
        row["score"] = mean(shifted)


def add_earlier(tables: Tables, summary: list[dict[str, Any]]) -> Tables:
    """Tables with the rows of an earlier summary.json for methods that have none; averages are to be made anew."""
    merged = {key: dict(rows) for key, rows in tables.items()}
    for entry in summary:
        if not entry["dataset"].startswith(AVERAGE):
            rows = merged.setdefault((entry["protocol"], entry["dataset"], entry["shots"]), {})
            rows.update({name: row for name, row in entry["methods"].items() if name not in rows})
    return {key: order(rows) for key, rows in sorted(merged.items())}


def order(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Zero-shot first, then from the lowest score to the highest; without a score last."""

    def place(item: tuple[str, dict[str, Any]]) -> tuple:
        method, row = item
        return method != ZERO_SHOT, row["score"] is None, row["score"] or 0.0

    return dict(sorted(rows.items(), key=place))


def average_tables(tables: Tables) -> Tables:
    """Base-to-new over all data sets, for methods that have all of them."""
    found: Tables = {}
    for shots in sorted({key[2] for key in tables if key[0] == "base-to-new"}):
        parts = [rows for (protocol, _, s), rows in tables.items() if (protocol, s) == ("base-to-new", shots)]
        names = [name for name in parts[0] if all(name in rows for rows in parts)]
        if len(parts) > 1 and names:
            key = ("base-to-new", f"{AVERAGE} {len(parts)} data sets", shots)
            found[key] = order({name: average_row([rows[name] for rows in parts]) for name in names})
    return found


def average_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {}
    for name in rows[0]["columns"]:
        values = [row["columns"][name]["mean"] for row in rows if row["columns"][name]]
        columns[name] = {"mean": mean(values), "std": None} if len(values) == len(rows) else None
    row = {"seeds": rows[0]["seeds"], "columns": columns, "parameters": rows[0]["parameters"]}
    row["seconds"] = mean(r["seconds"] for r in rows)
    add_score(row)
    return row
