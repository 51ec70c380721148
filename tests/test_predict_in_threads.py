"""Threads that predict with one classifier, in training mode too: every answer is one of evaluation."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from bundled import ASSETS, IMAGE_FILES
from peft import get_peft_model
from small_classifier import CLASSES, LABELS, SMALL, TEMPLATES
from small_clip import make_clip, make_images, make_texts, perturb
from transformers import AutoImageProcessor

from sep_peft import SEPClassifier, SEPConfig, TaskClasses
from sep_peft.tuner.modes import evaluating


NAMES = ("one", "two", "three", "four")
FILES = IMAGE_FILES[:2]
OTHERS = TaskClasses(make_texts([4, 6, 3], seed=7), (make_texts([8, 9, 7], seed=8),), ("five", "six", "seven"))


@pytest.fixture(scope="module")
def processor():
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return AutoImageProcessor.from_pretrained(ASSETS / "clip-small", **sizes)


@pytest.fixture(params=[0, 1], ids=["start 0", "start 1"])
def classifier(request, processor) -> SEPClassifier:
    """In training mode, with dropout in both towers and kept prototypes."""
    clip = make_clip()
    for module in clip.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5  # of attention
    torch.manual_seed(3)
    model = get_peft_model(clip, SEPConfig.published(**SMALL, start_layer=request.param))
    perturb(model)
    classes = TaskClasses(CLASSES, (TEMPLATES,), NAMES)
    classifier = SEPClassifier(model, classes, processor=processor)
    classifier.prototypes.data = torch.randn(4, 24, generator=torch.Generator().manual_seed(8))
    return classifier.keep_prototypes(1.5).train()


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Start all at once; the first error of any is raised."""
    barrier, errors = threading.Barrier(count), []

    def run(index: int) -> None:
        try:
            barrier.wait(timeout=60)
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


def expected_of(classifier: SEPClassifier, images=FILES) -> list:
    modes = {module: module.training for module in classifier.modules()}
    expected = classifier.eval().predict(images)
    for module, mode in modes.items():
        module.training = mode
    return expected


def test_dropout_would_be_seen(classifier):
    torch.manual_seed(0)
    images = make_images(3)
    with torch.no_grad():
        assert not torch.equal(classifier.image_embeds(images)[0], classifier.image_embeds(images)[0])


def test_hundreds_of_predictions_while_training(classifier):
    expected = expected_of(classifier)
    answers: list[list] = [[] for _ in range(8)]

    def work(index: int) -> None:
        for _ in range(25):
            answers[index].append(classifier.predict(FILES))

    in_threads(8, work)
    assert [answer == expected for thread in answers for answer in thread] == [True] * 200
    assert all(module.training for module in classifier.modules())


class Gate:
    """Holds the first thread that comes by until another one lets it go."""

    def __init__(self, module: torch.nn.Module):
        self.reached, self.open, self._lock, self._first = threading.Event(), threading.Event(), threading.Lock(), True
        self._hook = module.register_forward_pre_hook(self._wait)

    def _wait(self, *_) -> None:
        with self._lock:
            first, self._first = self._first, False
        if first:
            self.reached.set()
            assert self.open.wait(timeout=60)


def test_a_prediction_that_ends_leaves_the_mode_to_one_that_runs(classifier):
    expected = expected_of(classifier)
    gate, answers = Gate(classifier.vision_tower.base_layer), {}

    def work(index: int) -> None:
        if index == 0:
            answers[0] = classifier.predict(FILES)
            return
        assert gate.reached.wait(timeout=60)
        answers[1] = classifier.predict(FILES)
        assert not classifier.model.get_base_model().training
        gate.open.set()

    in_threads(2, work)
    assert answers == {0: expected, 1: expected}
    assert all(module.training for module in classifier.modules())


def test_a_task_that_is_loaded_leaves_the_mode_to_a_prediction_that_runs(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    expected = expected_of(classifier)
    gate, answers = Gate(classifier.vision_tower.base_layer), []

    def work(index: int) -> None:
        if index == 0:
            answers.append(classifier.predict(FILES))
            return
        assert gate.reached.wait(timeout=60)
        classifier.load_task(tmp_path, "task")
        gate.open.set()

    in_threads(2, work)
    assert answers == [expected]
    assert classifier.predict(FILES, task="task") == expected


def test_an_answer_belongs_to_one_list_of_classes(classifier):
    """Here the second batch of an answer is computed after other classes were set."""
    expected = expected_of(classifier)
    gate, answers = Gate(classifier.vision_tower.base_layer), []

    def work(index: int) -> None:
        if index == 0:
            answers.append(classifier.predict(FILES, batch_size=1))
            return
        assert gate.reached.wait(timeout=60)
        classifier.set_classes(OTHERS)
        gate.open.set()

    in_threads(2, work)
    for found, other in zip(answers[0], expected, strict=True):
        assert [top["label"] for top in found] == [top["label"] for top in other]
        assert [top["score"] for top in found] == pytest.approx([top["score"] for top in other], abs=1e-5)
    assert {top["label"] for top in classifier.predict(FILES[0])} == set(OTHERS.names)


def test_many_answers_while_classes_change(classifier):
    lists = [classifier.classes, OTHERS]
    expected = []
    for classes in lists:
        classifier.set_classes(classes)
        expected.append(expected_of(classifier))
    answers: list = []

    def work(index: int) -> None:
        for step in range(25):
            if index == 0:
                classifier.set_classes(lists[step % 2])
            else:
                answers.append(classifier.predict(FILES))

    in_threads(5, work)
    assert [answer in expected for answer in answers] == [True] * 100


def test_threads_fill_the_cache_together(classifier):
    """All of them are inside of the text tower before one goes on."""
    expected, count = expected_of(classifier), 4
    classifier.set_classes(classifier.classes)  # an encoder with an empty cache
    barrier, local = threading.Barrier(count), threading.local()

    def meet(*_) -> None:
        if not getattr(local, "met", False):
            local.met = True
            barrier.wait(timeout=60)

    layers = classifier.encoder.tower.base_layer.encoder.layers
    handle = layers[0].register_forward_pre_hook(meet)
    fresh, answers = classifier.encoder, []
    fresh._cache.clear()
    in_threads(count, lambda _: answers.append(classifier.predict(FILES)))
    handle.remove()
    assert answers == [expected] * count


def test_precision_belongs_to_the_thread(classifier):
    """Texts that one thread encodes under autocast are not what another one without it gets."""
    classifier.eval()
    expected = classifier.predict(FILES)
    classifier.set_classes(classifier.classes)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = classifier.predict(FILES)
    assert rounded != expected
    assert classifier.predict(FILES) == expected


def test_predicting_in_the_middle_of_training(classifier):
    """Neither the mode nor the state of the random numbers changes, so the run goes on as without it."""
    images, losses = make_images(5), []
    for predicts in (False, True):
        torch.manual_seed(0)
        classifier.set_classes(classifier.classes)
        loss = classifier(images, LABELS).loss
        if predicts:
            modes, state = [module.training for module in classifier.modules()], torch.get_rng_state()
            classifier.predict(FILES)
            assert [module.training for module in classifier.modules()] == modes
            assert torch.equal(torch.get_rng_state(), state)
        losses.append((loss.item(), classifier(images, LABELS).loss.item()))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]  # dropout


def test_mixed_modes_come_back(classifier):
    modules = list(classifier.model.modules())
    for index, module in enumerate(modules):
        module.training = index % 3 == 0
    classifier.predict(FILES)
    assert [module.training for module in modules] == [index % 3 == 0 for index in range(len(modules))]


def test_blocks_may_overlap_and_fail():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    outer, inner = evaluating(model), evaluating(model[1])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False, False]
    inner.__exit__(None, None, None)
    assert all(module.training for module in model.modules())
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert all(module.training for module in model.modules())
