"""What the package asks for is what its tests run with, and what is too old is refused when it is imported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_classifier import raises

from sep_peft import requirements


ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
LIMITS = dict(
    re.findall(r'^    "([\w-]+)>=([\d.]+)",$', re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.M | re.S)[1], re.M)
)


def numbers(release: str) -> tuple[int, ...]:
    """Of a release, without zeros at its end: 0.21 and 0.21.0 are one."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", release).split(".")))


def test_every_dependency_has_a_limit_that_is_tested():
    assert {"transformers", "peft", "huggingface_hub", "safetensors"} < set(LIMITS) == set(OLDEST)
    limits = {name: numbers(release) for name, release in LIMITS.items() if name != "torch"}
    assert limits == {name: numbers(release) for name, release in OLDEST.items() if name != "torch"}


def test_readme_says_the_same():
    readme = (ROOT / "README.md").read_text()
    python = re.search(r'^requires-python = ">=([\d.]+)"$', PROJECT, re.MULTILINE)[1]
    limits = {"PyTorch": LIMITS["torch"], "transformers": LIMITS["transformers"], "PEFT": LIMITS["peft"]}
    assert f"Python {python}, " + "{}, {} and {}".format(*(f"{k} {v}" for k, v in limits.items())) in readme
    assert f"PyTorch {OLDEST['torch'].removesuffix('.0')} and both the" in readme
    assert f'target-version = "py{python.replace(".", "")}"' in PROJECT


def test_the_refusal_at_import_knows_the_same_limits():
    assert {name: oldest for name, (oldest, _) in requirements.OLDEST.items()} == {
        name: numbers(LIMITS[name]) for name in ("peft", "transformers")
    }


MESSAGES = {
    "peft": "sep_peft needs peft 0.21 or newer, but {} is installed, which saves and loads its adapters wrongly. Run: "
    'pip install "peft>=0.21"',
    "transformers": "sep_peft needs transformers 5.8 or newer, but {} is installed, which has towers that it does not "
    'know, and may load adapters without their weights. Run: pip install "transformers>=5.8"',
}


@pytest.mark.parametrize(("name", "found"), [("peft", "0.20.0"), ("peft", "0.9.1"), ("transformers", "5.7.0")])
def test_what_is_too_old_is_refused(name, found, monkeypatch):
    versions = {"peft": "0.21.0", "transformers": "5.8.0"}
    monkeypatch.setattr(requirements, "version", lambda package: (versions | {name: found})[package])
    with raises(MESSAGES[name].format(found), ImportError):
        requirements.check_installed()


@pytest.mark.parametrize(
    ("peft", "transformers"), [("0.21", "5.8"), ("0.21.0.dev0", "6.0.0rc1"), ("1.0+local", "5.8.0.dev0")]
)
def test_what_is_new_enough_passes(peft, transformers, monkeypatch):
    monkeypatch.setattr(requirements, "version", {"peft": peft, "transformers": transformers}.__getitem__)
    requirements.check_installed()
