"""Finished runs -> tables: means and spreads over seeds, harmonic means, averages, intervals and paired differences.

A row of a table holds

    columns       evaluation -> mean and standard deviation over seeds, and its interval; None where it is not defined
    seeds         of the runs; where several tables were joined whose rows have other seeds, a list of them for each
    parameters    that are trained; where they differ between joined tables, the least and the most
    score         what methods are ordered by, see `intervals.score_of`, and its interval as "interval"
    ece           mean calibration error over evaluations and seeds, in percent
    differences   from the method that all are compared with: mean and interval for each column and the "score"

and, until it is written, the "parts" that intervals are made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from intervals import BASE_TO_NEW, Part, difference, intervals_of, score_of


ZERO_SHOT = "zero-shot"
#: What the name of an average over data sets begins with.
AVERAGE = "average of"
#: What stands between the names of a data set and of a model, where there are several models.
ON = " on "
#: What stands between the names of a data set and of a domain that was held out.
WITHOUT = "-without-"
#: What stands after the name of a data set whose domains were held out in turn.
EACH_HELD_OUT = ", each domain held out"
#: Of a table: protocol, data set and shots; None in an average over several numbers of shots, whose name says them.
Key = tuple[str, str, int | None]
#: A table's rows by method.
Tables = dict[Key, dict[str, dict[str, Any]]]
#: As `Tables`, but for each method its runs.
Grouped = dict[Key, dict[str, list[dict[str, Any]]]]


def read_runs(*folders: Path) -> list[dict[str, Any]]:
    """Settings and outcome of every finished run."""
    files = [file for folder in folders for file in sorted(folder.glob("*/*/*/shots_*/seed_*/results.json"))]
    return [{"settings": read(file.parent / "settings.json"), **read(file)} for file in files]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def title_of(key: Key) -> str:
    """What a table is of, beside its protocol."""
    _, dataset, shots = key
    return dataset if shots is None else f"{dataset}, {shots} shot{'s' * (shots != 1)}"


def make_tables(runs: list[dict[str, Any]]) -> Tables:
    """One table per protocol, data set and number of shots; zero-shot does not depend on shots and stands in each.

    Where the runs are of several models, the names of data sets say which. Domains that were each held out are in one
    table beside those of their own.
    """
    grouped = group(runs)
    tables = {key: {name: make_row(runs, key[0]) for name, runs in methods.items()} for key, methods in grouped.items()}
    tables |= held_out_tables(grouped, tables)
    return {key: order(rows) for key, rows in sorted(tables.items())}


def group(runs: list[dict[str, Any]]) -> Grouped:
    """The runs of each table and method."""
    grouped: Grouped = {}
    zero_shot = {}
    several = len({run["settings"].get("model") for run in runs}) > 1
    for run in runs:
        settings = run["settings"]
        model = f"{ON}{Path(settings['model']).name}" if several else ""
        place, name = (settings["protocol"], settings["dataset"] + model), settings["method"]["name"]
        grouped.setdefault((*place, settings["shots"]), {}).setdefault(name, []).append(run)
        if name == ZERO_SHOT:
            zero_shot[place] = grouped[(*place, settings["shots"])][name]
    for (*place, _), methods in grouped.items():
        if tuple(place) in zero_shot:
            methods.setdefault(ZERO_SHOT, zero_shot[tuple(place)])
    return grouped


def make_row(runs: list[dict[str, Any]], protocol: str) -> dict[str, Any]:
    """What the runs of one method say."""
    columns: dict[str, Any] = {}
    part = Part(runs[0]["settings"]["dataset"], {})
    for name in runs[0]["results"]:
        found = {run["settings"]["seed"]: run["results"][name] for run in runs if run["results"][name]}
        values = [result["accuracy"] for result in found.values()]
        columns[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None} if values else None
        images = {seed: np.array(list(result.get("correct", "")), float) for seed, result in found.items()}
        if len(set(map(len, images.values())) - {0}) == 1:  # unreadable images are not the same ones
            part.right[name] = images
    row = {"seeds": sorted(run["settings"]["seed"] for run in runs), "columns": columns}
    row["parameters"] = runs[0]["trained_parameters"]
    row["seconds"] = mean(run["training_seconds"] for run in runs)
    errors = [result["ece"] for run in runs for result in run["results"].values() if result and "ece" in result]
    row["ece"] = mean(errors) if errors else None
    return with_scores(row, protocol, [part])


def with_scores(row: dict[str, Any], protocol: str, parts: list[Part]) -> dict[str, Any]:
    """The row with its score, and with intervals where `parts` say whether each image was right."""
    means = {name: value["mean"] for name, value in row["columns"].items() if value}
    whole = bool(means) and len(means) == len(row["columns"])
    whole = whole and (protocol != BASE_TO_NEW or set(means) == {"base", "new"})
    row |= {"score": float(score_of(protocol, means)) if whole else None, "parts": parts}
    found = intervals_of(parts, protocol) if parts and all(part.right for part in parts) else {}
    for name, ends in found.items():
        if name != "score":
            row["columns"][name]["interval"] = ends
    row["interval"] = found.get("score") if whole and set(found) == {*means, "score"} else None
    return row


def held_out_tables(grouped: Grouped, tables: Tables) -> Tables:
    """For data sets of which several domains were held out in turn a table with a column for each of these domains."""
    found: dict[Key, dict[str, dict[str, dict]]] = {}  # key -> method -> domain -> row
    for (protocol, place, shots), methods in grouped.items():
        for name, runs in methods.items():
            if (domain := runs[0]["settings"].get("held_out")) is not None:
                key = (protocol, place.replace(f"{WITHOUT}{domain}", EACH_HELD_OUT), shots)
                row = tables[protocol, place, shots][name]
                found.setdefault(key, {}).setdefault(name, {})[domain] = row
    joined: Tables = {}
    for key, methods in found.items():
        domains = {domain for of_method in methods.values() for domain in of_method}
        whole = {name: of_method for name, of_method in methods.items() if set(of_method) == domains}
        if len(domains) > 1 and whole:
            joined[key] = {name: join(of_method, key) for name, of_method in whole.items()}
    return joined


def join(rows: dict[str, dict[str, Any]], key: Key) -> dict[str, Any]:
    """The rows of one method with each domain held out -> a row with a column for each."""
    parts = {domain: row["parts"][0] for domain, row in sorted(rows.items())}
    right = {domain: part.right[domain] for domain, part in parts.items() if domain in part.right}
    columns = {domain: dict(row["columns"][domain]) for domain, row in sorted(rows.items())}
    joined = {"columns": columns, **common(list(rows.values()))}
    return with_scores(joined, key[0], [Part(key[1], right)] if len(right) == len(rows) else [])


def common(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seeds and parameters of rows that become one, and mean seconds and calibration error."""
    seeds, parameters = [row["seeds"] for row in rows], [row["parameters"] for row in rows]
    errors = [row["ece"] for row in rows]
    return {
        "seeds": seeds[0] if all(own == seeds[0] for own in seeds) else seeds,
        "parameters": parameters[0] if len(set(parameters)) == 1 else [min(parameters), max(parameters)],
        "seconds": mean(row["seconds"] for row in rows),
        "ece": None if None in errors else mean(errors),
    }


def add_differences(tables: Tables, against: str) -> Tables:
    """The same tables, where every row has its paired differences from that of `against`."""
    for (protocol, *_), rows in tables.items():
        other = rows.get(against)
        for name, row in rows.items():
            compared = other is not None and name != against and row["parts"] and other["parts"]
            row["differences"] = difference(row["parts"], other["parts"], protocol) if compared else None
    return tables


def add_earlier(tables: Tables, summary: list[dict[str, Any]]) -> Tables:
    """Tables with the rows of an earlier summary.json for methods that have none; averages are to be made anew."""
    merged = {key: dict(rows) for key, rows in tables.items()}
    for entry in summary:
        if not entry["dataset"].startswith(AVERAGE):
            rows = merged.setdefault((entry["protocol"], entry["dataset"], entry["shots"]), {})
            known = {"ece": None, "interval": None, "parts": []}
            rows.update({name: known | row for name, row in entry["methods"].items() if name not in rows})
    return {key: order(rows) for key, rows in sorted(merged.items())}


def order(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Zero-shot first, then from the lowest score to the highest; without a score last."""

    def place(item: tuple[str, dict[str, Any]]) -> tuple:
        method, row = item
        return method != ZERO_SHOT, row["score"] is None, row["score"] or 0.0

    return dict(sorted(rows.items(), key=place))
