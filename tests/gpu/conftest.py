"""Where the tests of GPUs run: on a CUDA device, or, to see that the tests themselves are right, on the CPU.

python -m pytest tests/gpu                              # on a GPU; elsewhere they are skipped
SEP_PEFT_GPU_TESTS_ON=cpu python -m pytest tests/gpu    # all but what CUDA alone has
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn


VARIABLE = "SEP_PEFT_GPU_TESTS_ON"
#: Seconds from the start after which no further test begins; unset: never.
LIMIT = "SEP_PEFT_GPU_TESTS_SECONDS"
NO_TIME = f"no time was left, by {LIMIT}"
#: A file that gets a JSON object a line for each test that has ended, so that a killed run leaves what it found.
RESULTS = "SEP_PEFT_GPU_TESTS_RESULTS"
BEGUN = time.monotonic()
#: Files whose tests come first: what is wrong there is wrong for everybody.
FIRST = ("test_gpu_parity", "test_gpu_waiting", "test_gpu_use", "test_gpu_kernels", "test_gpu_compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    own = [index for index, item in enumerate(items) if str(item.path).startswith(here)]
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    ordered = sorted((items[index] for index in own), key=lambda item: ranks.get(item.path.stem, len(ranks)))
    for index, item in zip(own, ordered, strict=True):
        items[index] = item


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGUN > float(os.environ.get(LIMIT, "inf")):
        pytest.skip(NO_TIME)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(RESULTS)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
    found = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of the tests."""
    wanted = os.environ.get(VARIABLE, "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"there is no CUDA device; {VARIABLE}=cpu runs what does not need one")
    return torch.device(wanted)


@pytest.fixture
def cuda(device) -> torch.device:
    """Of tests about what CUDA alone has."""
    if device.type != "cuda":
        pytest.skip("it is about CUDA itself")
    return device


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """fp32 is fp32: without TF32, whose 10 bits of mantissa no comparison with a CPU would pass."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def put(device) -> Callable:
    """Moves a module, a tensor, or a dictionary of tensors to the device."""

    def move(what):
        if isinstance(what, dict):
            return {key: move(value) for key, value in what.items()}
        return what.to(device) if isinstance(what, torch.Tensor | nn.Module) else what

    return move
