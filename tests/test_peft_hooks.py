"""The private methods of PEFT that the plugin stands on are listed, and there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sep_peft
from sep_peft.tuner import peft_hooks
from sep_peft.tuner.config import SEPConfig
from sep_peft.tuner.model import SEPModel
from sep_peft.tuner.peft_hooks import HOOKS, moved_hooks
from sep_peft.tuner.tower import SEPTower


PRIVATE = {method for methods in HOOKS.values() for method in methods}


def test_the_installed_peft_has_them():
    assert moved_hooks() == []


def test_every_override_of_a_private_method_is_listed():
    overridden = set()
    for cls in (SEPModel, SEPTower, SEPConfig):
        for name in dir(cls):
            homes = [base.__module__.split(".")[0] for base in cls.__mro__ if name in vars(base)]
            if re.match("_[a-z]", name) and name != "_abc_impl" and homes[0] == "sep_peft" and "peft" in homes:
                overridden.add(name)
    assert len(overridden) > 10
    assert overridden <= PRIVATE


def test_every_listed_method_is_used():
    files = [path for path in Path(sep_peft.__file__).parent.rglob("*.py") if path.name != "peft_hooks.py"]
    source = "\n".join(path.read_text() for path in files)
    assert [name for name in PRIVATE if not re.search(rf"\b{name}\(", source)] == []


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        ({"_prepare": ("model",)}, "peft.tuners.tuners_utils:BaseTuner._prepare is gone"),
        (
            {"_prepare_model": ("config", "model")},
            "peft.tuners.tuners_utils:BaseTuner._prepare_model takes ('peft_config', 'model'), where it took "
            "('config', 'model')",
        ),
    ],
)
def test_what_has_moved_is_named(methods, line, monkeypatch):
    monkeypatch.setattr(peft_hooks, "HOOKS", {"peft.tuners.tuners_utils:BaseTuner": methods})
    assert moved_hooks() == [line]
    monkeypatch.setattr(peft_hooks, "HOOKS", {"peft:Gone": {"_a": ()}})
    assert moved_hooks() == ["peft:Gone._a is gone"]
