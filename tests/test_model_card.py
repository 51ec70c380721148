"""Model cards: what stands in them, and what of their owner's stays."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from html.parser import HTMLParser

import peft
import pytest
import torch
import transformers
from bundled import ASSETS
from fresh import usual
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt
from peft import get_peft_model
from small_clip import make_clip, make_texts
from transformers import AutoProcessor, CLIPModel

import sep_peft
from sep_peft import CardDetails, ClassScore, Score, SEPClassifier, SEPConfig, TaskClasses
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.card import CONFUSION_FILE, END, REPOSITORY, START, make_card
from sep_peft.tuner.messages import acts


CLASSES = TaskClasses(make_texts([4, 3]), (make_texts([5, 4]),), ("cup", "desk_lamp"), ("a photo of a {}.",))
FULL = CardDetails(
    title="Household things",
    description="Tells things in my kitchen.",
    base_model="openai/clip-vit-base-patch16",
    repo_id="ann/household",
    shots=16,
    seeds=[1, 2, 3],
    protocol="50 epochs, tested on all classes",
    scores=[
        Score("Caltech 101", 61.66, 36.1, spread=0.5, images=374, dataset_id="ann/caltech101"),
        Score("My kitchen", 90.0, split="val"),
    ],
    datasets=["ann/caltech101"],
    license="apache-2.0",
    limits="Only seen from the front.",
)


def card_of(details: CardDetails = FULL, **options) -> ModelCard:
    return make_card(CLASSES, SEPConfig.published(num_text_prompts=3), "CLIPModel", details, **options)


def make_classifier(base=None) -> SEPClassifier:
    model = get_peft_model(base or make_clip(), SEPConfig.published(num_text_prompts=2, fusion="none"))
    return SEPClassifier(model, CLASSES).eval()


# text


def test_what_it_is_install_and_import_come_first():
    text = card_of().text
    start = text.index("# Household things")
    assert text[start:].startswith("# Household things\n\nIt tells 2 classes apart: an adapter of [openai/")
    assert text[text.index("Tells things in my kitchen.") :].startswith(
        f'Tells things in my kitchen.\n\n```bash\npip install "sep_peft @ git+{REPOSITORY}"\n```\n\n```python\n'
        "import sep_peft  # registers the method; without it loaders only say KeyError: 'SEP'\n\n"
        'classifier = sep_peft.SEPClassifier.from_pretrained("ann/household")\n'
    )


@pytest.mark.parametrize(
    "line",
    [
        "Tells things in my kitchen.",
        "It tells 2 classes apart: an adapter of "
        "[openai/clip-vit-base-patch16](https://huggingface.co/openai/clip-vit-base-patch16), made with SEP, "
        "Self-Enhanced Prompt Tuning ([arXiv 2405.15549](https://arxiv.org/abs/2405.15549)), with 3 text and 4 image "
        "prompts.",
        "| accuracy (%) | images | with SEP | zero-shot |",
        "| Caltech 101, test | 374 | 61.7 ± 0.5 | 36.1 |",
        "| My kitchen, val |  | 90.0 | not measured |",
        "- Shots: 16",
        "- Seeds: 1, 2, 3",
        "- Protocol: 50 epochs, tested on all classes",
        "- Data: [ann/caltech101](https://huggingface.co/datasets/ann/caltech101)",
        "`cup`, `desk_lamp`",
        "Template of the frozen text branch: `a photo of a {}.`",
        "Only seen from the front.",
    ],
)
def test_what_a_full_card_says(line):
    assert line in card_of().text.splitlines()


def test_versions():
    line = (
        f"sep_peft {sep_peft.__version__}, peft {peft.__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}"
    )
    assert f"## Versions\n\n{line}\n" in card_of().text


def test_what_is_not_known_is_not_said():
    card = card_of(CardDetails())
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# SEP adapter", "## Classes", "## Limits", "## Licence", "## Versions", "## Paper"]
    assert 'from_pretrained("path/to/this/folder")' in card.text
    assert "None" not in card.content
    data = card.data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("count", "end"), [(100, "`n99`"), (101, "`n99` and 1 more, see sep_classes.json")], ids=["100", "101"]
)
def test_many_classes_are_cut_and_counted(count, end):
    classes = TaskClasses(make_texts([3] * count), (), tuple(f"n{i}" for i in range(count)))
    text = make_card(classes, SEPConfig.published(), "CLIPModel", CardDetails()).text
    assert f"{end}\n\nTemplate of the frozen text branch: made from tensors\n" in text


# what was measured

MEASURED = [ClassScore("cup", 3, 7, 42.857, 0.0), ClassScore("a|<b>", 2)]


@pytest.mark.parametrize("count", [2, 13])
def test_results_of_each_class(count):
    scores = [Score("mine", 50.0, 40.0, images=9, interval=(31.25, 68.75), calibration_error=4.25)]
    scores.append(Score("mine", 60.0, split="val", calibration_error=7.0))
    details = CardDetails(scores=scores, class_scores=(MEASURED * 7)[:count], confusion=b"PNG")
    text = card_of(details).text
    assert "| mine, test | 9 | 50.0 (31.2 to 68.8) | 40.0 |" in text
    assert "on the same images, classes and template. In brackets are 95 % bootstrap intervals." in text
    assert "\nCalibration error 4.2 % on test, 7.0 % on val.\n" in text
    assert f"![Confusion matrix: rows are classes, columns what was said]({CONFUSION_FILE})" in text
    page = shown(card_of(details))
    table = page.texts["td"][8:]
    assert table[:10] == ["cup", "3", "7", "42.9", "0.0", "a|<b>", "2", "0", "not tested", ""]
    assert len(table) == 5 * count and page.texts["table"][1].count("not tested") == count // 2
    assert ("details" in page.seen) == (count > 12)


def test_calibration_and_licence():
    classes = replace(CLASSES, calibration=Calibration(2.5, images=48, source="cross-fitting"))
    text = make_card(classes, SEPConfig(), "CLIPModel", CardDetails(license="mit")).text
    assert "- Scores are calibrated by cross-fitting, 48 images: logits are divided by 2.50.\n" in text
    assert "## Licence\n\nmit; that of the base model holds as well.\n" in text
    text = card_of(CardDetails()).text
    assert "- Scores are not calibrated; they may be far surer than they are right.\n" in text
    assert (
        "## Licence\n\nNo licence is stated, and without one nobody else may use the adapter. State one: `Card" in text
    )


def test_the_library_is_ours_on_the_hub_alone():
    """In a folder Trainer asks for PEFT's."""
    assert card_of().data.library_name == "sep_peft" and card_of(CardDetails()).data.library_name == "peft"


def test_the_confusion_is_saved_and_goes_with_its_card(tmp_path):
    classifier, folder = make_classifier(), tmp_path / "my kitchen"
    classifier.save_pretrained(folder, CardDetails(confusion=b"PNG"))
    assert (folder / CONFUSION_FILE).read_bytes() == b"PNG"
    assert f"({CONFUSION_FILE})" in (folder / "README.md").read_text()
    assert "\n# my kitchen\n" in (folder / "README.md").read_text()
    classifier.save_pretrained(folder)
    assert not (folder / CONFUSION_FILE).exists() and CONFUSION_FILE not in (folder / "README.md").read_text()


# names that Markdown, HTML or the marks could take for theirs

ODD_NAMES = [
    "a`b",
    "`",
    "``two`` ticks",
    "a|b",
    "*stars* and _lines_",
    "<b>bold</b>",
    "<script>alert(1)</script>",
    "fish &amp; chips",
    "[a](https://b.c)",
    "~~out~~",
    "back\\slash\\",
    "$x$ {{ y }} {% z %}",
    START,
    END,
]


class Shown(HTMLParser):
    """What a reader sees of HTML: the text of each table cell, heading and piece of code."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.seen = [], {}, set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.tags.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        for tag in self.tags:
            self.texts[tag][-1] += data


def shown(card: ModelCard) -> Shown:
    return Shown(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text))


@pytest.mark.parametrize("name", [*ODD_NAMES, "two\nlines", " spaces  around "])
def test_odd_names_are_shown_as_they_are(name):
    classes = TaskClasses(make_texts([4, 3]), (make_texts([5, 4]),), (name, "cup"), (f"{name} {{}}",))
    score = Score(name, 50.0, split=name, images=3)
    card = make_card(classes, SEPConfig(), "CLIPModel", CardDetails(title=name, scores=[score], license="mit"))
    page, name = shown(card), " ".join(name.split())
    assert page.texts["h1"] == [name]
    assert [text for text in page.texts["code"] if "\n" not in text] == [name, "cup", f"{name} {{}}"]
    assert page.texts["td"] == [f"{name}, {name}", "3", "50.0", "not measured"]
    assert page.seen == {"h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "a"}
    assert page.texts["a"] == ["arXiv 2405.15549", "SEP: Self-Enhanced Prompt Tuning for Visual-Language Model"]


@pytest.mark.parametrize("name", ['my "best"', "a\\b", END, "```"])
def test_odd_names_of_folders_are_strings_of_python(name):
    block = re.search(r"^```python\n(.*?)^```$", card_of(subfolder=name).text, re.DOTALL | re.MULTILINE)[1]
    arguments = re.search(r"from_pretrained\((.*)\)\n", block)[1]
    assert ast.literal_eval(arguments.removeprefix('"ann/household", subfolder=')) == name


def test_names_do_not_act_on_a_terminal():
    name = "red\x1b[31m, \u202eturned, \x9bC1"
    classes = TaskClasses(make_texts([4, 3]), (make_texts([5, 4]),), (name, "cup"), (f"{name} {{}}",))
    scores = [Score(name, 50.0, split=name)]
    card = make_card(classes, SEPConfig(), "CLIPModel", CardDetails(title=name, scores=scores, license="mit"))
    assert {c for c in str(card) if acts(c)} == {"\n"}
    (result,) = ModelCard(str(card)).data.eval_results  # the metadata are escaped as YAML reads them
    assert (result.dataset_name, result.dataset_split) == (name, name)
    shown_name = r"red\x1b[31m, \u202eturned, \x9bC1"
    page = shown(card)
    assert page.texts["h1"] == [shown_name] and page.texts["td"][0] == f"{shown_name}, {shown_name}"
    assert [text for text in page.texts["code"] if "\n" not in text] == [shown_name, "cup", f"{shown_name} {{}}"]


@pytest.mark.parametrize("place", ["names", "templates", "title", "description", "protocol", "limits", "dataset"])
@pytest.mark.parametrize("mark", [START, END, f"{END}\n\n{START}"])
def test_a_mark_in_a_text_does_not_make_the_card_grow(place, mark):
    names, templates = ("cup", "lamp"), ("a photo of a {}.",)
    if place == "names":
        names = (mark, "lamp")
    if place == "templates":
        templates = (f"{mark} {{}}",)
    own = {place: mark} if place in ("title", "description", "protocol", "limits") else {}
    scores = [Score(mark if place == "dataset" else "mine", 50.0)]
    classes = TaskClasses(make_texts([4, 3]), (make_texts([5, 4]),), names, templates)
    arguments = classes, SEPConfig(), "CLIPModel", CardDetails(scores=scores, **own)
    first = make_card(*arguments, old=ModelCard("---\nlicense: mit\n---\nMine.\n"))
    assert (first.text.count(START), first.text.count(END)) == (1, 1)
    assert first.text.endswith(f"{END}\n\nMine.\n")
    assert str(make_card(*arguments, old=ModelCard(str(first)))) == str(first)


# metadata


def test_metadata():
    data = ModelCard(str(card_of())).data.to_dict()  # read back from YAML
    assert data.pop("model-index") == [
        {
            "name": "Household things",
            "results": [
                {
                    "task": {"type": "zero-shot-image-classification"},
                    "dataset": {"name": name, "type": kind, "split": split},
                    "metrics": [{"type": "accuracy", "value": value, "name": "Accuracy with SEP"}],
                }
                for name, kind, split, value in [
                    ("Caltech 101", "ann/caltech101", "test", 61.66),
                    ("My kitchen", "My kitchen", "val", 90.0),
                ]
            ],
        }
    ]
    assert data == {
        "base_model": "openai/clip-vit-base-patch16",
        "base_model_relation": "adapter",
        "datasets": ["ann/caltech101"],
        "library_name": "sep_peft",
        "license": "apache-2.0",
        "metrics": ["accuracy"],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["sep", "sep_peft", "peft", "clip", "few-shot", "prompt-learning"],
    }


@pytest.mark.parametrize("name", ["/home/ann/clip", "./clip", "a/b/c", "", "two words"])
@pytest.mark.parametrize("field", ["base_model", "repo_id", "datasets"])
def test_names_that_the_hub_cannot_have(field, name):
    message = f'{field} must be a name on the Hub such as "user/name", but got {name!r}.'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CardDetails(**{field: [name] if field == "datasets" else name})


def test_a_folder_may_have_the_name_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "clip").mkdir(parents=True)
    assert CardDetails(base_model="ann/clip").base_model == "ann/clip"


def test_where_the_package_is_installed_from():
    """pyproject.toml is the one place that says it."""
    assert f'Repository = "{REPOSITORY}"' in (ASSETS.parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize("value", [-0.1, 100.1])
@pytest.mark.parametrize("field", ["accuracy", "zero_shot"])
def test_accuracies_are_in_percent(field, value):
    message = f"{field} must be in percent, between 0 and 100, but got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Score("mine", **({"accuracy": 50.0} | {field: value}))


# what its owner wrote


def test_a_second_card_replaces_its_own_part_alone():
    first = card_of()
    own = ModelCard(str(first).replace(START, f"Before.\n\n{START}").replace(END, f"{END}\n\nAfter.\n"))
    second = card_of(CardDetails(title="Anew"), old=own)
    assert second.text.startswith(f"\nBefore.\n\n{START}\n\n# Anew\n")
    assert second.text.endswith(f"{END}\n\nAfter.\n\n")
    assert "Household" not in second.text


def test_a_card_without_marks_follows_whole():
    old = ModelCard("---\nlicense: mit\ntags: [mine]\n---\n# My own card\n\nIn my words.\n")
    card = card_of(CardDetails(), old=old)
    assert card.text.endswith(f"{END}\n\n# My own card\n\nIn my words.\n")
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "sep", "sep_peft", "peft", "clip", "few-shot", "prompt-learning"]
    assert card_of(CardDetails(), old=ModelCard(str(card))).text == card.text  # and stays so


def test_metadata_of_the_owner_stays():
    old = ModelCard(
        "---\nlanguage: de\nlicense: mit\ndatasets: ann/more\nmetrics: [f1]\nbase_model: /home/ann/clip\n"
        "tags: ['base_model:adapter:/home/ann/clip', kitchen]\nco2_eq_emissions: 3\n---\n"
    )
    theirs = EvalResult("image-classification", "x", "X", "f1", 0.5, metric_name="F1")
    old.data.model_name, old.data.eval_results = "Ours", [theirs]
    data = card_of(old=old).data
    assert (data.language, data.license, data["co2_eq_emissions"]) == ("de", "apache-2.0", 3)
    assert (data.datasets, data.metrics) == (["ann/more", "ann/caltech101"], ["f1", "accuracy"])
    assert data.tags == ["kitchen", "sep", "sep_peft", "peft", "clip", "few-shot", "prompt-learning"]
    assert data.base_model == "openai/clip-vit-base-patch16"
    assert (data.model_name, len(data.eval_results), data.eval_results[0]) == ("Ours", 3, theirs)
    again = card_of(CardDetails(), old=ModelCard(str(card_of(old=old)))).data
    assert again.eval_results == [theirs]  # scores of other weights are gone


def test_peft_s_unfilled_template_is_dropped(tmp_path):
    classifier = make_classifier()
    classifier.model.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
    classifier.save_pretrained(tmp_path)
    assert "[More Information Needed]" not in (tmp_path / "README.md").read_text()


def test_peft_s_template_with_a_word_of_the_owner_is_kept(tmp_path):
    classifier = make_classifier()
    classifier.model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("[More Information Needed]", "By Ann", 1))
    classifier.save_pretrained(tmp_path)
    assert "By Ann" in path.read_text()


@pytest.mark.parametrize("content", ["---\na: [\n---\n", "---\n- a list\n---\n"], ids=["broken", "a list"])
def test_metadata_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^The metadata of the model card {path} cannot be read "):
        make_classifier().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


# saved


def test_the_base_model_s_folder_is_not_in_the_card(tmp_path):
    folder = ASSETS / "clip-small"
    base = CLIPModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model = get_peft_model(base, SEPConfig.published(num_text_prompts=2, fusion="none"))
    classifier = SEPClassifier.from_class_names(model, processor, ["cup", "lamp"]).eval()
    classifier.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert str(folder) not in card and str(tmp_path) not in card and "base_model:" not in card

    image = next((ASSETS / "caltech101" / "test" / "cup").iterdir())
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    with_peft = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    result = usual().run(block.replace("image.jpg", str(image)) + with_peft, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{classifier.predict(image, top_k=1)}\n"), result.stderr


def test_an_adapter_that_names_no_base_model(tmp_path):
    make_classifier().save_pretrained(tmp_path)
    message = (
        f"The adapter {tmp_path} does not name a base model of transformers. Load the model and hand it in: "
        "SEPClassifier.from_pretrained(path, model=model, processor=processor)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SEPClassifier.from_pretrained(tmp_path)
