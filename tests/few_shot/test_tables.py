"""Tables and plots of finished runs."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import summarize
from averages import average_tables, notes_of
from intervals import Part, difference, intervals_of, score_of
from labels import add_label, place_labels
from markdown import to_markdown
from matplotlib.figure import Figure
from plots import averages_apart, chosen_methods, spread_out
from script import run_as_script
from tables import add_differences, make_tables, read_runs


def write_run(folder, protocol, dataset, method, shots, seed, settings=None, images=0, **accuracies):
    path = folder / protocol / dataset / method / f"shots_{shots}" / f"seed_{seed}"
    path.mkdir(parents=True)
    own = {"protocol": protocol, "dataset": dataset, "method": {"name": method}, "shots": shots, "seed": seed}
    settings = own | (settings or {})
    outcome = {name: None if value is None else {"accuracy": value} for name, value in accuracies.items()}
    for result in filter(None, outcome.values() if images else ()):
        right = random.Random(seed).sample(range(images), round(result["accuracy"] * images / 100))
        result |= {"correct": "".join(str(int(i in right)) for i in range(images)), "ece": 10.0 * seed}
    (path / "settings.json").write_text(json.dumps(settings))
    results = {"results": outcome, "trained_parameters": 1234, "training_seconds": 2.0 * seed}
    (path / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
    for dataset, more in (("birds", 0), ("cars", 10)):
        write_run(tmp_path, "base-to-new", dataset, "zero-shot", 16, 1, base=40.0 + more, new=60.0)
        for seed, base, new in ((1, 60.0, 50.0), (2, 70.0, 70.0), (3, 80.0, 60.0)):
            write_run(tmp_path, "base-to-new", dataset, "sep", 16, seed, base=base, new=new)
        write_run(tmp_path, "base-to-new", dataset, "linear-probe", 16, 1, base=75.0, new=None)
    write_run(tmp_path, "few-shot", "birds", "zero-shot", 16, 1, all=30.0)
    for shots, value in ((1, 35.0), (16, 70.0)):
        write_run(tmp_path, "few-shot", "birds", "sep", shots, 1, all=value)
    write_run(tmp_path, "domain-generalization", "birds", "sep", 16, 1, source=90.0, grey=50.0, blur=40.0)
    return tmp_path


def test_mean_spread_and_harmonic_mean_of_the_averages(runs):
    row = make_tables(read_runs(runs))["base-to-new", "birds", 16]["sep"]
    assert row["columns"] == {"base": {"mean": 70.0, "std": 10.0}, "new": {"mean": 60.0, "std": 10.0}}
    assert row["score"] == pytest.approx(2 * 70 * 60 / 130)
    assert (row["seeds"], row["parameters"], row["seconds"]) == ([1, 2, 3], 1234, 4.0)


def test_zero_shot_first_then_by_harmonic_mean_and_undefined_last(runs):
    assert list(make_tables(read_runs(runs))["base-to-new", "birds", 16]) == ["zero-shot", "sep", "linear-probe"]


def test_average_over_data_sets(runs):
    rows = average_tables(make_tables(read_runs(runs)))["base-to-new", "average of 2 data sets", 16]
    assert rows["zero-shot"]["columns"]["base"]["mean"] == 45.0
    assert rows["zero-shot"]["score"] == pytest.approx(2 * 45 * 60 / 105)
    assert rows["linear-probe"]["columns"]["new"] is None and rows["linear-probe"]["score"] is None


def test_zero_shot_stands_beside_every_number_of_shots(runs):
    tables = make_tables(read_runs(runs))
    assert tables["few-shot", "birds", 1]["zero-shot"] == tables["few-shot", "birds", 16]["zero-shot"]


def test_score_of_shifted_inputs_leaves_the_source_out(runs):
    assert make_tables(read_runs(runs))["domain-generalization", "birds", 16]["sep"]["score"] == 45.0


def test_average_of_targets_leaves_the_source_out():
    assert score_of("cross-dataset", {"birds": 90.0, "cars": 50.0, "pets": 40.0}) == 45.0
    assert score_of("few-shot", {"all": 30.0}) == 30.0


def test_no_score_without_all_evaluations(tmp_path):
    """A linear probe knows the classes of the source alone; that is no average of targets and no difference."""
    write_run(tmp_path, "cross-dataset", "birds", "sep", 16, 1, None, 20, birds=90.0, cars=50.0)
    write_run(tmp_path, "cross-dataset", "birds", "linear-probe", 16, 1, None, 20, birds=80.0, cars=None)
    rows = add_differences(make_tables(read_runs(tmp_path)), "sep")["cross-dataset", "birds", 16]
    probe = rows["linear-probe"]
    assert (probe["score"], probe["interval"]) == (None, None) and "score" not in probe["differences"]
    assert probe["differences"]["birds"]["mean"] == pytest.approx(-10) and rows["sep"]["score"] == 50.0


def test_domains_that_were_each_held_out_are_one_table(tmp_path):
    for method, shift in (("sep", 0), ("lora", -10)):
        for domain, value in (("photo", 80.0), ("sketch", 40.0)):
            place, held = f"pacs-without-{domain}", {"held_out": domain}
            results = {"source": 90.0, domain: value + shift}
            write_run(tmp_path, "domain-generalization", place, method, 16, 1, held, 20, **results)
    write_run(tmp_path, "domain-generalization", "pacs-without-photo", "vpt", 16, 1, held, 20, source=1.0, photo=1.0)
    tables = add_differences(make_tables(read_runs(tmp_path)), "sep")
    rows = tables["domain-generalization", "pacs, each domain held out", 16]
    assert list(rows) == ["lora", "sep"]  # vpt was not tried on sketches
    assert {name: value["mean"] for name, value in rows["lora"]["columns"].items()} == {"photo": 70.0, "sketch": 30.0}
    text = {key[1]: to_markdown(key, rows, "sep").splitlines()[2] for key, rows in tables.items()}
    assert text["pacs, each domain held out"].startswith("| method | photo | sketch | average of domains | ECE")
    assert text["pacs-without-photo"].startswith("| method | source | photo | held-out domain | ECE")
    assert rows["lora"]["score"] == 50.0 and rows["lora"]["differences"]["score"]["mean"] == pytest.approx(-10)


def test_several_models_are_told_apart(tmp_path):
    for model, base in (("org/small", 40.0), ("org/large", 60.0)):
        write_run(tmp_path / model, "base-to-new", "birds", "sep", 16, 1, {"model": model}, base=base, new=50.0)
    tables = make_tables(read_runs(tmp_path / "org/small", tmp_path / "org/large"))
    assert [name for _, name, _ in tables] == ["birds on large", "birds on small"]
    (average,) = average_tables(tables).items()
    assert average[0] == ("base-to-new", "average of 2 data sets and models", 16)
    assert average[1]["sep"]["columns"]["base"]["mean"] == 50.0


def rights(share, seeds=(1, 2), images=300, place=0):
    found = {}
    for seed in seeds:
        found[seed] = (np.random.default_rng([seed, place, 1]).random(images) < share).astype(float)
    return found


def test_intervals_hold_what_is_drawn_anew():
    """Of one run that of a share of N images; over runs that differ it is wider."""
    one = intervals_of([Part("a", {"base": rights(0.5, (1,)), "new": rights(0.5, (1,), place=1)})], "base-to-new")
    width = 2 * 1.96 * 100 * 0.5 / 300**0.5
    assert one["base"][1] - one["base"][0] == pytest.approx(width, rel=0.1)
    assert one["score"][1] - one["score"][0] == pytest.approx(width / 2**0.5, rel=0.15)
    apart = {1: rights(0.3)[1], 2: rights(0.7)[2]}
    low, high = intervals_of([Part("a", {"all": apart})], "few-shot")["all"]
    assert high - low > 30
    averaged = intervals_of([Part("a", {"all": apart}), Part("b", {"all": apart})], "few-shot")["all"]
    assert averaged[1] - averaged[0] < high - low  # data sets are drawn by themselves
    same = intervals_of([Part("a", {"all": apart}), Part("a", {"all": apart})], "few-shot")["all"]
    assert same == pytest.approx([low, high], abs=1e-4)  # the same images again tell nothing


def test_differences_are_paired():
    theirs, lift = rights(0.5), rights(0.2, place=5)

    def compare(ours, theirs):
        return difference([Part("a", {"all": ours})], [Part("a", {"all": theirs})], "few-shot")

    assert compare(theirs, theirs)["score"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    ours = {seed: np.maximum(values, lift[seed]) for seed, values in theirs.items()}
    found = compare(ours, theirs)["all"]
    exact = 100 * np.mean([ours[s].mean() - theirs[s].mean() for s in (1, 2)])
    assert found["mean"] == pytest.approx(exact)
    assert 0 < found["interval"][0] < exact < found["interval"][1] < 2 * exact
    fewer = compare(ours, {1: theirs[1]})["all"]  # the runs that both have
    assert fewer["mean"] == pytest.approx(100 * (ours[1].mean() - theirs[1].mean()))
    assert compare(ours, {3: theirs[1]}) is None
    assert compare(ours, rights(0.5, images=299)) is None


@pytest.fixture
def cells(tmp_path):
    """Birds at two numbers of shots and cars, on two models; three runs in one cell, one in each other."""
    for model, more in (("small", 0), ("large", 20)):
        for dataset, shots, seeds in (("birds", 4, (1, 2, 3)), ("birds", 16, (1,)), ("cars", 16, (1,))):
            own = {"model": f"org/{model}"}
            for seed in seeds if model == "small" else seeds[:1]:
                value = 20.0 + more + 10 * seed
                write_run(tmp_path / model, "base-to-new", dataset, "sep", shots, seed, own, 40, base=value, new=30)
                less = value - shots / 1.6
                write_run(tmp_path / model, "base-to-new", dataset, "lora", shots, seed, own, 40, base=less, new=30)
    write_run(tmp_path / "large", "base-to-new", "cars", "vpt", 16, 1, own, 40, base=50.0, new=50.0)
    return tmp_path / "small", tmp_path / "large"


def test_average_over_all_cells(cells):
    """Each cell counts the same, however many runs it has; what is known of a data set does not grow with cells."""
    tables = make_tables(read_runs(*cells))
    averages = add_differences(average_tables(tables), "sep")
    assert [key[1:] for key in averages] == [
        ("average of 6 cells, 4 and 16 shots", None),
        ("average of 2 data sets and models", 4),
        ("average of 4 data sets and models", 16),
        ("average of 3 cells on large, 4 and 16 shots", None),
        ("average of 3 cells on small, 4 and 16 shots", None),
    ]
    rows = averages["base-to-new", "average of 6 cells, 4 and 16 shots", None]
    assert list(rows) == ["lora", "sep"]
    assert rows["sep"]["columns"]["base"]["mean"] == pytest.approx((40 + 30 + 30 + 3 * 50) / 6)
    assert rows["sep"]["ece"] == pytest.approx((20 + 5 * 10) / 6)
    assert rows["sep"]["seeds"] == [[1], [1], [1, 2, 3], [1], [1], [1]]
    assert rows["lora"]["differences"]["base"]["mean"] == pytest.approx(-(2 * 2.5 + 4 * 10) / 6)
    note = notes_of(tables)["base-to-new", "average of 6 cells, 4 and 16 shots", None]
    assert note == (
        "Over 6 cells: birds on large, 4 shots; birds on large, 16 shots; birds on small, 4 shots; birds on small, "
        "16 shots; cars on large, 16 shots; cars on small, 16 shots. Left out, because they have fewer of these cells: "
        "vpt (1)."
    )


def test_summary_of_cells(cells, tmp_path):
    tables = make_tables(read_runs(*cells))
    text = summarize.write(average_tables(tables) | tables, tmp_path, "sep")
    first = text.split("### ")[1].splitlines()
    assert first[0] == "base-to-new, average of 6 cells, 4 and 16 shots"
    row = r"\| lora \| 34\.2 \| \*\*30\.0\*\* \| 31\.9 \(.*\) \| 11\.7 \| 1,234 \| 2 \| 1 to 3 \|"
    assert re.match(row, first[4]) and first[7].startswith("Over 6 cells: ")
    entry = json.loads((tmp_path / "summary.json").read_text())[0]
    assert (entry["dataset"], entry["shots"]) == ("average of 6 cells, 4 and 16 shots", None)
    assert set(entry["methods"]) == {"lora", "sep"}


def test_what_drawings_show():
    """The average over all cells, or where no method has all those of each number of shots; and the cells apart."""
    keys = [
        ("base-to-new", "average of 6 cells, 4 and 16 shots", None),
        ("base-to-new", "average of 2 data sets and models", 4),
        ("base-to-new", "average of 4 data sets and models", 16),
        ("base-to-new", "average of 3 cells on small, 4 and 16 shots", None),
        ("base-to-new", "birds on small", 4),
    ]

    def drawn(keys):
        return [(list(part), file) for part, file in averages_apart(dict.fromkeys(keys), "one", "each")]

    assert drawn(keys) == [(keys[:1], "one"), (keys[4:], "each")]
    assert drawn(keys[1:]) == [(keys[1:3], "one"), (keys[4:], "each")]
    assert drawn(keys[4:]) == [(keys[4:], "one")]


def test_no_method_has_all_cells(tmp_path):
    for dataset, method in (("birds", "sep"), ("cars", "lora")):
        write_run(tmp_path, "base-to-new", dataset, method, 16, 1, base=50.0, new=50.0)
    tables = make_tables(read_runs(tmp_path))
    first = summarize.write(average_tables(tables) | tables, tmp_path, "sep").split("### ")[1].splitlines()
    assert first[::2] == [
        "base-to-new, average of 2 data sets, 16 shots",
        "No method has all of its cells.",
        "Over 2 cells: birds, 16 shots; cars, 16 shots. Left out, because they have fewer of these cells: lora (1), "
        "sep (1).",
    ]


def test_drawn_methods(runs):
    tables = make_tables(read_runs(runs))
    assert chosen_methods(tables, "sep", []) == ["zero-shot", "sep", "linear-probe"]
    assert chosen_methods(tables, "sep", ["sep"]) == ["sep"]
    for wanted, message in (
        (["lora"], "--drawn names lora, but there are runs of zero-shot, sep, linear-probe only."),
        (9 * ["sep"], "--drawn takes at most 8 methods, but got 9."),
    ):
        with pytest.raises(ValueError) as error:
            chosen_methods(tables, "sep", wanted)
        assert str(error.value) == message


def test_names_cover_neither_each_other_nor_markers():
    figure = Figure(figsize=(4.6, 4.2))
    axes = figure.subplots()
    points = {f"method-{i}": (50.0 + 0.2 * i, 40.0 + 0.1 * (i % 3)) for i in range(8)} | {"zero-shot": (20.0, 30.0)}
    for name, point in points.items():
        axes.plot(*point, "o")
        add_label(axes, name, point, "black")
    axes.margins(0.16)
    figure.draw_without_rendering()
    place_labels(axes)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_bbox_patch().get_window_extent() for text in axes.texts}
    markers = [axes.transData.transform(point) for point in points.values()]
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for other_name, other in boxes.items() if other_name != name)
        assert not any(box.contains(*marker) for marker in markers)
        assert axes.get_window_extent().containsx(box.x0) and axes.get_window_extent().containsx(box.x1)
    middle = (boxes["zero-shot"].x0 + boxes["zero-shot"].x1) / 2, (boxes["zero-shot"].y0 + boxes["zero-shot"].y1) / 2
    assert np.hypot(*(markers[-1] - middle)) < 60  # pixels; nothing keeps it away


def test_labels_are_spread_out():
    assert spread_out([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    places = spread_out([0.5, 0.5, 0.52, 0.9], 0.1)
    assert all(b - a > 0.1 - 1e-4 for a, b in itertools.pairwise(places)) and places[3] == 0.9
    places = spread_out([0.01, 0.5, 0.95, 0.99], 0.1, 0.03, 0.96)
    assert places[:2] == [0.03, 0.5] and places[3] == pytest.approx(0.96, abs=1e-3)
    assert places[3] - places[2] > 0.1 - 1e-3


@pytest.fixture
def summary(monkeypatch, capsys):
    """Runs `summarize.py` with arguments, in this process; returns what it prints."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["summarize.py", *map(str, arguments)])
        summarize.main()
        return capsys.readouterr().out

    return run


def test_files(runs, summary, tmp_path):
    output = tmp_path / "summary"
    for method, base, new in (("sep", 60.0, 50.0), ("lora", 40.0, 60.0)):
        write_run(runs, "base-to-new", "pets", method, 16, 1, None, 80, base=base, new=new)
    write_run(runs, "cross-dataset", "birds", "sep", 16, 1, birds=90.0, cars=50.0)
    printed = summary(runs, "--output", output)
    text = (output / "summary.md").read_text()
    assert text.strip() == printed.strip()
    birds = text.split("### base-to-new, birds, 16 shots")[1].split("###")[0].strip().splitlines()
    assert birds == [
        "| method | base | new | H | ECE | trained parameters | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
        "| zero-shot | 40.0 | **60.0** | 48.0 | – | 1,234 | 2 | 1 |",
        "| sep | 70.0 ± 10.0 | **60.0 ± 10.0** | **64.6** | – | 1,234 | 4 | 3 |",
        "| linear-probe | **75.0** | – | – | – | 1,234 | 2 | 1 |",
    ]
    pets = text.split("### base-to-new, pets, 16 shots")[1].split("###")[0].strip().splitlines()
    assert pets[2].startswith("| lora | 40.0 | **60.0** | 48.0 (") and " | 10.0 | 1,234 | 2 | 1 |" in pets[2]
    assert pets[7:9] == ["Differences from sep, of the same runs and images:", ""]
    assert re.match(r"\| lora \| \*\*-20\.0 \(-\d+\.\d to -\d+\.\d\)\*\* \| \*\*\+10\.0 \(", pets[-1])
    assert "Zero-shot is missing here" in text.split("### domain-generalization")[1]
    names = [entry["dataset"] for entry in json.loads((output / "summary.json").read_text())]
    assert names == ["average of 3 data sets", "birds", "cars", "pets", "birds", "birds", "birds", "birds"]
    drawings = ("base_new.png", "base_new_sets.png", "differences.png", "shots.png", "domains.png", "targets.png")
    for name in drawings:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not (output / "differences_sets.png").exists()  # no average has a difference


def test_rows_of_an_earlier_summary(runs, summary, tmp_path, monkeypatch):
    """What was run anew replaces them, what was not stays, and averages are of what stands there now."""
    monkeypatch.setattr(summarize, "draw", lambda *arguments: None)
    first, later, output = tmp_path / "first", tmp_path / "later", tmp_path / "second"
    summary(runs, "--output", first)
    write_run(later, "base-to-new", "birds", "sep", 16, 1, base=90.0, new=80.0)
    summary(later, "--earlier", first / "summary.json", "--output", output)
    before, after = (
        {(e["protocol"], e["dataset"], e["shots"]): e["methods"] for e in json.loads((f / "summary.json").read_text())}
        for f in (first, output)
    )
    assert list(after) == list(before)
    birds, average = ("base-to-new", "birds", 16), ("base-to-new", "average of 2 data sets", 16)
    assert after[birds]["sep"]["columns"]["base"] == {"mean": 90.0, "std": None}
    assert after[birds]["zero-shot"] == before[birds]["zero-shot"]
    assert after[average]["sep"]["columns"]["base"]["mean"] == (90.0 + 70.0) / 2
    rest = set(before) - {birds, average}
    assert {key: after[key] for key in rest} == {key: before[key] for key in rest}


def test_nothing_to_summarize(summary, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        summary(tmp_path)
    assert end.value.code == 2 and f"error: {tmp_path} holds no finished run" in capsys.readouterr().err


def test_the_script_alone(scripts, tmp_path):
    """It loads neither torch nor the package, which would take most of its time."""
    code = f"import sys; sys.path.insert(0, {str(scripts)!r}); import summarize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_mistake_is_one_line(monkeypatch, capsys):
    def main():
        raise ValueError("There is no\nsuch thing.")

    for arguments, lines in (([], 1), (["--debug"], 8)):
        monkeypatch.setattr(sys, "argv", ["folder/run.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run_as_script(main)
        printed = capsys.readouterr().err.splitlines()
        assert end.value.code == 1 and printed[-1] == "run.py: error: There is no such thing."
        assert (len(printed) == 1) == (lines == 1) and sys.argv == ["folder/run.py"]
