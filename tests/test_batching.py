"""The loss and its gradients do not depend on how the images of a step are batched, by a real Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from batching import IMAGES, LABELS, WAYS, make_classifier, step
from fresh import usual


@pytest.fixture(scope="module")
def expected() -> dict:
    """Without Trainer, all images at once."""
    classifier = make_classifier().train()
    loss = classifier(IMAGES, LABELS).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in classifier.parameters() if p.requires_grad])
    with torch.no_grad():
        evaluated = F.cross_entropy(classifier.eval()(IMAGES).logits, LABELS)
    return {"loss": loss.item(), "gradients": gradients, "eval_loss": evaluated.item()}


@pytest.fixture(scope="module")
def sampled() -> dict:
    """Steps with a sample of the class texts, all images at once, in one process."""
    found = step(16, 1, "sampled")
    return found | {"gradients": torch.tensor(found["gradients"])}


def check(found: dict, expected: dict) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["norm"] == pytest.approx(expected["gradients"].norm().item(), rel=1e-4)
    torch.testing.assert_close(torch.tensor(found["gradients"]), expected["gradients"], rtol=1e-3, atol=1e-5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "accumulation"), [(16, 1), (8, 2), (4, 4), (2, 8), (7, 3), (5, 4)], ids=lambda n: str(n)
)
def test_micro_batches(batch_size, accumulation, expected):
    """The last ones with an uneven rest: 7, 7 and 2 images, and 5, 5, 5 and 1."""
    check(step(batch_size, accumulation), expected)


def test_micro_batches_with_a_sample_of_the_classes(sampled):
    check(step(5, 4, "sampled"), sampled)


SHARED_OUT = [(8, 1, "plain"), (2, 4, "plain"), *((8, 1, way) for way in WAYS if way != "plain")]


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory) -> list[dict]:
    """What the steps of `SHARED_OUT` find in two processes, which are launched once for all of them."""
    script, result = Path(__file__).with_name("batching.py"), tmp_path_factory.mktemp("launch") / "result.json"
    for process in usual().start_group(2, script, json.dumps(SHARED_OUT), result):
        assert process.wait() == 0, process.err.read_text()
    return json.loads(result.read_text())


@pytest.mark.parametrize("index", range(len(SHARED_OUT)), ids=lambda index: "-".join(map(str, SHARED_OUT[index])))
def test_two_processes(index, shared_out, expected, sampled):
    assert len(shared_out) == len(SHARED_OUT)
    found = shared_out[index]
    assert (found["processes"], found["batch_size"], found["accumulation"]) == (2, *SHARED_OUT[index][:2])
    assert found["wrapped"] == "DistributedDataParallel"
    check(found, sampled if SHARED_OUT[index][2] == "sampled" else expected)


def test_images_of_the_whole_step():
    """Shares of a step add up; `parts` stay means over the batch."""
    classifier = make_classifier()
    for training in (True, False):
        classifier.train(training)
        whole = classifier(IMAGES, LABELS).loss
        shares = [
            classifier(IMAGES[part], LABELS[part], num_items_in_batch=count).loss
            for part, count in ((slice(0, 3), 16), (slice(3, 16), torch.tensor([[16]])))
        ]
        assert all(share.shape == () for share in shares)
        torch.testing.assert_close(sum(shares), whole)
    output = classifier.train()(IMAGES[:3], LABELS[:3], num_items_in_batch=16)
    torch.testing.assert_close(output.parts.total, classifier(IMAGES[:3], LABELS[:3]).loss)
