"""The shape of the package: rooms whose imports go one way, each knowing only what it may."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fresh import usual

import sep_peft


PACKAGE = Path(sep_peft.__file__).parent
#: Room -> rooms that it may import from. What lies beside the rooms (`version`, `tracing`, `words`) is for all.
ROOMS = {
    "method": set(),
    "families": set(),
    "tuner": {"method", "families"},
    "classifier": {"tuner", "method", "families"},
    "training": {"classifier", "tuner", "method"},
    "cli": {"training", "classifier", "tuner", "method"},
}
#: Files beside the rooms that every room may import.
COMMON = {"version", "tracing", "words"}
#: Room -> foreign packages that it must do without.
WITHOUT = {"method": {"peft", "transformers"}, "families": {"peft", "transformers"}}
FILES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
IN_ROOMS = [file for file in FILES if "/" in file]


def imports(file: str) -> tuple[set[str], set[str]]:
    """Own files ("room/file" or "room") and foreign packages that a file imports, those for type checkers included."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{file}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = file.split("/")[: -node.level]
            module = above + (node.module.split(".") if node.module else [])
            for alias in node.names:  # `from . import file` names a file, `from .file import name` does not
                path = "/".join([*module, alias.name])
                own.add(path if (PACKAGE / f"{path}.py").exists() else "/".join(module))
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return own, foreign


def test_every_room_is_listed():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("file", IN_ROOMS)
def test_rooms_import_one_way(file):
    own, foreign = imports(file)
    room = file.split("/")[0]
    assert {path.split("/")[0] for path in own} <= ROOMS[room] | COMMON | {room}
    assert not foreign & WITHOUT.get(room, set())
    if file != "tuner/registration":
        text = (PACKAGE / f"{file}.py").read_text()
        assert "register_peft_method" not in text and "PEFT_TYPE_TO" not in text


def test_no_files_know_each_other():
    """A file that imports another, for type checkers or in a function too, is not imported by it on any way."""
    graph = {file: {path for path in imports(file)[0] if path in FILES and path != file} for file in IN_ROOMS}
    done: set[str] = set()
    while ready := {file for file in graph if file not in done and graph[file] <= done | (set(FILES) - set(IN_ROOMS))}:
        done |= ready
    assert sorted(set(graph) - done) == []


def private_names(file: str) -> list[str]:
    """Private attributes that a file reads from something else than `self`, `cls`, `super()` or its own names."""
    tree = ast.parse((PACKAGE / f"{file}.py").read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
        if not (of_self or of_super or node.attr in own):
            found.append(f"{ast.unparse(node)}, line {node.lineno}")
    return found


#: Private names of torch, PEFT and the enumeration of methods, each with its reason in the file.
FOREIGN_PRIVATE = {"_name_", "_value_", "_member_names_", "_member_map_", "_value2member_map_"}
FOREIGN_PRIVATE |= {"_modules", "_parameters", "_orig_mod", "_version", "_assert_async", "_compiled_call_impl"}


@pytest.mark.parametrize("file", IN_ROOMS)
def test_no_file_reaches_into_private_parts_of_another(file):
    assert [name for name in private_names(file) if name.split(",")[0].split(".")[-1] not in FOREIGN_PRIVATE] == []


PUBLIC_PATHS = ["losses", "training", "folders", "evaluation", "families", "classifier", "cli"]


@pytest.mark.parametrize("name", PUBLIC_PATHS)
def test_public_paths_stay(name):
    """Each can be imported first of all."""
    code = f"import sep_peft.{name} as m; missing = [n for n in m.__all__ if not hasattr(m, n)]"
    assert usual().output(f"{code}; assert not missing, missing") == ""


def test_importing_does_not_need_matplotlib():
    code = "import sys; sys.modules.update(matplotlib=None); import sep_peft; print(sep_peft.__version__)"
    assert usual().output(code).strip() == sep_peft.__version__


def test_public_names_exist_and_are_documented():
    for name in sep_peft.__all__:
        thing = getattr(sep_peft, name)
        assert name == "__version__" or thing.__doc__, name
