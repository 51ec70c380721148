"""What `import sep_peft` brings along, and the names that come when they are used."""

from __future__ import annotations

import pickle
import sys

import pytest
from fresh import usual

import sep_peft


HEAVY = ["transformers.trainer", "matplotlib", "typer", "sep_peft.classifier", "sep_peft.training", "sep_peft.cli"]
PICKLED = pickle.dumps(sep_peft.TaskClasses)
FRESH = {
    "registers": [
        "import peft, sys",
        "before = set(sys.modules)",
        "import sep_peft",
        "print(peft.PeftType('SEP') in peft.PEFT_TYPE_TO_CONFIG_MAPPING)",
        f"print(*[name for name in {HEAVY} if name in set(sys.modules) - before])",
    ],
    "names": [
        "import sep_peft",
        "before = dir(sep_peft)",
        "assert set(sep_peft.__all__) <= set(before)",
        "from sep_peft import *",
        "from sep_peft import SEPClassifier, explain",
        "assert SEPClassifier is sep_peft.classifier.SEPClassifier",
        "print(*[name for name in sep_peft.__all__ if name not in globals()])",
    ],
    "room": ["import sep_peft", "print(sep_peft.classifier.SEPClassifier.__name__)"],
    "pickle": ["import pickle, sep_peft", f"print(pickle.loads({PICKLED!r}) is sep_peft.TaskClasses)"],
}


def output_of(name: str) -> str:
    """What `FRESH` prints where only PEFT is imported."""
    return usual().output("\n".join(FRESH[name]))


def test_importing_the_package_registers_the_method_and_no_more():
    assert output_of("registers").split("\n") == ["True", "", ""]


@pytest.mark.parametrize("name", sep_peft.__all__)
def test_every_name_can_be_imported_first(name):
    """The same object whether it is imported or read from the package, from the package itself or its file."""
    thing = getattr(sep_peft, name)
    assert name in dir(sep_peft)
    assert getattr(sep_peft, name) is thing
    if getattr(thing, "__module__", None):
        assert getattr(sys.modules[thing.__module__], name) is thing
        assert pickle.loads(pickle.dumps(thing)) is thing


def test_all_names_in_a_fresh_interpreter():
    assert output_of("names") == "\n"


def test_the_room_of_classifiers_is_an_attribute():
    assert output_of("room") == "SEPClassifier\n"


def test_pickled_classes_come_back_where_only_the_package_is_imported():
    assert output_of("pickle") == "True\n"


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match=r"^module 'sep_peft' has no attribute 'SEPClasifier'$"):
        sep_peft.SEPClasifier  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SEPClasifier'"):
        from sep_peft import SEPClasifier  # noqa: F401


def test_names_for_type_checkers_are_those_that_are_imported_late():
    """What stands below TYPE_CHECKING and what `__getattr__` finds are the same."""
    import ast
    from pathlib import Path

    body = ast.parse(Path(sep_peft.__file__).read_text()).body
    block = next(node for node in body if isinstance(node, ast.If))
    named = {alias.name: node.module for node in block.body for alias in node.names if node.module is not None}
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert named == sep_peft._LATER
