"""Two plots of the tables: new-class against base-class accuracy, and accuracy over shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tables import ZERO_SHOT, Tables


#: Names of methods in one column of a legend that has a panel of its own.
LEGEND_ROWS = 14


def plot_base_new(tables: Tables, file: Path) -> None:
    """New-class accuracy against base-class accuracy, one panel a data set."""
    tables = {key: rows for key, rows in tables.items() if key[0] == "base-to-new"}
    if not tables:
        return
    methods = sorted({method for rows in tables.values() for method in rows})
    # one row of panels for up to three data sets, a further panel for the legend
    width = min(len(tables) + 1, 3)
    height = -(-(len(tables) + 1) // width)
    figure = Figure(figsize=(4.5 * width, 4 * height), layout="constrained")
    panels = list(figure.subplots(height, width, squeeze=False).flat)
    drawn: dict[str, Any] = {}
    for axes, ((_, dataset, shots), rows) in zip(panels, tables.items(), strict=False):
        for method, row in rows.items():
            x, y = row["columns"]["base"], row["columns"]["new"]
            if x and y:
                drawn[method] = axes.errorbar(
                    x["mean"], y["mean"], xerr=x["std"], yerr=y["std"], capsize=2, **style(methods.index(method))
                )
        if rows.get(ZERO_SHOT):
            axes.axhline(rows[ZERO_SHOT]["columns"]["new"]["mean"], color="0.8", zorder=0)
        axes.set(
            title=f"{dataset}, {shots} shots", xlabel="base classes, accuracy (%)", ylabel="new classes, accuracy (%)"
        )
    for axes in panels[len(tables) :]:
        axes.axis("off")
    names, columns = sorted(drawn), -(-len(drawn) // LEGEND_ROWS)
    panels[len(tables)].legend([drawn[m] for m in names], names, loc="center left", ncols=columns, fontsize=8)
    figure.savefig(file, dpi=100)


def style(index: int) -> dict[str, str]:
    """Colour and marker of a method, the same in all panels; two methods of one colour differ in their marker."""
    return {"color": f"C{index % 10}", "marker": "os^vD<>PX*"[(index + index // 10) % 10]}


def plot_shots(tables: Tables, file: Path) -> None:
    """Accuracy over shots, one panel a data set, with zero-shot as a line."""
    tables = {key: rows for key, rows in tables.items() if key[0] == "few-shot"}
    datasets = sorted({dataset for _, dataset, _ in tables})
    if not datasets:
        return
    figure = Figure(figsize=(5.5 * len(datasets), 4.5), layout="constrained")
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        own = {shots: rows for (_, name, shots), rows in sorted(tables.items()) if name == dataset}
        for method in sorted({method for rows in own.values() for method in rows}):
            points = [(shots, rows[method]["columns"]["all"]) for shots, rows in own.items() if method in rows]
            shots, values = zip(*points, strict=True)
            if method == ZERO_SHOT:
                axes.axhline(values[0]["mean"], color="0.6", linestyle="--", label=method)
                continue
            spread = [value["std"] or 0.0 for value in values]
            axes.errorbar(shots, [value["mean"] for value in values], yerr=spread, marker="o", capsize=2, label=method)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(own), [str(shots) for shots in own])
        axes.set(title=dataset, xlabel="training images a class", ylabel="accuracy (%)")
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)
