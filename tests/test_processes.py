"""Processes that evaluate one classifier by DistributedDataParallel, which sends buffers of the first to all."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty

import pytest
import torch
from small_classifier import CLASSES, IMAGES, OTHER_TEMPLATES, TEMPLATES, with_prototypes
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from sep_peft import SEPClassifier, TaskClasses


COUNT = 2


def work(rank: int, store: str, results, change: Callable[[SEPClassifier, int], None]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=COUNT, timeout=timedelta(seconds=20)
    )
    classifier = with_prototypes(None).eval()
    model = DistributedDataParallel(classifier)
    # buffers are sent before the first forward, and before the one after a forward with gradients
    found = [model(IMAGES).logits.tolist()]
    change(classifier, rank)
    with torch.no_grad():
        try:
            found.append(model(IMAGES).logits.tolist())
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    results.put((rank, found))
    results.close()
    results.join_thread()
    # the group is left as it is: where one process has failed the other could not take leave of it


def run(folder: Path, change: Callable[[SEPClassifier, int], None]) -> list[list]:
    """For each process what it found before and after the change."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(rank, str(folder / "store"), results, change) for rank in range(COUNT)]
    processes = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=60) for _ in processes)
    except Empty:
        pytest.fail("The processes wait for each other.")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(COUNT)]


def keep(classifier: SEPClassifier, rank: int) -> None:
    classifier.keep_prototypes(1.5)


def set_classes(classifier: SEPClassifier, rank: int) -> None:
    """Three in the place of four, so that there are other chunks of texts."""
    three = {key: value[:3] for key, value in CLASSES.items()}
    classifier.set_classes(TaskClasses(three, (), ("a", "b", "c")))


def add_task(classifier: SEPClassifier, rank: int) -> None:
    classifier.add_task("other", TaskClasses(TEMPLATES, (OTHER_TEMPLATES,)), adapter="default")


def of_rank(only: int, change: Callable) -> Callable:
    return lambda classifier, rank: change(classifier, rank) if rank == only else None


@pytest.mark.parametrize("change", [keep, set_classes], ids=lambda change: change.__name__)
def test_all_processes_change(change, tmp_path):
    classifier = with_prototypes(None).eval()
    with torch.no_grad():
        before = classifier(IMAGES).logits
        change(classifier, 0)
        after = classifier(IMAGES).logits
    for found in run(tmp_path, change):
        for logits, expected in zip(found, (before, after), strict=True):
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [keep, set_classes], ids=lambda change: change.__name__)
@pytest.mark.parametrize("rank", range(COUNT), ids=["the first", "another"])
def test_one_process_alone_changes(change, rank, tmp_path):
    """It does not wait for ever, and no process that has other classes than the first goes on with them."""
    first, other = run(tmp_path, of_rank(rank, change))
    assert isinstance(first[1], list)
    assert other[1] == (
        "ValueError: This process has other classes, prototypes or templates than the first one. Call set_classes, "
        "keep_prototypes and finish_training in every process, or evaluate in one process alone, without "
        "DistributedDataParallel."
    )


def test_a_task_of_one_process(tmp_path):
    """It is not what the processes evaluate together."""
    for before, after in run(tmp_path, of_rank(0, add_task)):
        assert after == before
