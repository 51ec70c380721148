"""README says what is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import support_matrix

from sep_peft import SEPConfig


README = (Path(__file__).parents[1] / "README.md").read_text()


def test_support_matrix_is_that_of_the_rows():
    assert support_matrix.replace_in(README) == README, "run python tests/support_matrix.py"


def test_every_option_is_listed_with_its_default():
    table = README.split("| `SEPConfig(...)` | default | |")[1].split("\n\n")[0]
    own = {field.name: field.default for field in fields(SEPConfig)}
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
