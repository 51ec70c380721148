"""Several threads share a model: what one of them compiles, exports or disables changes nothing in the others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.tracing import is_traced


TEXTS = make_texts([5, 3, 4])
IMAGES = make_images(4)


def make_classifier(**config) -> SEPClassifier:
    model = get_peft_model(make_clip(), SEPConfig.published(num_text_prompts=3, num_vision_prompts=2, **config))
    perturb(model)
    return SEPClassifier(model, TEXTS)


@contextmanager
def running_until_left(work):
    """Another thread repeats `work` while the block runs; what it raises is raised here."""
    stop, started = threading.Event(), threading.Event()

    def repeat() -> int:
        count = 0
        while not stop.is_set():
            work(started)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(repeat)
        try:
            assert started.wait(120)
            yield
        finally:
            stop.set()
        assert future.result() > 0


def compile_something(started: threading.Event) -> None:
    """Compile a module that has nothing to do with SEP, and say so while it is being traced."""

    def backend(graph, inputs):
        started.set()
        threading.Event().wait(0.02)  # a compiler takes its time
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: torch.sin(x) + 1, backend=backend, fullgraph=True)(torch.ones(3))


def export_something(started: threading.Event) -> None:
    class Slow(torch.nn.Module):
        def forward(self, x):
            started.set()
            threading.Event().wait(0.02)
            return x + 1

    torch.export.export(Slow(), (torch.ones(3),), strict=False)


@pytest.mark.parametrize("work", [compile_something, export_something])
@pytest.mark.parametrize("config", [{}, {"start_layer": 1}], ids=str)
def test_what_another_thread_compiles_changes_no_result(work, config):
    """Images, texts, logits and the training loss alike.

    But for their last digits: transformers takes other kernels while any thread compiles.
    """
    classifier = make_classifier(**config)
    labels = torch.arange(len(IMAGES)) % 3

    @torch.no_grad()
    def results() -> dict[str, torch.Tensor]:
        classifier.eval()
        classifier.set_classes(classifier.classes)  # class texts are encoded anew
        found = {"logits": classifier(IMAGES).logits}
        found |= {"images": classifier.model.get_image_features(IMAGES).pooler_output}
        found |= {"texts": classifier.model.get_text_features(**TEXTS).pooler_output}
        classifier.train()
        return found | {"loss": classifier(IMAGES, labels).loss}

    expected = results()
    seen = 0
    with running_until_left(work):
        for _ in range(25):
            seen += torch.compiler.is_compiling()
            assert not is_traced()
            found = results()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
            with pytest.raises(ValueError, match="Labels must be between 0 and 2"):
                classifier(IMAGES, labels + 1)
    assert seen > 0, "the other thread never compiled while this one looked"


def test_a_thread_knows_that_it_is_traced():
    seen = []

    class Asks(torch.nn.Module):
        def forward(self, x):
            if is_traced():
                return x + 1
            seen.append("eager")
            return x + 2

    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(torch.ones(1)), torch.full((1,), 2.0))
    for strict in (False, True):
        program = torch.export.export(Asks(), (torch.ones(1),), strict=strict)
        assert torch.equal(program.module()(torch.ones(1)), torch.full((1,), 2.0))
    assert seen == []
    assert torch.equal(Asks()(torch.ones(1)), torch.full((1,), 3.0))
    assert seen == ["eager"]


@torch.no_grad()
def test_disabling_in_one_thread_leaves_adapters_that_others_ask_for_by_name():
    model = make_classifier().model.eval()
    expected = model.get_image_features(IMAGES, adapter_names=["default"] * 4).pooler_output
    with model.disable_adapter():
        base = model.get_image_features(IMAGES).pooler_output
    assert not torch.allclose(base, expected, atol=1e-3)

    def disable(started: threading.Event) -> None:
        with model.disable_adapter():
            started.set()
            assert torch.equal(model.get_image_features(IMAGES).pooler_output, base)
            assert torch.equal(model.get_image_features(IMAGES, adapter_names=["default"] * 4).pooler_output, base)

    disabled = 0
    with running_until_left(disable):
        for _ in range(80):
            disabled += model.base_model.towers["vision"].disable_adapters
            found = model.get_image_features(IMAGES, adapter_names=["default"] * 4).pooler_output
            assert torch.equal(found, expected)
    assert disabled > 0, "the other thread never disabled the adapter while this one looked"
