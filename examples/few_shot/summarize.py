"""Tables and plots of finished runs: Markdown, JSON, accuracy over shots, base against new classes.

    python examples/few_shot/summarize.py outputs/few_shot

writes `summary.md`, `summary.json`, `shots.png` and `base_new.png` into that folder, or into --output. With `--earlier
summary.json`, methods without runs keep their rows of that summary.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from plots import plot_base_new, plot_shots
from run_folder import write_json
from tables import ZERO_SHOT, add_earlier, average_tables, make_tables, read, read_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="--output of run.py")
    parser.add_argument("--output", type=Path, help="folder for the summary; default: the same")
    parser.add_argument("--earlier", type=Path, help="summary.json whose rows stand for methods that have no runs")
    args = parser.parse_args()
    output = args.output or args.runs
    runs = read_runs(args.runs)
    if not runs:
        parser.error(f"{args.runs} holds no finished run")
    tables = make_tables(runs)
    if args.earlier:
        tables = add_earlier(tables, read(args.earlier))
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(to_markdown(key, rows) for key, rows in tables.items())
    if averages := average_tables(tables):
        text = "\n".join(to_markdown(key, rows) for key, rows in averages.items()) + "\n" + text
    (output / "summary.md").write_text(text, encoding="utf-8")
    everything = [(*key, rows) for key, rows in (averages | tables).items()]
    names = ("protocol", "dataset", "shots", "methods")
    write_json(output / "summary.json", [dict(zip(names, entry, strict=True)) for entry in everything])
    print(text)
    plot_base_new(averages | tables, output / "base_new.png")
    plot_shots(tables, output / "shots.png")


def to_markdown(key: tuple[str, str, int], rows: dict[str, dict[str, Any]]) -> str:
    """A table with accuracies in percent, mean and standard deviation over seeds; the best of each column is bold."""
    protocol, dataset, shots = key
    names = list(next(iter(rows.values()))["columns"])
    with_harmonic = "harmonic" in next(iter(rows.values()))
    head = ["method", *names, *(["H"] if with_harmonic else []), "trained parameters", "seconds", "seeds"]
    lines = [f"### {protocol}, {dataset}, {shots} shots", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    best = {name: largest([row["columns"][name] for row in rows.values()]) for name in names}
    harmonic = {method: {"mean": row["score"], "std": None} if row["score"] else None for method, row in rows.items()}
    for method, row in rows.items():
        cells = [cell(row["columns"][name], best[name]) for name in names]
        if with_harmonic:
            cells.append(cell(harmonic[method], largest(list(harmonic.values()))))
        cells += [f"{row['parameters']:,}", f"{row['seconds']:.0f}", str(len(row["seeds"]))]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if ZERO_SHOT not in rows:
        lines.append("\nZero-shot is missing here; run it with `--method zero-shot`.")
    return "\n".join([*lines, ""])


def largest(values: list[dict[str, Any] | None]) -> float | None:
    return max((value["mean"] for value in values if value), default=None)


def cell(value: dict[str, float | None] | None, best: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")
    return f"**{text}**" if value["mean"] == best else text


if __name__ == "__main__":
    main()
