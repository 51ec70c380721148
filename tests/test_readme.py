"""README and docs say what is so: examples run, tables are those of the code, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import rooms
import support_matrix
import typer
from bundled import ASSETS, save_shallow_clip
from fresh import Parent
from hub_server import File, HubServer, Repo

from sep_peft import SEPConfig
from sep_peft.cli.app import app
from sep_peft.method.recipe import Recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES = {"README.md": README, **DOCS}
HOME = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
CLIP = "openai/clip-vit-base-patch16"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def lines(text: str) -> list[str]:
    """Commands of bash blocks, joined where they go on in the next line."""
    commands = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line for line in commands.splitlines() if line.startswith("sep-peft ")]


# examples


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub whose CLIP is the small one, with few of its layers, since the time of an export grows with them."""
    small = save_shallow_clip(tmp_path_factory.mktemp("hub") / "clip", layers=2)
    with HubServer({"hf_docs": "me"}) as server:
        clip = server.repos[CLIP] = Repo()
        contents = {path.name: File(path.read_bytes(), False) for path in small.iterdir()}
        clip.commit("main", contents, "small")
        yield server


@pytest.fixture(scope="module")
def run_blocks(hub, tmp_path_factory):
    """Runs blocks one after the other in one process; the traceback of a failure shows its line."""
    parent = Parent(
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path_factory.mktemp("home")),
        HF_TOKEN="hf_docs",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0",
    )

    def run(folder: Path, code: list[str]) -> None:
        result = parent.run("\n".join(code), folder=folder)
        assert result.returncode == 0, result.stderr

    yield run
    parent.close()


@pytest.fixture(scope="module")
def start(hub, run_blocks, tmp_path_factory):
    """A folder as the examples find it: images, and what README's example saved, which is on the Hub as well."""
    folder = tmp_path_factory.mktemp("docs")
    images = ASSETS / "caltech101" / "test"
    for name, source in {"a": "butterfly", "b": "crayfish", "cat": "leopard"}.items():
        shutil.copy(sorted((images / source).iterdir())[0], folder / f"{name}.jpg")
    for name in ("sunflower", "cup"):
        (folder / "my_images" / name).mkdir(parents=True)
        for path in sorted((images / name).iterdir())[:4]:
            shutil.copy(path, folder / "my_images" / name)
    run_blocks(folder, blocks(README, "python"))
    saved = {path.name: File(path.read_bytes(), False) for path in (folder / "my-task").iterdir()}
    hub.repos["me/clothing"] = Repo()
    hub.repos["me/clothing"].commit("main", saved, "adapter")
    return folder


def test_readme_runs_as_printed(start):
    assert {"adapter_model.safetensors", "sep_classes.json", "README.md"} <= {
        path.name for path in (start / "my-task").iterdir()
    }


@pytest.mark.parametrize("page", [page for page, text in DOCS.items() if blocks(text, "python")])
def test_docs_run_as_printed(page, run_blocks, start, tmp_path):
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    run_blocks(tmp_path, blocks(DOCS[page], "python"))


COMMANDS = [line for text in PAGES.values() for line in lines(text)]


@pytest.mark.parametrize("line", COMMANDS)
def test_arguments_of_commands_are_understood(line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    subcommand = typer.main.get_command(app).commands[command]
    subcommand.make_context(command, arguments)


# tables and marks


def test_support_matrix_is_that_of_the_specs():
    text = support_matrix.DOC.read_text()
    assert support_matrix.replace_in(text) == text, "run python tests/support_matrix.py"


def test_rooms_are_those_of_the_package():
    text = rooms.DOC.read_text()
    assert rooms.replace_in(text) == text, "run python tests/rooms.py"


@pytest.mark.parametrize("cls", [SEPConfig, Recipe])
def test_every_option_is_listed_with_its_default(cls):
    table = DOCS["docs/options.md"].split(f"| `{cls.__name__}(...)` | default | |")[1].split("\n\n")[0]
    own = {field.name: field.default for field in fields(cls)}
    listed = {}
    for line in table.splitlines()[2:]:
        names, default = (cell.strip() for cell in line.strip("|").split("|")[:2])
        names = re.findall(r"`(\w+)`", names)
        defaults = [part.strip().strip("`") for part in default.split(",")]
        listed |= dict(zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=True))
    shown = {name: str(own[name]) if not isinstance(own[name], str) else f'"{own[name]}"' for name in listed}
    assert listed == shown
    inherited = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    assert set(own) - inherited - {"inference_mode", "base_architecture"} == set(listed)


def test_marked_commands_are_there():
    assert re.findall(r"^<!-- fresh: ([a-z-]+) -->\n```bash\n", README, re.MULTILINE) == ["quickstart", "test"]


def test_readme_is_short():
    assert len(README.encode()) < 11_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """README's are whole, so that they work on a package index; those of docs are relative."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.split("#")[0]
        if path.startswith(f"{HOME}/blob/main/"):
            assert (ROOT / path.removeprefix(f"{HOME}/blob/main/")).exists(), link
        elif not path.startswith("https://"):
            assert page != "README.md" and (ROOT / page).parent.joinpath(path).exists(), link


def test_the_citation_says_where_the_project_lives():
    assert f"repository-code: {HOME}\n" in (ROOT / "CITATION.cff").read_text()
