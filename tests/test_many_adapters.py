"""Many adapters in one model: switching and loading take shortcuts to parameters and towers; they must miss none."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_classifier import make_classifier
from small_clip import make_clip
from torch import nn

from sep_peft import SEPConfig
from sep_peft.tuner.current import walked_adapter
from sep_peft.tuner.layer_fusions import LayerFusions
from sep_peft.tuner.model import find_towers, named_towers
from sep_peft.tuner.tower import SEPTower


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(make_clip(), SEPConfig(num_vision_prompts=4), adapter_name="one")
    model.add_adapter("two", SEPConfig.compact())
    model.add_adapter("three", SEPConfig.published(num_text_prompts=0))
    return model


def identities(parameters) -> list[int]:
    return [id(parameter) for parameter in parameters]


def all_fusions(model) -> list[LayerFusions]:
    return [module for module in model.modules() if isinstance(module, LayerFusions)]


def assert_complete(model) -> None:
    fusions = all_fusions(model)
    assert len(fusions) == 5
    for each in fusions:
        assert identities(each.parameters()) == identities(nn.Module.parameters(each))
        assert len(list(each.parameters())) >= 17 and not list(each.parameters(recurse=False))


def test_remembered_parameters_are_all_of_them(model):
    assert_complete(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_remembers_its_own(model, clone):
    other = clone(model)
    assert_complete(other)
    assert not set(identities(model.parameters())) & set(identities(other.parameters()))
    assert_complete(model)


def test_replaced_parameters_are_found(model):
    before = list(model.parameters())  # kept alive, so that nothing new can have their addresses
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert not set(identities(before)) & set(identities(model.parameters()))
    assert_complete(model)
    model.double()
    assert {p.dtype for fusions in all_fusions(model) for p in fusions.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_one_adapter_trains_whatever_trained_before(model, name):
    for parameter in model.parameters():  # by hand, after PEFT's back
        parameter.requires_grad_(True)
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        assert ".sep_" not in key or parameter.requires_grad == (f".{name}" in key), key
    model.set_adapter(name, inference_mode=True)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".sep_" in key)


def test_a_further_adapter_leaves_everything_as_it_is():
    clip = make_clip()
    model = get_peft_model(clip, SEPConfig(num_vision_prompts=4), adapter_name="one")
    assert all(parameter.requires_grad == (".sep_" in key) for key, parameter in model.named_parameters())
    clip.logit_scale.requires_grad_(True)
    model.set_requires_grad("one", False)
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.add_adapter("two", SEPConfig(num_vision_prompts=4, modules_to_save=["text_projection"]))
    after = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    moved = {key: key.replace("text_projection.", "text_projection.original_module.") for key in before}
    assert {key: after.pop(moved[key]) for key in before} == before
    assert len(after) == sum(".one" in key for key in before) + 1  # the copy of the projection
    assert all(".two" in key for key in after) and not any(after.values())


def test_towers_are_found_under_their_paths(model):
    expected = {path: module for path, module in model.named_modules() if isinstance(module, SEPTower)}
    assert dict(named_towers(model)) == expected and len(expected) == 2
    assert list(find_towers(model)) == ["text", "vision"]
    tower = find_towers(model)["vision"]
    assert dict(named_towers(tower, "somewhere")) == {"somewhere": tower}


def visits(action: Callable[[], object]) -> int:
    """Calls of Python functions; a walk that yields modules or parameters counts one for each.

    Garbage of earlier tests is collected before, not meanwhile: its finalizers are Python functions, too.
    """
    count = 0

    def profile(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    gc.collect()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a classifier of the tiny CLIP."""
    folder = tmp_path_factory.mktemp("saved")
    make_classifier().save_pretrained(folder)
    return folder


ACTIONS = {
    "add": lambda classifier, folder: classifier.model.add_adapter("new", SEPConfig.published()),
    "load a task": lambda classifier, folder: classifier.load_task(folder, "new"),
    "delete": lambda classifier, folder: classifier.model.delete_adapter("other_0"),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_adapters_that_are_there_are_not_walked_through(action, saved):
    counts = []
    for others in (2, 2, 10):  # what happens only once, as imports, happens in the first
        classifier = make_classifier()
        for index in range(others):
            classifier.model.add_adapter(f"other_{index}", SEPConfig.published())
        counts.append(visits(partial(ACTIONS[action], classifier, saved)))
    added = [tower.sep_fusion["default"] for tower in find_towers(classifier.model).values()]
    look = visits(lambda: [list(module.named_modules()) for module in added])
    assert look > 100
    assert (counts[2] - counts[1]) / 8 < look  # not even one look at each of them


def test_a_walk_meets_one_adapter_and_a_look_up_all(model):
    def met(root: nn.Module) -> set[str]:
        names = {key.split(".sep_fusion.")[1].split(".")[0] for key, _ in root.named_parameters() if "fusion" in key}
        assert names == {key.split(".sep_fusion.")[1].split(".")[0] for key in root.state_dict() if "fusion" in key}
        return names

    assert met(model) == {"one", "two", "three"}
    fusions = find_towers(model)["vision"].sep_fusion
    with walked_adapter.set("two"):
        assert met(model) == {"two"}
        assert list(fusions) == ["one", "two", "three"] and "one" in fusions and len(fusions["one"]) == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(met, model).result() == {"one", "two", "three"}
    with walked_adapter.set("four"):
        assert met(model) == set()
    assert met(model) == {"one", "two", "three"}
