"""The folder of a run and its report: what is in them, that names act on nothing, and how a browser shows it."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from browser import WIDTHS, open_browser
from bundled import ASSETS, IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from PIL import Image
from small_classifier import raises
from transformers import CLIPModel

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.explain import explain
from sep_peft.classifier.near_duplicates import worse_copy
from sep_peft.cli.app import command_line, main
from sep_peft.training import History, evaluate, report, write_report
from sep_peft.training.duplicates import near_duplicates
from sep_peft.training.evaluation import Evaluation
from sep_peft.training.findings import find, not_tested, uneven
from sep_peft.training.plots import curves
from sep_peft.training.run_log import RunLog
from sep_peft.training.thumbnails import marked_thumbnail, thumbnail


#: Names of classes and of a file that would do something, were they HTML or read by a template.
SCRIPT, QUOTES = "<img src=x onerror=alert(1)>", "a\"b' &amp; {{ 7 * 7 }} {% raw %}"
FILE = "'\"><script>alert(2)<\u202e.jpg"
CLASSES = [SCRIPT, QUOTES, "hat"]
TOKEN = "hf_not_to_be_seen"
SMALL = ["--fusion-rank", "2", "--share-fusion", "--fusion-hidden-size", "8", "--epochs", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes with hostile names; of a third there are three images, all to train. One test image was trained on,
    and one file is none."""
    folder = tmp_path_factory.mktemp("data") / "clothes"
    for part in ("train", "test"):
        for name, source in zip(CLASSES, ("cup", "lamp", "umbrella"), strict=True):
            (folder / part / name).mkdir(parents=True)
            for path in sorted((ASSETS / "caltech101" / part / source).iterdir())[:3]:
                if part == "train" or name != "hat":
                    shutil.copy(path, folder / part / name)
    (folder / "test" / SCRIPT / "broken.jpg").write_bytes(b"no image")
    trained = sorted((folder / "train" / QUOTES).iterdir())[0]
    worse_copy(Image.open(trained).convert("RGB")).save(folder / "test" / QUOTES / FILE, quality=70)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """What a training leaves."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    options = ["--base-model", str(shallow_clip(2)), "--output", str(output), *SMALL, "--quiet", "--token", TOKEN]
    assert main(["train", str(images), *options]) == 0
    return output


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.cells, self.items = set(), [], [], []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag in ("td", "li"):
            (self.cells if tag == "td" else self.items).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag, texts in (("td", self.cells), ("li", self.items)):
            if tag in self._open:
                texts[-1] += data


# the folder


def test_what_a_run_leaves(run, images):
    assert sorted(path.name for path in (run / "run").iterdir()) == [
        "curves.png",
        "log.csv",
        "report.html",
        "settings.json",
    ]
    settings = json.loads((run / "run" / "settings.json").read_text())
    assert settings["command"].startswith("sep-peft train ") and settings["command"].endswith("--quiet --token ...")
    assert (settings["classes"], settings["images"]) == (sorted(CLASSES), {"training": 9, "validation": 0})
    assert (settings["recipe"]["epochs"], settings["data"], settings["shots"]) == (2, str(images), 16)
    assert {"sep_peft", "torch", "python"} <= set(settings["versions"])
    rows = list(csv.DictReader((run / "run" / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "loss", "accuracy", "lr", "seconds"] and float(rows[0]["loss"]) > 0
    assert Image.open(run / "run" / "curves.png").size[0] > 400
    for path in run.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_the_token_is_no_part_of_a_command():
    assert command_line(["push", "a b", "--token", "hf_x", "me/a"]) == "sep-peft push 'a b' --token ... me/a"
    assert command_line(["push", "--token=hf_x"]) == "sep-peft push --token=..."


def test_a_log_that_cannot_be_written_ends_no_training(tmp_path):
    history = History(2, [{"epoch": 1, "loss": 1.5, "accuracy": 50.0, "lr": 0.1}], seconds=[2.0])
    (tmp_path / "file").write_text("mine")
    reason = f"{tmp_path / 'file' / 'run'}"
    with pytest.warns(UserWarning, match=rf"^No log could be written after 1 of 2 epochs \(.*{reason}.*\); training"):
        RunLog(tmp_path / "file", {})(history)
    log = RunLog(tmp_path, {"seed": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("of an earlier training")
    log(history)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.csv", "settings.json"]
    assert (tmp_path / "run" / "log.csv").read_text() == "epoch,loss,accuracy,lr,seconds\n1,1.5,50,0.1,2\n"


# the page


def test_names_act_on_nothing(run):
    page = Page(run / "run" / "report.html")
    assert "script" not in page.tags and not {name for name, _ in page.attributes if name.startswith("on")}
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert sources and all(value.startswith("data:image/") for value in sources)
    assert not re.search(r"url\(|@import", page.source) and "49" not in re.findall(r"b' &amp;amp; (\S+)", page.source)
    assert set(CLASSES) <= set(page.cells)
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert f"{QUOTES}/{FILE}".replace("\u202e", "\\u202e") in alternatives and "\u202e" not in page.source


def test_the_numbers_are_those_of_an_evaluation(run, images, tmp_path, capsys):
    target = tmp_path / "new" / "page.html"
    arguments = ["evaluate", str(run), str(images), "--report", str(target), "--quiet"]
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["report"] == str(target)
    page = Page(target)
    place = page.cells.index("test")
    low, high = data["interval"]
    assert page.cells[place + 1 : place + 3] == ["7", f"{data['accuracy']:.1f} {low:.1f} to {high:.1f}"]
    low, high = data["zero_shot_interval"]
    assert page.cells[place + 3] == f"{data['zero_shot']:.1f} {low:.1f} to {high:.1f}"
    place = page.cells.index(QUOTES, place)
    assert page.cells[place + 1 : place + 3] == ["4", f"{data['per_class'][QUOTES]:.1f} %"]
    assert f"report: {target}" not in capsys.readouterr().out
    assert page.source.count("data:image/png") == 3 and "sep-peft evaluate" in page.source


def test_where_a_report_cannot_go(run, images, tmp_path, capsys):
    for target, message in (
        (tmp_path, f"--report takes the name of a file, but {tmp_path} is a folder."),
        (run / "README.md" / "a.html", f"{run / 'README.md'} is a file; a folder is needed to save into."),
    ):
        assert main(["evaluate", str(run), str(images), "--report", str(target), "--quiet"]) == 1
        assert capsys.readouterr().err == f"sep-peft: error: {message}\n"


def test_a_report_that_fails_costs_no_adapter(images, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no paper")

    monkeypatch.setattr("sep_peft.cli.train.write_report", fail)
    options = ["--base-model", str(shallow_clip(2)), "--output", str(tmp_path), *SMALL, "--published", "--quiet"]
    assert main(["train", str(images), *options, "--max-steps", "1", "--shots", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert "sep-peft: warning: no report could be written: no paper\n" in printed.err
    assert json.loads(printed.out)["report"] is None
    assert SEPClassifier.from_pretrained(tmp_path).class_names == sorted(CLASSES)


@pytest.fixture
def undrawn(monkeypatch):
    """As without matplotlib."""
    monkeypatch.setattr(report, "find_spec", lambda name: None)


def test_without_matplotlib_and_without_tests(imaged, undrawn, tmp_path):
    imaged.calibrate(Calibration(2.0, images=8, source="cross-fitting", accuracy=62.5))
    history = History(2, [{"epoch": 1, "loss": 1.5, "accuracy": 50.0, "lr": 0.1}], seconds=[2.0])
    write_report(tmp_path / "a.html", imaged, {}, training=[(IMAGE_FILES[0], NAMES[0])], history=history)
    page = Page(tmp_path / "a.html")
    assert 'Drawings are left out, because matplotlib is not installed: pip install "sep_peft[plot]"' in page.source
    assert "<b>62.5 %</b> of 8 training images" in page.source and "data:" not in page.source.split("</head>")[1]
    assert page.items == ["There were no images to test on, so nobody knows how often the adapter is right.\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_before_calibration_scores_are_those_without(imaged, undrawn, tmp_path):
    samples = list(zip(IMAGE_FILES, NAMES, strict=True))
    plain = evaluate(imaged, samples)
    calibrated = evaluate(imaged.calibrate(Calibration(3.0)), samples)
    assert calibrated.nll != pytest.approx(plain.nll, rel=1e-3)
    write_report(tmp_path / "a.html", imaged, {"val": calibrated})
    text = (tmp_path / "a.html").read_text()
    assert f"NLL {plain.nll:.3f} before, {calibrated.nll:.3f} after" in text
    assert f"{plain.calibration_error:.1f} before calibration" in text and "measured on 4 images of val" in text


# images in it


def test_marked_patches_are_those_that_explain_names(imaged):
    marked = _opened(marked_thumbnail(imaged, IMAGE_FILES[0]))
    found = explain(imaged.model, imaged.processor, IMAGE_FILES[0])
    seen = Image.fromarray((255 * found.image).round().byte().numpy()).resize(marked.size, Image.Resampling.BICUBIC)
    rows, columns = found.grid
    side = marked.size[0] // columns
    for row in range(rows):
        for column in range(columns):
            box = (column * side + 4, row * side + 4, (column + 1) * side - 4, (row + 1) * side - 4)
            bright, usual = (_mean(image.crop(box)) for image in (marked, seen))
            chosen = bool(found.counts()[row, column])
            assert usual < 20 or (bright > 0.7 * usual) == chosen, (row, column)


def test_an_adapter_that_selects_nothing_has_plain_thumbnails(processor):
    clip = CLIPModel.from_pretrained(shallow_clip(2))
    model = get_peft_model(clip, SEPConfig(fusion="none", num_text_prompts=2))
    classifier = SEPClassifier.from_class_names(model, processor, NAMES[:2]).eval()
    assert marked_thumbnail(classifier, IMAGE_FILES[0]) == thumbnail(IMAGE_FILES[0])
    assert max(_opened(thumbnail(Image.new("RGB", (50, 4000), "red"))).size) == 320


def _opened(uri: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))


def _mean(image: Image.Image) -> float:
    data = torch.tensor(list(image.convert("L").tobytes()), dtype=torch.float)
    return data.mean().item()


# what is found


def test_duplicates_are_found_by_embedding(imaged):
    training = [(path, name) for name in NAMES for path in sorted((ASSETS / "caltech101/train" / name).iterdir())[:3]]
    copy = worse_copy(Image.open(training[4][0]).convert("RGB"))
    samples = [*zip(IMAGE_FILES, NAMES, strict=True), (copy, NAMES[3]), (training[0][0], NAMES[0])]
    found = near_duplicates(imaged, {"test": evaluate(imaged, samples)}, training)["test"]
    assert [(each.image, each.other) for each in found] == [(training[0][0], training[0][0]), (copy, training[4][0])]
    assert found[0].similarity == pytest.approx(1, abs=1e-4) and found[1].similarity < found[0].similarity
    assert (found[1].label, found[1].other_label) == (NAMES[3], NAMES[1])


def made(labels: str, said: str) -> Evaluation:
    """Of the classes a, b and c, of which each image has one and is taken for one."""
    names = ["a", "b", "c"]
    scores = torch.full((len(labels), 3), 0.1)
    scores[range(len(said)), [names.index(name) for name in said]] = 0.8
    return Evaluation(names, [(f"{index}.jpg", name) for index, name in enumerate(labels)], scores)


def test_findings():
    training = [(index, name) for index, name in enumerate("aaaaab")]
    history = History(3, [{"epoch": 1, "loss": 1.0, "accuracy": 50.0, "lr": 0.1}], stopped="time", seconds=[1.0])
    worse, better = {"test": made("aab", "bba")}, {"test": made("aab", "aab")}
    found = find("abc", worse, better, training, None, history, {"x.jpg": "x.jpg cannot be read"}, {"test": []})
    assert [(each.text, list(each.items)) for each in found] == [
        ("On test the adapter is worse than zero-shot: 0.0 % where the base model alone has 100.0 %.", []),
        ("The training was stopped by time after 1 of 3 epochs.", []),
        ("1 class was not tested.", ["c: no images"]),
        ("Images of training are uneven: 1 of b, but 5 of a.", []),
        ("1 image cannot be read and was left out.", ["x.jpg cannot be read"]),
        ("Scores are not calibrated: they may be far surer than they are right.", []),
    ]
    assert find("ab", better, worse, [], Calibration(1.0), None, {}, {}) == []


def test_what_was_not_tested_and_what_is_uneven():
    training = [("", name) for name in "abbbc"]
    found = not_tested("abc", {"val": made("a", "a"), "test": made("a", "a")}, training)
    assert [each.text for each in found] == ["2 classes were not tested."]
    assert found[0].items == ["b: 3 images, all used for training", "c: 1 image, all used for training"]
    assert uneven("training", {"a": 5, "b": 2}) is None and uneven("val", {}) is None
    text = "Images of test are uneven: 2 of b, but 6 of a. The mean over classes weighs them all alike."
    assert uneven("test", {"a": 6, "b": 2}).text == text


def test_findings_of_a_run(run):
    page = Page(run / "run" / "report.html")
    assert any(item.startswith("1 of 7 images of test is nearly the same as one that was") for item in page.items)
    assert "hat: 3 images, all used for training" in map(str.strip, page.items)
    assert any(item.startswith("1 image cannot be read and was left out.") for item in page.items)


def test_curves_need_an_epoch():
    with raises("There is nothing to draw: no epoch has ended."):
        curves(History(3), None)
    rows = [{"epoch": n, "loss": 2.0 / n, "accuracy": 50.0, "lr": 0.1, "val_accuracy": 30.0 + n} for n in (1, 2)]
    left, right = curves(History(3, rows, zero_shot=20.0, seconds=[1.0, 1.0]), None).axes
    assert list(left.lines[0].get_ydata()) == [2.0, 1.0]
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "training: augmented, by texts alone",
        "val",
        "best epoch, 2",
        "zero-shot on val",
    ]


# in a browser


def test_a_browser_shows_it(run):
    path = run / "run" / "report.html"
    with open_browser() as browser:
        for width in WIDTHS:
            browser.open(path, width, dark=width == WIDTHS[1])
            assert browser.overflow() == 0 and browser.broken_images() == []
            text = browser.text()
            assert browser.errors() == [] and browser.requests() == []
            assert "accuracy with SEP" in text and "hat: 3 images, all used for training" in text
            assert SCRIPT in text and QUOTES in text and browser.run("return document.scripts.length") == 0
            assert browser.run("return innerWidth") == width
            back = browser.run("return getComputedStyle(document.body).backgroundColor")
            assert back == ("rgb(246, 247, 249)" if width == WIDTHS[0] else "rgb(20, 23, 28)")
