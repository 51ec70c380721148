"""The notebook as it is in the repository: a page to read, without outputs or traces of who ran it.

`executed_notebook.py` runs it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bundled import ASSETS


NOTEBOOK = ASSETS.parent / "your_pictures.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in CELLS}
CODE = [cell["id"] for cell in CELLS if cell["cell_type"] == "code"]


def test_no_outputs_and_no_traces():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert len(SOURCES) == len(CELLS)


def test_the_first_cell_says_how_to_install():
    assert CELLS[0]["cell_type"] == "markdown"
    extras = set(re.findall(r"\[(\w+)\](?=\"| @)", SOURCES[CELLS[0]["id"]]))
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert extras == {"notebook"} and re.search(r"^notebook = \[.*nbclient.*\]$", project, re.MULTILINE)


@pytest.mark.parametrize("cell", CODE)
def test_code_is_code(cell):
    compile(SOURCES[cell].replace("%matplotlib inline", ""), cell, "exec")


def test_pushing_is_shown_and_not_run():
    assert not any("push_to_hub" in SOURCES[cell] for cell in CODE)
    assert any("push_to_hub" in text for text in SOURCES.values())
