"""Tables and plots of finished runs: Markdown, JSON, and drawings.

    python examples/few_shot/summarize.py outputs/few_shot

writes `summary.md`, `summary.json` and the drawings that the runs have data for into that folder, or into --output:

    base_new.png      accuracy on new against base classes, with lines of equal harmonic mean
    differences.png   how far every method is from --against, with intervals of 95 %
    shots.png         accuracy over training images a class
    domains.png       accuracy on domains and shifts that were not trained on
    targets.png       accuracy on data sets that were not trained on

Tables of base-to-new begin with averages: over all cells (data set, model, number of shots), over those of each number
of shots, and over those of each model. The first two drawings show the average over all cells, where some method has
all; the cells are then in base_new_sets.png and differences_sets.png.
Several folders of runs make one summary, where the names of data sets say the model. With `--earlier summary.json`,
methods without runs keep their rows of that summary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from averages import average_tables, notes_of
from intervals import CROSS_DATASET, SHIFTED
from markdown import to_markdown
from plots import chosen_methods, plot_base_new, plot_differences, plot_other_images, plot_shots
from run_folder import write_json
from script import run_as_script
from tables import Tables, add_differences, add_earlier, make_tables, read, read_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="--output of run.py")
    parser.add_argument("--output", type=Path, help="folder for the summary; default: the first of the runs")
    parser.add_argument("--earlier", type=Path, help="summary.json whose rows stand for methods that have no runs")
    parser.add_argument("--against", default="sep", help="method that the others are compared with")
    parser.add_argument(
        "--drawn", nargs="+", default=[], help="methods that are drawn, at most 8; default: zero-shot and the best"
    )
    args = parser.parse_args()
    runs = read_runs(*args.runs)
    if not runs:
        parser.error(f"{', '.join(map(str, args.runs))} holds no finished run")
    tables = make_tables(runs)
    if args.earlier:
        tables = add_earlier(tables, read(args.earlier))
    tables = add_differences(average_tables(tables) | tables, args.against)
    try:
        drawn = chosen_methods(tables, args.against, args.drawn)
    except ValueError as error:
        parser.error(str(error))
    output = args.output or args.runs[0]
    output.mkdir(parents=True, exist_ok=True)
    print(write(tables, output, args.against))
    draw(tables, output, args.against, drawn)


def write(tables: Tables, output: Path, against: str) -> str:
    """Write `summary.md` and `summary.json`; returns the former."""
    notes = notes_of(tables)
    empty = {key: {} for key in notes if key not in tables}
    text = "\n".join(to_markdown(key, rows, against, notes.get(key, "")) for key, rows in {**empty, **tables}.items())
    (output / "summary.md").write_text(text, encoding="utf-8")
    names = ("protocol", "dataset", "shots", "methods")
    entries = [(*key, {name: without_parts(row) for name, row in rows.items()}) for key, rows in tables.items()]
    write_json(output / "summary.json", [dict(zip(names, entry, strict=True)) for entry in entries])
    return text


def draw(tables: Tables, output: Path, against: str, drawn: list[str]) -> None:
    """The drawings that stand in the head of this file."""
    plot_base_new(tables, drawn, output / "base_new.png", output / "base_new_sets.png")
    plot_differences(tables, against, drawn, output / "differences.png", output / "differences_sets.png")
    plot_shots(tables, drawn, output / "shots.png")
    plot_other_images(tables, SHIFTED, drawn, output / "domains.png")
    plot_other_images(tables, CROSS_DATASET, drawn, output / "targets.png")


def without_parts(row: dict) -> dict:
    """A row as it is written: what intervals were made from is in the runs."""
    return {name: value for name, value in row.items() if name != "parts"}


if __name__ == "__main__":
    run_as_script(main)
