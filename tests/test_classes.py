"""`TaskClasses`: names and templates become token ids, and both are stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_clip import make_texts
from transformers import AutoProcessor, AutoTokenizer

from sep_peft import TaskClasses


CLIP = Path(__file__).parents[1] / "examples/assets/clip-small"
NAMES = ["cougar face", "cup", "dragonfly"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CLIP)


def token_ids(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def test_what_the_two_branches_read(tokenizer):
    classes = TaskClasses.from_names(NAMES, tokenizer)
    assert len(classes) == 3
    assert classes.names == tuple(NAMES)
    assert classes.templates == ("a photo of a {}.",)
    assert token_ids(classes.class_inputs) == [tokenizer(f"{name}.")["input_ids"] for name in NAMES]
    assert len(classes.template_inputs) == 1
    expected = [tokenizer(f"a photo of a {name}.")["input_ids"] for name in NAMES]
    assert token_ids(classes.template_inputs[0]) == expected


def test_several_templates(tokenizer):
    templates = ["a {} in the wild", "art of the {}."]
    classes = TaskClasses.from_names(NAMES, tokenizer, templates)
    assert classes.templates == tuple(templates)
    for template, inputs in zip(templates, classes.template_inputs, strict=True):
        assert token_ids(inputs) == [tokenizer(template.format(name))["input_ids"] for name in NAMES]


def test_underscores_are_read_as_spaces(tokenizer):
    classes = TaskClasses.from_names(["cougar_face", "a_b_c"], tokenizer)
    assert classes.names == ("cougar_face", "a_b_c")  # as predictions show them
    assert token_ids(classes.class_inputs) == [tokenizer(text)["input_ids"] for text in ("cougar face.", "a b c.")]
    assert token_ids(classes.template_inputs[0])[0] == tokenizer("a photo of a cougar face.")["input_ids"]


@pytest.mark.parametrize(
    "names", [tuple(NAMES), dict.fromkeys(NAMES).keys(), (name for name in NAMES)], ids=["tuple", "keys", "generator"]
)
def test_any_sequence_of_names(names, tokenizer):
    assert TaskClasses.from_names(names, tokenizer).names == tuple(NAMES)


def test_a_processor_stands_for_its_tokenizer(tokenizer):
    with_processor = TaskClasses.from_names(NAMES, AutoProcessor.from_pretrained(CLIP))
    assert with_processor.to_json() == TaskClasses.from_names(NAMES, tokenizer).to_json()


def test_braces_in_a_name_are_text(tokenizer):
    classes = TaskClasses.from_names(["{}", "{x}"], tokenizer)
    assert token_ids(classes.class_inputs) == [tokenizer(text)["input_ids"] for text in ("{}.", "{x}.")]


SAME = "Class names must differ in more than underscores and spaces, which are read alike, but got {!r} and {!r}."
BLANK = "A class name must be a text that is not blank, but got {!r}."


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "The class list is empty; at least one class name is needed."),
        (["cup", "lamp", "cup"], "Class names must differ, but these occur more than once: 'cup'."),
        (["b", "a", "b", "a"], "Class names must differ, but these occur more than once: 'a', 'b'."),
        (["cup", ""], BLANK.format("")),
        (["cup", " \t"], BLANK.format(" \t")),
        (["cup", None], BLANK.format(None)),
        ([3], BLANK.format(3)),
        ("cup", "Class names must be a list of names, but got the single string 'cup'."),
        ({"cup": 0}, "Class names must be a list of names, but got {'cup': 0}."),
        (b"cup", "Class names must be a list of names, but got b'cup'."),
        (3, "Class names must be a list of names, but got 3."),
        (["cup", "__"], BLANK.format("__")),
        (["cat_dog", "cat dog"], SAME.format("cat_dog", "cat dog")),
        (["cat ", "cup", "cat"], SAME.format("cat ", "cat")),
        (["a  b", "a\tb"], SAME.format("a  b", "a\tb")),
    ],
    ids=str,
)
def test_bad_names(names, message, tokenizer):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskClasses.from_names(names, tokenizer)


@pytest.mark.parametrize("template", ["a photo", "", "{} and {}", "{name}", "{0}"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_bad_template(template, several, tokenizer):
    message = f"A template must contain {{}} once, in place of the class name, but got {template!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskClasses.from_names(NAMES, tokenizer, ["a {}.", template] if several else template)


@pytest.mark.parametrize("template", [[], 3, None, {"a {}": 1}], ids=str)
def test_what_is_no_template(template, tokenizer):
    message = f"template must be a text or a list of texts, but got {template!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskClasses.from_names(NAMES, tokenizer, template)


def test_a_number_among_templates(tokenizer):
    message = "A template must contain {} once, in place of the class name, but got 3."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskClasses.from_names(NAMES, tokenizer, ["a {}.", 3])


ALIKE = (
    "These class names have the same tokens, so their scores will always be equal: 'Cup', 'cup'. Choose names that the "
    "tokenizer tells apart."
)


def test_names_that_tokenize_alike_are_warned_of(tokenizer):
    """The vocabulary is in lower case."""
    with pytest.warns(UserWarning, match=f"^{re.escape(ALIKE)}$"):
        classes = TaskClasses.from_names(["Cup", "lamp", "cup"], tokenizer)
    with pytest.warns(UserWarning, match=f"^{re.escape(ALIKE)}$"):
        TaskClasses.from_json(classes.to_json())


def test_other_names_are_not_warned_of(tokenizer, recwarn):
    TaskClasses.from_json(TaskClasses.from_names(["Cup", "cups", "a cup", "cup."], tokenizer).to_json())
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("template", ["{} of {kind}", "{{} }", "{0} {}"])
def test_other_braces_in_a_template_are_text(template, tokenizer):
    classes = TaskClasses.from_names(["cup"], tokenizer, template)
    assert token_ids(classes.template_inputs[0]) == [tokenizer(template.replace("{}", "cup"))["input_ids"]]


# from token ids


def test_names_are_made_up_where_there_are_none():
    classes = TaskClasses(make_texts([3, 4]))
    assert classes.names == ("class 0", "class 1")
    assert classes.templates == classes.template_inputs == ()


FOUR = make_texts([3, 4, 5, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_inputs": {}}, "class_inputs must hold input_ids of at least one class, but it is empty."),
        (
            {"class_inputs": {"input_ids": torch.zeros(0, 5)}},
            "class_inputs must hold input_ids of at least one class, but it is empty.",
        ),
        (
            {"class_inputs": {"input_ids": torch.zeros(4, 5, 1)}},
            "input_ids must have shape (4, tokens), but got (4, 5, 1).",
        ),
        ({"class_inputs": {"input_ids": torch.zeros(4)}}, "input_ids must have shape (4, tokens), but got (4,)."),
        (
            {"class_inputs": FOUR | {"attention_mask": torch.ones(3, 5)}},
            "attention_mask must have shape (4, tokens), but got (3, 5).",
        ),
        (
            {"class_inputs": FOUR, "template_inputs": (FOUR, make_texts([3, 4]))},
            "input_ids must have shape (4, tokens), but got (2, 4).",
        ),
        ({"class_inputs": FOUR, "names": ("a", "b")}, "There are 2 class names for 4 texts of class_inputs."),
        (
            {"class_inputs": FOUR, "names": ("a", "b", "a", "c")},
            "Class names must differ, but these occur more than once: 'a'.",
        ),
        ({"class_inputs": FOUR, "names": ("a", "b", "c", " ")}, BLANK.format(" ")),
        (
            {"class_inputs": FOUR, "names": "abcd"},
            "Class names must be a list of names, but got the single string 'abcd'.",
        ),
        ({"class_inputs": {"input_ids": torch.ones(4, 5)}}, "input_ids must be integers, but got torch.float32."),
        ({"class_inputs": {"input_ids": torch.ones(4, 5) > 0}}, "input_ids must be integers, but got torch.bool."),
        ({"class_inputs": {"input_ids": [[1, 2]]}}, "input_ids must be a tensor, but got [[1, 2]]."),
        ({"class_inputs": {"input_ids": -FOUR["input_ids"]}}, "input_ids must be at least 0, but got -62."),
        (
            {"class_inputs": {"input_ids": torch.ones(4, 0, dtype=torch.long)}},
            "input_ids must hold a token for every text, but their length is 0.",
        ),
        (
            {"class_inputs": FOUR, "template_inputs": ({"attention_mask": FOUR["attention_mask"]},)},
            "Tokenized texts must hold input_ids, but got ['attention_mask'].",
        ),
        (
            {"class_inputs": FOUR | {"attention_mask": torch.zeros_like(FOUR["attention_mask"])}},
            "attention_mask must leave every text a token, but has none for text 0.",
        ),
        (
            {"class_inputs": FOUR | {"attention_mask": 2 * FOUR["attention_mask"]}},
            "attention_mask must hold 1 for tokens and 0 for padding, but has other values.",
        ),
        (
            {"class_inputs": FOUR | {"attention_mask": torch.ones(4, 2)}},
            f"attention_mask must have the shape of input_ids, {tuple(FOUR['input_ids'].shape)}, not (4, 2).",
        ),
        (
            {"class_inputs": FOUR, "zero_shot_margin": "1"},
            "zero_shot_margin must be at least 0 and finite, but got '1'.",
        ),
        (
            {"class_inputs": FOUR, "templates": (1,)},
            "A template must contain {} once, in place of the class name, but got 1.",
        ),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_bad_tensors(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskClasses(**arguments)


# storing


def assert_equal(a: TaskClasses, b: TaskClasses) -> None:
    assert (a.names, a.templates, len(a.template_inputs)) == (b.names, b.templates, len(b.template_inputs))
    for first, second in zip((a.class_inputs, *a.template_inputs), (b.class_inputs, *b.template_inputs), strict=True):
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype
            assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("templates", ["a photo of a {}.", ["a {}", "the {}"]], ids=["one", "two"])
def test_json_round_trip(templates, tokenizer):
    classes = TaskClasses.from_names(["café", "日本_犬"], tokenizer, templates)
    assert_equal(TaskClasses.from_json(json.loads(json.dumps(classes.to_json()))), classes)


def test_json_round_trip_of_token_ids():
    classes = TaskClasses({"input_ids": FOUR["input_ids"]}, (FOUR,))
    assert_equal(TaskClasses.from_json(json.loads(json.dumps(classes.to_json()))), classes)


def test_an_entry_is_missing():
    data = TaskClasses(FOUR).to_json()
    del data["names"], data["template_inputs"]
    with pytest.raises(ValueError, match=r"^The class list lacks names, template_inputs\.$"):
        TaskClasses.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": "abcd"}, "names of the class list must be a list, but got 'abcd'."),
        ({"names": {"a": 1, "b": 2}}, "names of the class list must be a list, but got {'a': 1, 'b': 2}."),
        ({"names": []}, "The class list is empty; at least one class name is needed."),
        ({"names": ["a", "b", "c", 4]}, BLANK.format(4)),
        ({"templates": "a {}"}, "templates of the class list must be a list, but got 'a {}'."),
        ({"templates": [1]}, "A template must contain {} once, in place of the class name, but got 1."),
        ({"template_inputs": {}}, "template_inputs of the class list must be a list, but got {}."),
        ({"template_inputs": [3]}, "template_inputs of the class list must hold dicts of token ids, but got 3."),
        ({"class_inputs": [[1]]}, "class_inputs of the class list must hold dicts of token ids, but got [[1]]."),
        (
            {"class_inputs": {"input_ids": [[1.5], [2.0]]}},
            "input_ids in class_inputs of the class list must hold lists of integers, but got [[1.5], [2.0]].",
        ),
        (
            {"class_inputs": {"input_ids": "ids"}},
            "input_ids in class_inputs of the class list must hold lists of integers, but got 'ids'.",
        ),
        (
            {"class_inputs": {"input_ids": [[True]]}},
            "input_ids in class_inputs of the class list must hold lists of integers, but got [[True]].",
        ),
        (
            {"class_inputs": {"input_ids": [[10**30]]}},
            f"input_ids in class_inputs of the class list must hold lists of integers, but got [[{10**30}]].",
        ),
        (
            {"class_inputs": {"input_ids": [[1], [1, 2]]}},
            "input_ids in class_inputs of the class list must hold lists of one length, but they differ.",
        ),
        ({"zero_shot_margin": float("nan")}, "zero_shot_margin must be at least 0 and finite, but got nan."),
        ({"new_class_margin": [1]}, "new_class_margin must be at least 0 and finite, but got [1]."),
    ],
    ids=str,
)
def test_a_damaged_class_list_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskClasses.from_json(TaskClasses(FOUR).to_json() | change)
