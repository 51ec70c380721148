"""Exporting leaves the model as it was, be it that the export works or fails: everything that worked works after it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from bundled import ASSETS, IMAGE_FILES
from peft import get_peft_model
from small_classifier import CLASSES, IMAGES, LABELS, SMALL, TEMPLATES
from small_clip import make_clip, perturb
from transformers import AutoImageProcessor

from sep_peft import ImageEmbedder, ImageScorer, SEPClassifier, SEPConfig, TaskClasses, hotswap_adapter


NAMES = ("one", "two", "three", "four")


class ForwardFailed(Exception):
    """What a model raises whose forward does not work."""


def make_classifier(**options) -> SEPClassifier:
    """With two adapters, the first one active, and kept prototypes."""
    config = SEPConfig.published(**SMALL, **options)
    torch.manual_seed(3)
    model = get_peft_model(make_clip(text_layers=2, vision_layers=2), config)
    model.add_adapter("other", config)
    perturb(model)
    perturb(model, "other", seed=9)
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = AutoImageProcessor.from_pretrained(ASSETS / "clip-small", **sizes)
    classifier = SEPClassifier(model, TaskClasses(CLASSES, (TEMPLATES,), NAMES), processor=processor)
    classifier.prototypes.data = torch.randn(4, 24, generator=torch.Generator().manual_seed(8))
    return classifier.keep_prototypes(1.5).eval()


def export(module: torch.nn.Module, strict: bool = False):
    """For as many images as `IMAGES` are: a batch of any size, which `test_export` checks, takes twice as long."""
    with torch.no_grad():
        return torch.export.export(module.eval(), (IMAGES,), strict=strict)


def works(module: torch.nn.Module) -> None:
    program = export(module).module()
    with torch.no_grad():
        torch.testing.assert_close(program(IMAGES), module(IMAGES), rtol=1e-5, atol=1e-6)


def fails(place: str):
    """An export in which the forward of one module raises: deep in the tower, or after all of it has run."""

    def run(module: torch.nn.Module) -> None:
        def broken(*_):
            raise ForwardFailed

        layers = module.model.get_base_model().vision_model.base_layer.encoder.layers
        target = {"layer": layers[-1].base_layer.mlp, "end": module}[place]
        hook = target.register_forward_hook(broken)
        with pytest.raises(ForwardFailed):
            export(module)
        hook.remove()

    run.__name__ = f"fails in the {place}"
    return run


PLAIN, SHARED, LATE = {}, {"share_fusion": True}, {"start_layer": 1, "fusion_rank": 2}
#: How it is exported, what, and the options of the adapters.
CASES = [
    (run, kind, options)
    for run in (works, fails("layer"))
    for kind in (ImageScorer, ImageEmbedder)
    for options in (PLAIN, SHARED)
]
CASES += [(works, ImageScorer, LATE), (fails("end"), ImageScorer, PLAIN)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1].__name__}-{case[2]}")
def untouched(request) -> tuple[SEPClassifier, SEPClassifier]:
    """One after an export, and one like it that nobody exported; tests must not change them."""
    run, kind, options = request.param
    exported, expected = make_classifier(**options), make_classifier(**options)
    exported.predict(IMAGE_FILES)  # fills what is cached
    run(kind(exported) if kind is ImageScorer else kind(exported.model))
    return exported, expected


@pytest.fixture
def classifiers(untouched) -> tuple[SEPClassifier, SEPClassifier]:
    """The same to be changed: a copy holds all that the original does, what an export left behind as well."""
    exported, expected = untouched
    return copy.deepcopy(exported), copy.deepcopy(expected)


def names_with_gradients(classifier: SEPClassifier) -> set[str]:
    return {name for name, p in classifier.model.named_parameters() if p.requires_grad}


def adapter_names(classifier: SEPClassifier, adapter: str) -> set[str]:
    return {name for name, _ in classifier.model.named_parameters() if ".sep_" in name and f".{adapter}" in name}


def assert_same(found: SEPClassifier, expected: SEPClassifier) -> None:
    """Predictions and everything else bit for bit."""
    assert found.predict(IMAGE_FILES) == expected.predict(IMAGE_FILES)
    with torch.no_grad():
        assert torch.equal(found.eval()(IMAGES).logits, expected.eval()(IMAGES).logits)


def test_nothing_has_changed(untouched, classifiers, tmp_path):
    exported, expected = untouched
    assert_same(exported, expected)
    named = [(name, type(module), module.training) for name, module in exported.named_modules()]
    assert named == [(name, type(module), module.training) for name, module in expected.named_modules()]
    for (name, found), like in zip(exported.named_parameters(), expected.parameters(), strict=True):
        assert type(found) is torch.nn.Parameter and torch.equal(found, like), name
        assert found.requires_grad == like.requires_grad, name
    for (name, found), like in zip(exported.named_buffers(), expected.buffers(), strict=True):
        assert type(found) is torch.Tensor and torch.equal(found, like), name

    exported.save_pretrained(tmp_path)
    base = make_clip(text_layers=2, vision_layers=2)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=base, processor=exported.processor)
    assert_same(loaded, expected)

    copied, other = classifiers
    assert_same(copied, expected)
    copied.load_task(tmp_path, "task")
    assert copied.predict(IMAGE_FILES, task="task") == expected.predict(IMAGE_FILES)
    classes = TaskClasses(TEMPLATES, (CLASSES,), NAMES[::-1])  # whose texts are encoded anew
    assert_same(copied.set_classes(classes), other.set_classes(classes))
    copied.model.set_adapter("other")
    assert names_with_gradients(copied) == adapter_names(copied, "other")
    assert_same(exported, expected)


def test_adapters_are_switched_summed_and_replaced(classifiers, tmp_path):
    for classifier in classifiers:
        classifier.model.set_adapter("other")
    exported, expected = classifiers
    assert names_with_gradients(exported) == adapter_names(exported, "other") != set()
    assert_same(exported, expected)
    expected.save_pretrained(tmp_path)

    for classifier in classifiers:
        classifier.model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "sum")
        classifier.model.set_adapter("sum")
    parameters = dict(exported.model.named_parameters())
    for name in adapter_names(exported, "sum"):
        sources = [parameters[name.replace(".sum", f".{adapter}")] for adapter in ("default", "other")]
        torch.testing.assert_close(parameters[name], 0.25 * sources[0] + 0.75 * sources[1])
    assert_same(exported, expected)

    for classifier in classifiers:
        classifier.model.set_adapter("default")
    assert names_with_gradients(exported) == adapter_names(exported, "default")
    assert_same(exported, expected)
    hotswap_adapter(exported.model, tmp_path, "default")
    expected.model.set_adapter("other")
    assert_same(exported, expected)


def step(classifier: SEPClassifier) -> float:
    """One step of training; the loss."""
    parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    loss = classifier.train()(IMAGES, LABELS).loss
    loss.backward()
    assert {name for name, p in classifier.named_parameters() if p.grad is not None} == set(parameters)
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    for name, parameter in parameters.items():
        # a softmax does not change when all keys move alike, so the gradient of their bias is 0 in theory
        if "attention.key." not in name.removesuffix("weight"):
            assert not torch.equal(parameter, before[name]), name
    return loss.item()


def test_a_step_of_training(classifiers):
    exported, expected = classifiers
    assert step(exported) == step(expected)
    assert set(adapter_names(exported, "default")) == names_with_gradients(exported)
    assert_same(exported, expected)


def test_nothing_computed_in_an_export_is_cached():
    """Here a module encodes the class texts inside of the export, before anybody else has."""

    class Texts(torch.nn.Module):
        def __init__(self, classifier: SEPClassifier):
            super().__init__()
            self.classifier = classifier

        def forward(self, scale: torch.Tensor) -> torch.Tensor:
            return scale * self.classifier.encoder.weights(training=False).text_embeds

    for options in (PLAIN, SHARED, LATE):
        classifier, expected = make_classifier(**options), make_classifier(**options)
        classifier.set_classes(classifier.classes)
        expected.set_classes(expected.classes)
        classifier.prototypes = None
        with torch.no_grad():
            program = torch.export.export(Texts(classifier).eval(), (torch.ones(1),), strict=False).module()
            assert_same(classifier, expected)
            found = classifier.encoder.weights(training=False).text_embeds
            torch.testing.assert_close(program(torch.ones(1)), found)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_a_strict_export():
    """By dynamo, which traces the code instead of running it."""
    exported, expected = make_classifier(), make_classifier()
    export(ImageScorer(exported), strict=True)
    assert_same(exported, expected)
    for classifier in (exported, expected):
        classifier.model.set_adapter("other")
    assert names_with_gradients(exported) == adapter_names(exported, "other")
    assert_same(exported, expected)


def test_files_of_programs_are_written(tmp_path: Path):
    """What was exported is whole: saved and loaded it computes the same."""
    scorer = ImageScorer(make_classifier()).eval()
    torch.export.save(export(scorer), tmp_path / "scorer.pt2")
    with torch.no_grad():
        found = torch.export.load(tmp_path / "scorer.pt2").module()(IMAGES)
        torch.testing.assert_close(found, scorer(IMAGES), rtol=1e-5, atol=1e-6)
