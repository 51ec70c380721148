"""What `import sep_peft` brings along, and the names that come when they are used."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import sep_peft


def fresh(*statements: str) -> str:
    """What these statements print in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", "\n".join(statements)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = ["transformers.trainer", "matplotlib", "typer", "sep_peft.classifier", "sep_peft.training", "sep_peft.cli"]


def test_importing_the_package_registers_the_method_and_no_more():
    code = [
        "import peft, sys",
        "before = set(sys.modules)",
        "import sep_peft",
        "print(peft.PeftType('SEP') in peft.PEFT_TYPE_TO_CONFIG_MAPPING)",
        f"print(*[name for name in {HEAVY} if name in set(sys.modules) - before])",
    ]
    assert fresh(*code).split("\n") == ["True", "", ""]


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
    code = [
        "import sep_peft",
        "before = dir(sep_peft)",
        "assert set(sep_peft.__all__) <= set(before)",
        "from sep_peft import *",
        "from sep_peft import SEPClassifier, explain",
        "assert SEPClassifier is sep_peft.classifier.SEPClassifier",
        "print(*[name for name in sep_peft.__all__ if name not in globals()])",
    ]
    assert fresh(*code) == "\n"


def test_the_room_of_classifiers_is_an_attribute():
    assert fresh("import sep_peft", "print(sep_peft.classifier.SEPClassifier.__name__)") == "SEPClassifier\n"


def test_pickled_classes_come_back_where_only_the_package_is_imported():
    data = pickle.dumps(sep_peft.TaskClasses)
    assert fresh("import pickle, sep_peft", f"print(pickle.loads({data!r}) is sep_peft.TaskClasses)") == "True\n"


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
    found = {name: f"classifier.{file}" for name, file in sep_peft._OF_CLASSIFIER.items()}
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert named == found
