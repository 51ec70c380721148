"""Texts of one's own about each class, which the frozen branch reads."""

from __future__ import annotations

import json

import pytest
import torch
from shallow_classifier import BASE, NAMES, classifier_maker
from small_classifier import raises
from transformers import AutoModel, AutoProcessor

from sep_peft import SEPClassifier, TaskClasses
from sep_peft.training import Recipe


ABOUT = {"lamp": ["a light beside a bed.", "it has a bulb and a shade."], "pizza": ["round food with cheese."]}
OTHER = {"lamp": ["something that shines."]}
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain() -> SEPClassifier:
    return classifier_maker(Recipe())().eval()


def described(plain, template="a photo of a {}.", descriptions=ABOUT) -> SEPClassifier:
    return SEPClassifier.from_class_names(plain.model, plain.processor, NAMES, template, descriptions).eval()


@torch.no_grad()
def embedded(plain, texts: list[str]) -> torch.Tensor:
    """Of the model without an adapter, (T, E), of unit length."""
    inputs = plain.processor.tokenizer(texts, return_tensors="pt", padding=True)
    with plain.model.disable_adapter():
        output = plain.model.get_text_features(**inputs)
    return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)


@pytest.mark.parametrize("templates", [[], ["a photo of a {}."], ["a {}.", "the {}."]], ids=len)
def test_all_texts_of_a_class_count_alike(templates, plain):
    classifier = described(plain, templates)
    for row, name in zip(classifier.encoder.frozen_embeds(), NAMES, strict=True):
        texts = [*(text.replace("{}", name) for text in templates), *ABOUT[name]]
        expected = torch.nn.functional.normalize(embedded(plain, texts).mean(dim=0), dim=0)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    names = classifier.classes.class_inputs["input_ids"]
    assert torch.equal(names, plain.classes.class_inputs["input_ids"])  # the prompted branch reads them alone


def test_a_class_without_any_has_its_template(plain):
    found, usual = described(plain, descriptions=OTHER).encoder.frozen_embeds(), plain.encoder.frozen_embeds()
    torch.testing.assert_close(found[1], usual[1])
    assert not torch.allclose(found[0], usual[0], atol=1e-3)


def test_a_training_step_reads_them(plain):
    """Its consistency loss holds SEP's texts near those of the frozen branch."""
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        parts = [c.train()(PIXELS, labels).parts.text_consistency for c in (described(plain), plain)]
    plain.eval()
    assert parts[0] != parts[1]


@torch.no_grad()
def test_they_are_saved(plain, tmp_path):
    classifier = described(plain).finish_training()
    classifier.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "sep_classes.json").read_text())["format_version"] == 3
    model, processor = AutoModel.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=model, processor=processor)
    assert loaded.classes.description_texts == tuple(map(tuple, ABOUT.values()))
    assert torch.equal(loaded(PIXELS).logits, classifier(PIXELS).logits)
    loaded.set_classes(["lamp", "cup"])
    assert loaded.classes.descriptions is None
    assert loaded.set_classes(NAMES).classes is loaded.trained
    assert loaded.set_classes(NAMES, descriptions=OTHER).classes.description_texts == (("something that shines.",), ())
    loaded.add_task("shiny", NAMES, adapter="default", descriptions=OTHER)
    assert loaded.tasks["shiny"].classes.description_texts == loaded.classes.description_texts


def test_descriptions_alone_come_back_with_the_trained_names(plain):
    classifier = described(plain, template=[]).finish_training()
    trained = classifier.classes
    assert trained.templates == ()
    assert classifier.set_classes(["cup", "crab"]).classes.templates == ("a photo of a {}.",)
    assert classifier.set_classes(NAMES).classes is trained
    assert classifier.set_classes(NAMES, template="a {}.").classes.descriptions is None


@pytest.mark.parametrize(
    ("template", "descriptions", "message"),
    [
        ("a {}.", ["a cat"], "descriptions must map class names to lists of texts, but got ['a cat']."),
        ("a {}.", {"cat": ["a"]}, "descriptions are of 'cat', but the classes are 'lamp', 'pizza'."),
        ("a {}.", {"lamp": "a light"}, "Descriptions of 'lamp' must be a list of texts, but got 'a light'."),
        ("a {}.", {"lamp": []}, "Descriptions of 'lamp' must be a list of texts, but got []."),
        ("a {}.", {"lamp": [" "]}, "A description must be a text that is not blank, but got ' '."),
        ("a {}.", {"lamp": [3]}, "A description must be a text that is not blank, but got 3."),
        ("a {}.", {}, "descriptions hold no text. Leave them out, or describe a class."),
        ([], {"lamp": ["a"]}, "Without a template every class needs a description, but 'pizza' have none."),
        ([], None, "template must be a text or a list of texts, but got []."),
    ],
)
def test_refusals(template, descriptions, message, plain):
    with raises(message):
        TaskClasses.from_names(NAMES, plain.processor, template, descriptions)


def test_classes_with_descriptions_take_no_others(plain):
    with raises("descriptions are for class names; TaskClasses have their own."):
        plain.set_classes(plain.classes, descriptions=ABOUT)


def test_some_of_the_classes_have_their_own(plain):
    about = {"pizza": ["a flat bread.", "a dish."], "lamp": ["a light."]}
    all_of_them = TaskClasses.from_names([*NAMES, "cup"], plain.processor, descriptions=about)
    for names in (["cup", NAMES[1], NAMES[0]], [NAMES[1]]):
        some = all_of_them.only(names)
        expected = TaskClasses.from_names(
            names, plain.processor, descriptions={name: about[name] for name in names if name in about}
        )
        assert some.names == expected.names and some.description_texts == expected.description_texts
        for found, wanted in zip(
            (*some.template_inputs, some.descriptions.inputs),
            (*expected.template_inputs, expected.descriptions.inputs),
            strict=True,
        ):
            rows = zip(found["input_ids"].tolist(), found["attention_mask"].tolist(), strict=True)
            tokens = [[i for i, m in zip(*row, strict=True) if m] for row in rows]
            rows = zip(wanted["input_ids"].tolist(), wanted["attention_mask"].tolist(), strict=True)
            assert tokens == [[i for i, m in zip(*row, strict=True) if m] for row in rows]
    assert all_of_them.only(["cup"]).descriptions is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": [["a"]]}, "input_ids must have shape (1, tokens), but got (3, 12)."),
        ({"texts": [["a", "b", "c"]]}, "There are descriptions of 1 class for 2 class names."),
        ({"texts": "abc"}, "texts of descriptions must be lists of texts, but got 'abc'."),
        ({"texts": [["a", "b"], "c"]}, "texts of descriptions must be lists of texts, but got [['a', 'b'], 'c']."),
        ({"texts": [["a", "b"], [3]]}, "A description must be a text that is not blank, but got 3."),
        ({"texts": [["a", "b", "\ud800"], []]},
         "A description must be a text that UTF-8 can hold, but got '\\ud800'. Rename it."),
        ({"inputs": [[1]]}, "inputs of descriptions of the class list must hold dicts of token ids, but got [[1]]."),
        ({"inputs": {"input_ids": [[1], [2], [-1]]}}, "input_ids must be at least 0, but got -1."),
        ({"inputs": {"input_ids": [[1], [2]]}}, "input_ids must have shape (3, tokens), but got (2, 1)."),
        (None, "descriptions of the class list must have texts and inputs, but got None."),
    ],
)  # fmt: skip
def test_damaged_files(change, message, plain):
    classes = TaskClasses.from_names(NAMES, plain.processor, descriptions=ABOUT)
    data = classes.to_json()
    assert TaskClasses.from_json(data).descriptions.texts == classes.descriptions.texts
    data["descriptions"] = None if change is None else data["descriptions"] | change
    with raises(message):
        TaskClasses.from_json(data)
