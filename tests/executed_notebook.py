"""The notebook, executed. It trains, so the usual tests leave it out; `.ci/run` calls it by name.

python -m pytest tests/executed_notebook.py
"""

from __future__ import annotations

import base64
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from bundled import ASSETS
from PIL import Image
from transformers import CLIPModel

from sep_peft import SEPClassifier


NOTEBOOK = ASSETS.parent / "your_pictures.ipynb"
FOLDER = 'folder = "assets/caltech101"'


def execute(folder: Path, images: str = FOLDER):
    """The notebook with its outputs, run in a folder that has the assets; `images` takes the place of one line."""
    nbformat = pytest.importorskip("nbformat", reason="notebooks need the package nbformat, which nbclient brings")
    nbclient = pytest.importorskip("nbclient", reason="executing a notebook needs the package nbclient")
    pytest.importorskip("ipykernel", reason="executing a notebook needs the package ipykernel")
    (folder / "assets").symlink_to(ASSETS)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert sum(cell.source.count(FOLDER) for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(FOLDER, images)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def saved(folder: Path) -> SEPClassifier:
    """What the notebook saved; it names its base model by a path below the folder that it ran in."""
    return SEPClassifier.from_pretrained(folder / "my-task", model=CLIPModel.from_pretrained(ASSETS / "clip-small"))


def drawings(notebook) -> list[Image.Image]:
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [Image.open(BytesIO(base64.b64decode(data["image/png"]))) for data in outputs if "image/png" in data]


def bars(notebook, source: str) -> list[tuple[float, float]]:
    """How far each bar of a cell has come, and how far it goes, in the order in which they are seen."""
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    (cell,) = (cell for cell in notebook.cells if cell.source == source)
    found = []
    for output in cell.outputs:
        view = output.get("data", {}).get("application/vnd.jupyter.widget-view+json")
        for child in [] if view is None else widgets[view["model_id"]]["state"]["children"]:
            widget = widgets[child.removeprefix("IPY_MODEL_")]
            if widget["model_name"] == "FloatProgressModel":
                found.append((widget["state"]["value"], widget["state"]["max"]))
    return found


def text(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def notebook(folder):
    return execute(folder)


def test_as_it_is(notebook, folder):
    assert len(drawings(notebook)) == 4  # confusion, wrong, reliability, explanation
    assert all(min(drawing.size) > 200 for drawing in drawings(notebook))
    said = text(notebook)
    assert "20 classes, 80 images to train on, 374 to test on" in said
    accuracy = {line.split()[0]: float(line.split()[1]) for line in said.splitlines() if " %  (" in line}
    assert accuracy["trained"] > accuracy["zero-shot"]
    assert said.count("SEPClassifier(\n  classes: 20 ('barrel', 'beaver', 'butterfly', ...)") == 2
    assert len(saved(folder).class_names) == 20
    assert "<title>my-task</title>" in (folder / "report.html").read_text()


def test_its_progress_is_a_bar_of_notebooks(notebook):
    """Over 8 epochs of three steps, and over the four parts of calibrating; a line an epoch stands beside it."""
    pytest.importorskip("ipywidgets", reason="bars of notebooks need the package ipywidgets")
    assert bars(notebook, "history = fit(classifier, images.train)") == [(24, 24), (4, 4)]
    lines = [line for line in text(notebook).splitlines() if line.startswith("epoch ")]
    assert [line.split(" loss ")[0] for line in lines] == [f"epoch {epoch}/8" for epoch in range(1, 9)]


def test_a_folder_of_ones_own(tmp_path):
    """Two classes of three images, all of which train; one line of the notebook is another."""
    for name in ("pizza", "lamp"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for path in sorted((ASSETS / "caltech101" / "test" / name).iterdir())[:3]:
            shutil.copy(path, tmp_path / "mine" / name)
    said = text(execute(tmp_path, 'folder = "mine"'))
    assert "2 classes, 6 images to train on, 0 to test on\nEvery image trains" in said
    assert saved(tmp_path).class_names == ["lamp", "pizza"]
    assert not (tmp_path / "report.html").exists()  # there is nothing to report on
