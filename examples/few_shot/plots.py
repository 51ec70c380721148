"""Drawings of the tables: at most eight methods each, labelled at their points, in colours that everybody tells apart.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), a method's the same in all drawings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from averages import is_of_one_model
from intervals import BASE_TO_NEW, CROSS_DATASET, FEW_SHOT, SOURCE
from labels import add_label, place_labels
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory, offset_copy
from tables import AVERAGE, EACH_HELD_OUT, WITHOUT, ZERO_SHOT, Key, Tables, title_of


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
#: Points of a panel's title, so that it is no wider than the panel.
TITLE_SIZE = 10
#: Methods in one drawing, and bars of differences in one panel.
MOST_METHODS, MOST_BARS = 8, 16
#: Least distance of two labels, in shares of the height of their panel.
LABEL_DISTANCE = 0.055
#: Lowest and highest place of a label, in the same shares.
LABEL_ENDS = (0.03, 0.97)
#: Least distance of two letters, in shares of the width of their panel.
LETTER_DISTANCE = 0.018
MARKERS = "osD^vPX<"


def chosen_methods(tables: Tables, against: str, wanted: list[str]) -> list[str]:
    """The methods to draw: those that are wanted, or zero-shot, `against` and the best of the first table.

    Raises:
        ValueError: more than eight are wanted, or one that no table has.
    """
    known = list(dict.fromkeys(name for rows in tables.values() for name in rows))
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"--drawn names {', '.join(unknown)}, but there are runs of {', '.join(known)} only.")
    if len(wanted) > MOST_METHODS:
        raise ValueError(f"--drawn takes at most {MOST_METHODS} methods, but got {len(wanted)}.")
    first = next(iter(tables.values()))
    best = sorted(first, key=lambda name: -(first[name]["score"] or 0.0))
    others = dict.fromkeys([ZERO_SHOT, against, *best, *known])
    return wanted or [name for name in others if name in known][:MOST_METHODS]


def plot_base_new(tables: Tables, drawn: list[str], file: Path, each: Path) -> None:
    """New-class accuracy against base-class accuracy with lines of equal harmonic mean, one panel a table.

    Args:
        each: file for the cells where there is an average, which is then alone in `file`.
    """
    found = {key: rows for key, rows in tables.items() if key[0] == BASE_TO_NEW}
    for part, place in averages_apart(found, file, each):
        draw_base_new(part, drawn, place)


def averages_apart(found: dict[Key, Any], file: Path, each: Path) -> list[tuple[dict[Key, Any], Path]]:
    """What to draw, and where: the average over all cells and the cells in files of their own, or cells in the first.

    Where no method has all cells, the averages are those of each number of shots.
    """
    averages = {key: value for key, value in found.items() if key[1].startswith(AVERAGE)}
    sets = {key: value for key, value in found.items() if key not in averages}
    shown = {key: value for key, value in averages.items() if not is_of_one_model(key)}
    over_all = {key: value for key, value in shown.items() if key[2] is None}
    return [(over_all or shown, file), (sets, each)] if shown else [(sets, file)]


def draw_base_new(tables: Tables, drawn: list[str], file: Path) -> None:
    for axes, (key, rows) in panels(tables, file, 4.6, 4.2):
        points = {m: rows[m]["columns"] for m in drawn if m in rows and all(rows[m]["columns"].values())}
        for method, columns in points.items():
            x, y = columns["base"], columns["new"]
            spread = {"xerr": x["std"], "yerr": y["std"], "elinewidth": 0.8}
            look = style(method, drawn)
            axes.errorbar(x["mean"], y["mean"], **spread, color=look["color"], alpha=0.35, zorder=2)
            # the first of `drawn` on top, and an edge, so that methods at one place are told apart
            place = 5 - 0.1 * drawn.index(method)
            axes.plot(x["mean"], y["mean"], **look, markeredgecolor="white", markeredgewidth=0.5, zorder=place)
        axes.margins(x=0.16, y=0.12)
        axes.set(title=title_of(key), xlabel="base classes, accuracy (%)", ylabel="new classes, accuracy (%)")
        draw_equal_scores(axes)
        for method, columns in points.items():
            point = columns["base"]["mean"], columns["new"]["mean"]
            add_label(axes, method, point, style(method, drawn)["color"])


def draw_equal_scores(axes: Axes) -> None:
    """Lines along which the harmonic mean is the same."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x, y = np.meshgrid(np.linspace(max(left, 0.1), right, 200), np.linspace(max(bottom, 0.1), top, 200))
    lines = axes.contour(x, y, 2 * x * y / (x + y), levels=6, colors="0.85", linewidths=0.8, zorder=0)
    axes.clabel(lines, fmt="H %.0f", fontsize=7, colors="0.6")
    axes.set(xlim=(left, right), ylim=(bottom, top))


def plot_differences(tables: Tables, against: str, drawn: list[str], file: Path, each: Path) -> None:
    """How far methods are from `against`, as bars with intervals, one panel a table of base-to-new.

    Args:
        drawn: methods that have a bar before others, of which the farthest follow.
        each: as for `plot_base_new`.
    """
    found = {
        key: bars
        for key, rows in tables.items()
        if key[0] == BASE_TO_NEW
        and (bars := {m: d["score"] for m, row in rows.items() if (d := row["differences"]) and "score" in d})
    }
    for part, place in averages_apart(found, file, each):
        draw_differences(part, against, drawn, place)


def draw_differences(found: dict[Key, dict[str, Any]], against: str, drawn: list[str], file: Path) -> None:
    height = 1.2 + 0.26 * max((min(len(bars), MOST_BARS) for bars in found.values()), default=0)
    for axes, (key, bars) in panels(found, file, 5.2, height):
        chosen = sorted(bars, key=lambda name: (name not in drawn, -abs(bars[name]["mean"])))[:MOST_BARS]
        names = sorted(chosen, key=lambda name: bars[name]["mean"])
        means = np.array([bars[name]["mean"] for name in names])
        ends = np.array([bars[name]["interval"] for name in names])
        sure = (ends[:, 0] > 0) | (ends[:, 1] < 0)
        colours = [COLOURS[0] if certain else "#B8CFE0" for certain in sure]
        away = np.abs(np.stack([means - ends[:, 0], ends[:, 1] - means]))
        axes.barh(names, means, xerr=away, color=colours, error_kw={"elinewidth": 1, "ecolor": "0.3", "capsize": 2})
        axes.axvline(0, color="0.2", linewidth=0.8)
        axes.set(title=title_of(key), xlabel=f"H minus that of {against} (points, 95 % interval)")
        axes.tick_params(axis="y", length=0)


def plot_shots(tables: Tables, drawn: list[str], file: Path) -> None:
    """Accuracy over shots, one panel a data set, with zero-shot as a line."""
    found: dict[Key, dict[int, dict[str, dict]]] = {}
    for (protocol, dataset, shots), rows in sorted(tables.items()):
        if protocol == FEW_SHOT:
            found.setdefault((protocol, dataset, 0), {})[shots] = rows
    for axes, ((_, dataset, _), by_shots) in panels(found, file, 5.4, 4.2):
        ends = {}
        for method in (m for m in drawn if any(m in rows for rows in by_shots.values())):
            points = [(shots, rows[method]["columns"]["all"]) for shots, rows in by_shots.items() if method in rows]
            shots, values = zip(*points, strict=True)
            means, look = [value["mean"] for value in values], style(method, drawn)
            if method == ZERO_SHOT:
                shots, means = list(by_shots), len(by_shots) * means[:1]
                axes.plot(shots, means, color="0.2", linestyle="--", linewidth=1)
            else:
                spread = [value["std"] or 0.0 for value in values]
                axes.errorbar(shots, means, yerr=spread, **(look | {"linestyle": "-", "linewidth": 1.2}))
            ends[method] = (shots[-1], means[-1])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(by_shots), [str(shots) for shots in by_shots])
        axes.set_xlim(min(by_shots) / 1.15, max(by_shots) * 2.6)
        axes.set(title=dataset, xlabel="training images a class", ylabel="accuracy (%)")
        label(axes, ends, drawn)


def plot_other_images(tables: Tables, protocol: str, drawn: list[str], file: Path) -> None:
    """Mean accuracy on what was not trained on as bars with intervals, and each domain or data set as a letter."""
    found = {
        key: rows
        for key, rows in tables.items()
        if key[0] == protocol
        and any(m in rows and rows[m]["score"] is not None for m in drawn)
        and not _stands_in_another(key, tables)
    }
    height = 1.8 + 0.32 * max((sum(m in rows for m in drawn) for rows in found.values()), default=0)
    for axes, (key, rows) in panels(found, file, 5.6, height):
        names = sorted((m for m in drawn if m in rows and rows[m]["score"] is not None), key=lambda m: rows[m]["score"])
        columns = list(next(iter(rows.values()))["columns"])
        others = columns[1:] if protocol == CROSS_DATASET else [name for name in columns if name != SOURCE]
        letters = dict(zip(others, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
        for place, name in enumerate(names):
            row = rows[name]
            ends = row["interval"] or (row["score"], row["score"])
            away = [[max(row["score"] - ends[0], 0)], [max(ends[1] - row["score"], 0)]]
            look = {"color": style(name, drawn)["color"], "alpha": 0.55, "error_kw": {"elinewidth": 1.2}}
            axes.barh(place, row["score"], xerr=away, capsize=2, height=0.55, **look)
        axes.set_yticks(range(len(names)), names)
        reached = [rows[m]["columns"][c]["mean"] for m in names for c in letters if rows[m]["columns"].get(c)]
        reached += [(rows[m]["interval"] or [rows[m]["score"]])[-1] for m in names]
        axes.set_xlim(0, 1.05 * max(reached))
        for place, name in enumerate(names):
            write_letters(axes, place, {letters[c]: rows[name]["columns"].get(c) for c in letters})
        meaning = ", ".join(f"{letter} {column}" for column, letter in letters.items())
        axes.set(title=title_of(key), xlabel=f"accuracy (%): mean, 95 % interval\n{meaning}")
        axes.tick_params(axis="y", length=0)


def write_letters(axes: Axes, place: int, values: dict[str, dict[str, Any] | None]) -> None:
    """Letters above the bar at `place`, each at its mean or as near to it as others leave room."""
    means = sorted((value["mean"], letter) for letter, value in values.items() if value)
    room = LETTER_DISTANCE * axes.get_xlim()[1]
    for at, (_, letter) in zip(spread_out([mean for mean, _ in means], room), means, strict=True):
        axes.text(at, place + 0.38, letter, fontsize=7.5, ha="center", va="center")


def _stands_in_another(key: Key, tables: Tables) -> bool:
    """Whether a table with one domain held out is a column of one with each held out."""
    place, without, _ = key[1].partition(WITHOUT)
    return bool(without) and any(name.startswith(f"{place}{EACH_HELD_OUT}") for _, name, _ in tables)


def panels(tables: dict[Key, Any], file: Path, width: float, height: float):
    """A panel for each table, at most three in a row; the file is written after the last, and not without a table."""
    if not tables:
        return
    columns = min(len(tables), 3)
    lines = -(-len(tables) // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes in list(places)[len(tables) :]:
        axes.axis("off")
    for axes, item in zip(figure.axes, tables.items(), strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, item
        axes.title.set_fontsize(TITLE_SIZE)
    figure.draw_without_rendering()  # the layout gives axes their sizes
    for axes in figure.axes:
        place_labels(axes)
    figure.savefig(file, dpi=110)


def style(method: str, drawn: list[str]) -> dict[str, Any]:
    """Colour and marker of a method, the same in all drawings; zero-shot is a black star."""
    if method == ZERO_SHOT:
        return {"color": "black", "marker": "*", "markersize": 12, "linestyle": "none"}
    place = [name for name in drawn if name != ZERO_SHOT].index(method)
    return {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 7, "linestyle": "none"}


def label(axes: Axes, points: dict[str, tuple[float, float]], drawn: list[str]) -> None:
    """Names beside the points (x, y); those of points that are close are moved apart, and joined to them by a line."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    order = sorted(points, key=lambda name: points[name][1])
    heights = spread_out([(points[name][1] - bottom) / (top - bottom) for name in order], LABEL_DISTANCE, *LABEL_ENDS)
    middle = (left + right) / 2 if axes.get_xscale() == "linear" else right
    for name, height in zip(order, heights, strict=True):
        to_the_left = points[name][0] > middle
        beside = offset_copy(
            blended_transform_factory(axes.transData, axes.transAxes),
            axes.figure,
            x=-12 if to_the_left else 12,
            units="points",
        )
        axes.annotate(
            name,
            points[name],
            (points[name][0], height),
            textcoords=beside,
            ha="right" if to_the_left else "left",
            va="center",
            fontsize=8,
            color=style(name, drawn)["color"],
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            zorder=4,
        )


def spread_out(
    places: list[float], distance: float, lowest: float = -math.inf, highest: float = math.inf
) -> list[float]:
    """Rising places, moved as little as it takes so that neighbours are `distance` apart and all between both ends."""
    moved = list(places)
    for _ in range(200):
        moved = [min(max(place, lowest), highest) for place in moved]
        for i in range(len(moved) - 1):
            if (gap := distance - (moved[i + 1] - moved[i])) > 1e-6:
                moved[i] -= gap / 2
                moved[i + 1] += gap / 2
    return moved
