"""Two processes that hold the base model together train as one that has all of it; run by name, as it takes a while."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fresh import usual
from safetensors.torch import load_file
from sharded_in_processes import main
from small_classifier import make_classifier, raises

from sep_peft.training import shard_base


@pytest.mark.parametrize("drawn", [0, 1])
def test_two_processes_train_as_one(drawn, tmp_path):
    """With drawn classes each of them encodes as many texts as its own images have classes, which are not as many."""
    script = Path(__file__).with_name("sharded_in_processes.py")
    processes = usual().start_group(2, script, str(tmp_path), str(drawn))
    main(tmp_path, drawn)
    for process in processes:
        result = process.result()
        assert result.returncode == 0, result.stderr
    names = ("1-0", "2-0", "2-1")
    one, *two = ({**load_file(tmp_path / name / "adapter_model.safetensors")} for name in names)
    alone, *found = (json.loads((tmp_path / name / "found.json").read_text()) for name in names)
    for each, told in zip(two, found, strict=True):
        assert told["own"] <= 0.51 * alone["all"]
        assert each.keys() == one.keys()
        assert max((each[key] - one[key]).abs().max().item() for key in one) < 2e-5
        for row, expected in zip(told["rows"], alone["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


def test_one_process_shares_nothing_out():
    with raises(
        "shard_base shares a model out among processes, but there is one. Start several with accelerate launch, and "
        "make the Accelerator first.",
        RuntimeError,
    ):
        shard_base(make_classifier())
