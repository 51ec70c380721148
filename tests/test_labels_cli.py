"""``sep-peft`` where an image may have several labels."""

from __future__ import annotations

import csv
import json

import pytest
from labelled import NAMES, mosaics
from shallow_classifier import BASE

from sep_peft.cli import main


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Twelve mosaics to train on, eight to validate and eight to test on."""
    folder = tmp_path_factory.mktemp("mosaics")
    rows = []
    for split, part, count in (("train", "train", 12), ("val", "test", 8), ("test", "test", 8)):
        for index, (image, own) in enumerate(mosaics(part, count, seed=len(rows))):
            image.save(folder / f"{split}{index}.png")
            rows.append((f"{split}{index}.png", ";".join(own), split))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("image", "labels", "split"), *rows])
    return folder / "labels.csv"


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_an_adapter_is_trained_measured_and_asked_by_a_file_of_labels(file, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    options = ["--epochs", 1, "--base-model", BASE, "--quiet", "--json"]
    code, out, err = run(capsys, "train", file, "--output", adapter, *options)
    assert code == 0, err
    trained = json.loads(out)
    assert trained["report"] is not None, err
    assert [score["split"] for score in trained["scores"]] == ["val", "test"]
    assert trained["classes"] == NAMES and trained["calibration"]["images"] == 8
    card, page = (adapter / "README.md").read_text(), (adapter / "run" / "report.html").read_text()
    test = trained["scores"][1]
    for measures in (test["adapted"], test["zero_shot"]):
        intervals = measures.pop("intervals")
        for name, value in measures.items():
            assert f"{value:.1f}" in card and f"{value:.1f}" in page
            low, high = intervals[name]
            assert low <= value <= high and f"{low:.1f} to {high:.1f}" in page
            assert f"{value:.1f} ({low:.1f} to {high:.1f})" in card or measures is test["zero_shot"]
    assert "It names which of 3 classes an image has, several or none" in card and "Most wrong" in page
    assert ">None<" not in page  # a file of labels has no shots

    report = tmp_path / "page.html"
    code, out, err = run(capsys, "evaluate", adapter, file, "--report", report, "--quiet", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {name: found[name] for name in test["adapted"]} == pytest.approx(test["adapted"])
    assert found["zero_shot"].pop("intervals") and found["zero_shot"] == pytest.approx(test["zero_shot"])
    assert found["rare"] == NAMES and found["intervals"]["micro_f1"][0] <= found["micro_f1"]
    assert "most wrong" not in out and report.is_file()
    code, out, _ = run(capsys, "evaluate", adapter, file, "--quiet", "--no-zero-shot")
    low, high = found["intervals"]["mean_average_precision"]
    measured = f"{test['adapted']['mean_average_precision']:.1f} % ({low:.1f} to {high:.1f})"
    assert out.startswith(f"mAP {measured} with SEP; micro F1 ")

    image = file.parent / "test0.png"
    code, out, _ = run(capsys, "predict", adapter, image, "--min-score", 0, "--quiet", "--json")
    every = json.loads(out)[0]["prediction"]
    assert [each["label"] for each in every] == [
        each["label"] for each in sorted(every, key=lambda each: -each["score"])
    ]
    _, out, _ = run(capsys, "predict", adapter, image, "--quiet", "--json")
    named = [each for each in every if each["score"] >= found["thresholds"][each["label"]]]
    assert json.loads(out)[0]["prediction"] == named
    code, out, _ = run(capsys, "info", adapter, "--json")
    said = json.loads(out)
    assert said["multi_label"] and said["scores"][1]["micro_f1"] == round(test["adapted"]["micro_f1"], 2)


def test_what_does_not_go_with_a_file_of_labels_is_refused(file, tmp_path, capsys):
    def error_of(*arguments) -> str:
        code, out, err = run(capsys, *arguments, "--quiet")
        assert code == 1 and out == ""
        return err.strip()

    train = ["train", file, "--base-model", BASE, "--output", tmp_path / "adapter"]
    counted = f"--shots counts images of class folders, but {file} is a file, of which all train."
    assert error_of(*train, "--shots", 4) == f"sep-peft: error: {counted}"
    kept = f"--new-classes, --folds and --plots are for class folders, but {file} is a file of labels. Leave them out."
    assert error_of("evaluate", tmp_path, file, "--folds", 3) == f"sep-peft: error: {kept}"
    alone = tmp_path / "alone.csv"
    alone.write_text("image,labels,split\na.png,lamp,train\nb.png,pizza,test\n")
    missing = f"{alone} has classes of which no training image is: 'pizza'."
    assert error_of("train", alone, *train[2:]) == f"sep-peft: error: {missing}"
    later = tmp_path / "later.csv"
    later.write_text("image,labels\na.png,lamp\nb.png,pizza\n")
    patience = f"--patience needs images to validate on, but {later} has no row of the part val."
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((file.parent / "test0.png").read_bytes())
    assert error_of("train", later, *train[2:], "--patience", 2) == f"sep-peft: error: {patience}"
