"""Averages of base-to-new over cells: over all of them, over those of one number of shots, over those of one model.

A cell is the table of one data set, on one model, at one number of shots; each has the same weight. An average is over
the methods that have all of its cells.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from intervals import BASE_TO_NEW
from tables import AVERAGE, ON, Key, Tables, common, order, title_of, with_scores


def average_tables(tables: Tables) -> Tables:
    """The averages of tables, that over all cells first; none where no method has all of its cells."""
    found: Tables = {}
    for key, cells in averaged_cells(tables).items():
        names = [name for name in tables[cells[0]] if all(name in tables[cell] for cell in cells)]
        if names:
            found[key] = order({name: average_row([tables[cell][name] for cell in cells]) for name in names})
    return found


def averaged_cells(tables: Tables) -> dict[Key, list[Key]]:
    """The key of each average -> its cells, at least two, and not the same as those of an average before it."""
    cells = [key for key in tables if key[0] == BASE_TO_NEW and not key[1].startswith(AVERAGE)]
    shots, models = sorted({cell[2] or 0 for cell in cells}), sorted({model_of(cell) for cell in cells})
    groups = [cells]
    groups += [[cell for cell in cells if cell[2] == number] for number in shots]
    groups += [[cell for cell in cells if model_of(cell) == model] for model in models]
    found: dict[Key, list[Key]] = {}
    for group in groups:
        if len(group) > 1 and group not in found.values():
            found[average_key(group)] = group
    return found


def average_key(cells: list[Key]) -> Key:
    """The key of an average over cells, whose name says of how many, of which model and of which numbers of shots."""
    shots = sorted({cell[2] or 0 for cell in cells})
    sets, models = {dataset_of(cell) for cell in cells}, {model_of(cell) for cell in cells}
    what = "cells"
    if len(sets) == len(cells):
        what = "data sets"
    elif len({cell[1] for cell in cells}) == len(cells):
        what = "data sets and models"
    (model,) = models if len(models) == 1 else ("",)
    name = f"{AVERAGE} {len(cells)} {what}" + (f"{ON}{model}" if model else "")
    if len(shots) == 1:
        return BASE_TO_NEW, name, shots[0]
    return BASE_TO_NEW, f"{name}, {', '.join(map(str, shots[:-1]))} and {shots[-1]} shots", None


def is_of_one_model(key: Key) -> bool:
    """Whether a table is an average over the cells of one model of several."""
    return key[1].startswith(AVERAGE) and ON in key[1]


def dataset_of(cell: Key) -> str:
    return cell[1].split(ON)[0]


def model_of(cell: Key) -> str:
    """The model of a cell; "" where all are of the same."""
    return cell[1].partition(ON)[2]


def average_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One method's rows in several cells -> its average."""
    columns = {}
    for name in rows[0]["columns"]:
        values = [row["columns"][name]["mean"] for row in rows if row["columns"][name]]
        columns[name] = {"mean": mean(values), "std": None} if len(values) == len(rows) else None
    parts = [part for row in rows for part in row["parts"]]
    return with_scores({"columns": columns, **common(rows)}, BASE_TO_NEW, parts if len(parts) == len(rows) else [])


def notes_of(tables: Tables) -> dict[Key, str]:
    """What each average is over, and which methods it leaves out, as sentences."""
    notes = {}
    for key, cells in averaged_cells(tables).items():
        have = {name: sum(name in tables[cell] for cell in cells) for cell in cells for name in tables[cell]}
        missing = [f"{name} ({count})" for name, count in sorted(have.items()) if count < len(cells)]
        note = f"Over {len(cells)} cells: {'; '.join(title_of(cell) for cell in cells)}."
        if missing:
            note += f" Left out, because they have fewer of these cells: {', '.join(missing)}."
        notes[key] = note
    return notes
