"""The shape of the package: imports go one way, each layer knows only what it may."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sep_peft


PACKAGE = Path(sep_peft.__file__).parent
#: From the bottom up; a file may import those above it in this list only.
ORDER = [
    "version",
    "registration",
    "architectures",
    "checkpoint",
    "functional",
    "fusion",
    "families",
    "resolve",
    "pictures",
    "losses",
    "classes",
    "config",
    "settings",
    "passes",
    "mixed_batch",
    "layer",
    "texts",
    "records",
    "mixing",
    "wrapping",
    "tower",
    "scoring",
    "compatibility",
    "combine",
    "model",
    "trunk_cache",
    "hotswap",
    "model_card",
    "text_chunks",
    "class_encoder",
    "classifier_files",
    "tasks",
    "prediction",
    "classifier",
    "export",
    "pipelines",
    "convert",
    "explain",
    "folders",
    "evaluation",
    "training",
    "commands",
    "cli",
    "__main__",
    "__init__",
]
#: Files that must do without these packages.
WITHOUT = {
    "fusion": {"peft", "transformers"},
    "functional": {"peft", "transformers"},
    "losses": {"peft", "transformers"},
    "architectures": {"peft", "transformers", "torch"},
    "families": {"peft", "transformers", "torch"},
}


def imports(name: str) -> tuple[set[str], set[str]]:
    """Own files and foreign packages that a file imports, apart from those for type checkers."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    hidden = {id(inner) for node in checked for inner in ast.walk(node)}
    own, foreign = set(), set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return own, foreign


def test_every_file_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    own, foreign = imports(name)
    assert own <= set(ORDER[: ORDER.index(name)])
    assert not foreign & WITHOUT.get(name, set())
    if name != "registration":
        tree = (PACKAGE / f"{name}.py").read_text()
        assert "register_peft_method" not in tree and "PEFT_TYPE_TO" not in tree


def test_no_file_is_too_long_to_read():
    assert {path.name: n for path in PACKAGE.glob("*.py") if (n := len(path.read_text().splitlines())) > 450} == {}


def test_importing_does_not_need_matplotlib():
    code = "import sys; sys.modules.update(matplotlib=None); import sep_peft; print(sep_peft.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip() == sep_peft.__version__, result.stderr


def test_public_names_exist_and_are_documented():
    for name in sep_peft.__all__:
        thing = getattr(sep_peft, name)
        assert name == "__version__" or thing.__doc__, name
