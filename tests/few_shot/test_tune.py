"""Tuning: candidates, budgets, what may be looked at, and what was tried."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace

import pytest
import readers
import tune
from accelerate.state import AcceleratorState
from bundled import ASSETS, save_shallow_clip
from candidates import Candidate, equally_many, read_candidates
from methods import read_method
from readers import read_dataset
from training import work_of
from tried import to_text, tried


NAMES = ["butterfly", "lamp"]
LORA = {
    "learner": "lora",
    "config": {"r": 2, "target_modules": ["q_proj"]},
    "recipe": {"epochs": 1, "text_weight": 0, "vision_weight": 0, "batch_size": 3},
}


def test_candidates_that_are_shipped(scripts):
    """Each is another method, and its settings are those that its file says."""
    for file in sorted((scripts / "tuning").glob("*.json")):
        candidates = read_candidates(scripts / "methods" / file.name)
        assert len({repr(method) for _, method in candidates}) == len(json.loads(file.read_text())), file
        assert all(len(title.encode()) < 250 for title, _ in candidates)
    last = read_candidates(scripts / "methods" / "lora-prototypes.json")[-1]
    assert last.title == "prototype_learning_rate=0.001,prototype_logit_weight=5.0,r=16,lora_alpha=32"
    assert (last.method.recipe.prototype_logit_weight, last.method.config["r"]) == (5.0, 16)
    assert last.method.recipe.weight_decay == read_method(scripts / "methods/lora-prototypes.json").recipe.weight_decay


@pytest.fixture
def own(describe, tmp_path):
    """A method that lies elsewhere, and a function that writes its candidates."""
    (tmp_path / "tuning").mkdir()

    def write(*candidates):
        (tmp_path / "tuning" / "mine.json").write_text(json.dumps(list(candidates)))
        return describe("mine", **LORA)

    return write


def test_candidates_of_a_method_elsewhere(own, tmp_path, scripts):
    found = read_candidates(own({}, {"config": {"r": 4}}))
    assert [(c.title, c.method.name, c.method.config["r"]) for c in found] == [
        ("unchanged", "mine", 2),
        ("r=4", "mine", 4),
    ]
    shutil.rmtree(tmp_path / "tuning")
    with pytest.raises(FileNotFoundError) as error:
        read_candidates(tmp_path / "mine.json")
    places = f"{tmp_path / 'tuning'} or {scripts / 'tuning'}"
    assert str(error.value) == f"{tmp_path / 'mine.json'} has no candidates: there is no mine.json in {places}."


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], '{file} must be a list of candidates such as {{"recipe": {{"epochs": 20}}}} or {{}}.'),
        ([{"epochs": 2}], '{file} must be a list of candidates such as {{"recipe": {{"epochs": 20}}}} or {{}}.'),
        ([{}, {"config": {}}], "{file} lists unchanged twice."),
        ([{}, {"recipe": {"epochs": 0}}], "{file}, candidate 2: {method}: epochs must be an integer of at least 1, but "
         "got 0."),
        ([{"config": {"rank": 1}}], "{file}, candidate 1: {method}: LoraConfig.__init__() got an unexpected keyword "
         "argument 'rank'"),
    ],
)  # fmt: skip
def test_mistakes_in_candidates(own, tmp_path, candidates, message):
    method = own(*candidates)
    with pytest.raises(ValueError) as error:
        read_candidates(method)
    assert str(error.value) == message.format(file=tmp_path / "tuning" / "mine.json", method=method)


def test_every_method_has_the_same_budget():
    candidates = {name: [Candidate(f"{name}{i}", None) for i in range(n)] for name, n in (("a", 4), ("b", 2), ("c", 3))}
    assert [[c.title for c in own] for own in equally_many(candidates, 2).values()] == [
        ["a0", "a1"], ["b0", "b1"], ["c0", "c1"],
    ]  # fmt: skip
    for budget, more in ((None, "a 4, c 3"), (3, "a 3, c 3")):
        with pytest.raises(ValueError) as error:
            equally_many(candidates, budget)
        assert str(error.value) == (
            f"Methods are tuned with as many candidates each, but b has 2 and {more}. Write more, or give --budget 2."
        )
    assert len(equally_many({"b": candidates["b"]}, 9)["b"]) == 2


def test_what_a_training_takes(scripts):
    sep = read_method(scripts / "methods" / "sep.json", {"recipe": {"batch_size": 4}})
    assert work_of(sep, 10, 3) == {"training_steps": 9, "training_images": 30}
    cut = read_method(scripts / "methods" / "sep.json", {"recipe": {"batch_size": 4, "max_steps": 5, "epochs": 3}})
    assert work_of(cut, 10, 2) == {"training_steps": 5, "training_images": 18}
    probe = read_method(scripts / "methods" / "linear-probe.json")
    assert work_of(probe, 10, 0) == {"training_steps": 0, "training_images": 0}


def test_a_held_out_domain_is_never_looked_at(images, describe, tmp_path):
    """Each of the others is held out in turn, and measured on its validation images."""
    for domain in ("clay", "photo", "sketch"):
        images(f"shapes/{domain}", {"disc": 8, "star": 8})
    data = read_dataset(describe("shapes", reader="domains"), tmp_path)
    args = Namespace(protocol="domain-generalization", held_out="clay", shots=2, targets=[], test_images=None)
    args.shifts = False
    places = tune.places_of("data/shapes.json", data, args)
    assert [(p.name, p.held_out) for p in places] == [
        ("shapes-without-clay-and-photo", "photo"), ("shapes-without-clay-and-sketch", "sketch"),
    ]  # fmt: skip
    plan = tune.tuning_plan(args, {"shapes": places[0].data}, "shapes", 1, "photo")
    assert {s.domain for s in plan.images.train} == {"sketch"}
    measured = {e.name: e.data.splits[e.split] for e in plan.evaluations}
    assert {name: {s.domain for s in own} for name, own in measured.items()} == {
        "source": {"sketch"}, "photo": {"photo"},
    }  # fmt: skip
    assert all(s in data.splits["val"] for own in measured.values() for s in own)
    args.held_out = "all"
    with pytest.raises(ValueError, match=r"^Tune for one held-out domain at a time, so that its images are not looked"):
        tune.places_of("shapes", data, args)
    args.held_out = None
    with pytest.raises(ValueError, match=r"^--held-out must be one of clay, photo, sketch, but is None\.$"):
        tune.places_of("shapes", data, args)


@pytest.fixture
def tune_here(monkeypatch, capsys):
    """Runs a command in this process; returns what it prints."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["tune.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            tune.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return main


def test_two_protocols(tune_here, own, describe, tmp_path, monkeypatch):
    """A method that lies elsewhere, on validation images alone; a second command adds to what was tried before."""
    save_shallow_clip(tmp_path / "clip")
    for part, count in (("train", 4), ("val", 2), ("test", 1)):
        for name in NAMES:
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for path in sorted((ASSETS / "caltech101" / "train" / name).iterdir())[:count]:
                shutil.copy(path, tmp_path / "photos" / part / name)
    data = describe("two", reader="folder", root="photos", classes=NAMES)
    method = own({}, {"config": {"r": 1}})
    opened, read = [], readers.read_image
    monkeypatch.setattr(readers, "read_image", lambda path: opened.append(path) or read(path))
    command = ["--data-root", tmp_path, "--dataset", data, "--method", method, "--model", tmp_path / "clip", "--cpu"]
    command += ["--shots", "2", "--seeds", "1", "--output", tmp_path / "out", "--test-images", "1"]

    tune_here(*command, "--protocol", "domain-generalization", "--budget", "1")
    printed = tune_here(*command, "--protocol", "domain-generalization")
    assert (
        "unchanged/seed_1: finished before" in printed
        and "| method | best candidate | average of shifted |\n" in printed
    )
    assert "| mine | 2 | 2 | 4 | 8 | " in printed
    found = json.loads((tmp_path / "out/tuning/domain-generalization/tried.json").read_text())
    assert found["protocol"] == "domain-generalization"
    assert {row["candidate"] for row in found["candidates"]} == {"unchanged", "r=1"}
    names = ["source", "grey", "blur", "noise", "edges"]
    for row in found["candidates"]:
        assert list(row["columns"]) == names and row["shifted"] is None
        assert row["score"] == pytest.approx(sum(row["columns"][name] for name in names[1:]) / 4)
    assert found["budget"]["mine"]["training_images"] == 2 * 4 and found["budget"]["mine"]["training_seconds"] > 0

    tune_here(*command, "--protocol", "few-shot", "--budget", "1", "--shifts")
    (row,) = json.loads((tmp_path / "out/tuning/few-shot/tried.json").read_text())["candidates"]
    assert list(row["columns"]) == ["all"] and row["score"] == row["columns"]["all"]
    assert list(row["places"]["two"])[1:] == [f"all, {name}" for name in names[1:]] and row["shifted"] is not None
    assert {path.parent.parent.name for path in opened} == {"train", "val"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget must be at least 1"),
        (["--shots", "0"], "--shots must be at least 1"),
        (["--targets", "pets"], "--targets is for --protocol cross-dataset"),
        (["--held-out", "clay"], "--held-out is for --protocol domain-generalization"),
        (["--protocol", "domain-generalization", "--shifts"],
         "--shifts is for other protocols; domain-generalization has shifted images of its own"),
    ],
)  # fmt: skip
def test_mistakes_in_a_command(tune_here, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        tune_here("--dataset", "clothing", "--method", "sep", *options)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == f"tune.py: error: {message}"


def write_tried(folder, place, method, candidate, seed, **accuracies):
    path = folder / place / method / candidate / f"seed_{seed}"
    path.mkdir(parents=True)
    settings = {"method": {"name": method, "config": {}, "recipe": None}, "shots": 16, "model": "clip", "seed": seed}
    results = {name: None if value is None else {"accuracy": value} for name, value in accuracies.items()}
    took = {"training_steps": 10, "training_images": 160, "training_seconds": 2.0, "evaluation_seconds": 1.5}
    (path / "settings.json").write_text(json.dumps(settings))
    (path / "results.json").write_text(json.dumps({"results": results, **took}))


def test_what_was_tried(tmp_path):
    """The best candidate is the one with the best harmonic mean of the average over data sets; seeds count alike."""
    folder = tmp_path / "base-to-new"
    for seed, base in ((1, 50.0), (2, 70.0)):
        write_tried(folder, "birds", "sep", "epochs=2", seed, base=base, new=40.0)
    write_tried(folder, "cars", "sep", "epochs=2", 1, base=40.0, new=20.0)
    for place in ("birds", "cars"):
        write_tried(
            folder, place, "sep", "unchanged", 1, base=40.0, new=40.0, **{"base, grey": 30.0, "base, blur": 10.0}
        )
        write_tried(folder, place, "linear-probe", "unchanged", 1, base=90.0, new=None)
    found = tried(folder)
    probe, first, second = found["candidates"]
    assert probe["score"] is None and probe["columns"] == {"base": 90.0, "new": None}
    assert (first["candidate"], first["score"], first["shifted"]) == ("unchanged", pytest.approx(40.0), 20.0)
    assert second["columns"] == {"base": 50.0, "new": 30.0} and second["score"] == pytest.approx(37.5)
    assert (second["seeds"], second["shifted"]) == (1, None)
    assert second["places"] == {"birds": {"base": 60.0, "new": 40.0}, "cars": {"base": 40.0, "new": 20.0}}
    assert to_text(found).splitlines() == [
        "| method | best candidate | H | shifted |",
        "|---|---|---|---|",
        "| linear-probe | unchanged | – | – |",
        "| sep | unchanged | 40.0 | 20.0 |",
        "",
        "| method | candidates | runs | training steps | images in them | seconds of training | of evaluation |",
        "|---|---|---|---|---|---|---|",
        "| linear-probe | 1 | 2 | 20 | 320 | 4 | 3 |",
        "| sep | 2 | 5 | 50 | 800 | 10 | 8 |",
    ]


def test_a_score_over_other_data_sets(tmp_path):
    """Sources differ between places, so that the average is one of scores, not of columns."""
    folder = tmp_path / "cross-dataset"
    write_tried(folder, "birds", "sep", "unchanged", 1, birds=90.0, cars=30.0)
    write_tried(folder, "cars", "sep", "unchanged", 1, cars=80.0, birds=50.0)
    (row,) = tried(folder)["candidates"]
    assert row["score"] == 40.0 and row["columns"] == {} and list(row["places"]) == ["birds", "cars"]
