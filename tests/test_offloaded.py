"""Base models whose weights accelerate keeps elsewhere, or that have none: SEP works as in memory, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from families import CASES
from family_models import PROMPTS
from peft import PeftModel, get_peft_model
from small_classifier import CLASSES, IMAGES, LABELS, TEMPLATES, make_model, raises
from small_clip import make_clip, perturb
from small_sep import outputs, snapshot
from transformers import CLIPModel

from sep_peft import SEPClassifier, SEPConfig, TrunkCache
from sep_peft.tuner.offload import compute_device


#: Half of the model on disk; accelerate leaves what is on the CPU where it is when that is where it computes.
DEVICE_MAP = {
    "text_model": "disk",
    "vision_model.embeddings": "disk",
    "vision_model.pre_layrnorm": "cpu",
    "vision_model.encoder": "disk",
    "vision_model.post_layernorm": "cpu",
    "visual_projection": "cpu",
    "text_projection": "disk",
    "logit_scale": "disk",
}
WAYS = {
    "cpu": lambda model, folder: cpu_offload(model),
    "disk": lambda model, folder: disk_offload(model, str(folder)),
    "device map": lambda model, folder: dispatch_model(model, DEVICE_MAP, offload_dir=str(folder)),
}


@pytest.fixture(params=WAYS)
def offloaded(request, tmp_path) -> CLIPModel:
    """The tiny CLIP, offloaded before anything else is done to it."""
    return WAYS[request.param](make_clip(), tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    SEPClassifier(make_model(), CLASSES, TEMPLATES).save_pretrained(folder)
    return folder


def gradients(model) -> dict[str, torch.Tensor]:
    classifier = SEPClassifier(model, CLASSES, TEMPLATES).train()
    classifier(IMAGES, LABELS).loss.backward()
    return {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}


def test_new_adapters_compute_and_train_as_in_memory(offloaded):
    model, in_memory = make_model(clip=offloaded), make_model()
    assert any(parameter.is_meta for parameter in model.parameters()) and compute_device(model).type == "cpu"
    assert torch.equal(outputs(model), outputs(in_memory))
    found, expected = gradients(model), gradients(in_memory)
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_classifiers_predict_as_in_memory(offloaded, saved):
    expected = SEPClassifier.from_pretrained(saved, model=make_clip())(IMAGES).logits
    classifier = SEPClassifier.from_pretrained(saved, model=offloaded)
    assert classifier.device.type == "cpu"
    assert torch.equal(classifier(IMAGES).logits, expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_are_loaded_and_taken_out_as_in_memory(offloaded, saved, low_cpu_mem_usage):
    model = PeftModel.from_pretrained(offloaded, saved, "first", low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(saved, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    expected = outputs(make_model())
    for name in ("first", "second"):
        model.set_adapter(name)
        assert torch.equal(outputs(model), expected)
    remove_hook_from_submodules(model.get_base_model())
    assert torch.equal(outputs(model), expected)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model.unload()), outputs(make_clip()))


@pytest.mark.parametrize("name", ["clip text", "clip vision", "videoprism", "bert and vit", "align text alone"])
@torch.no_grad()
def test_towers_whose_weights_are_read_by_others(name):
    """A model that is a tower itself keeps accelerate's hook, and single weights are read where nobody loads them."""
    case = CASES[name]

    def adapt(base):
        torch.manual_seed(0)
        model = get_peft_model(base, SEPConfig(**(PROMPTS | case.options)))
        perturb(model)
        return model.eval()

    def run(model):
        return [value for value in model(**case.inputs()).values() if isinstance(value, torch.Tensor)]

    plain, expected = run(case.build().requires_grad_(False)), run(adapt(case.build()))
    model = adapt(cpu_offload(case.build()))
    for found, wanted in [(run(model), expected), (run(model.unload()), plain)]:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_trunks_are_cached_as_in_memory(offloaded):
    samples = [{"pixel_values": pixels, "labels": label} for pixels, label in zip(IMAGES, LABELS, strict=True)]
    found, expected = (TrunkCache(make_model(clip=clip, start_layer=1), samples) for clip in (offloaded, make_clip()))
    assert all(torch.equal(found[0][key], expected[0][key]) for key in ("trunk", "frozen_embeds"))


# what cannot work


def test_a_tower_in_one_piece_is_refused():
    clip = cpu_offload(make_clip(), preload_module_classes=["CLIPEncoderLayer"])
    before = snapshot(clip)
    with raises(
        "accelerate offloads text_model.encoder.layers.2 in one piece, but SEP wraps modules inside of it, whose "
        "weights would not be found. Leave CLIPEncoderLayer out of preload_module_classes."
    ):
        get_peft_model(clip, SEPConfig(num_vision_prompts=4))
    assert snapshot(clip) == before


def test_pieces_inside_which_nothing_is_wrapped_work():
    clip = cpu_offload(make_clip(), preload_module_classes=["CLIPMLP"])
    assert torch.equal(outputs(make_model(clip=clip)), outputs(make_model()))


def test_copies_of_offloaded_modules_are_refused(offloaded):
    with raises(
        "modules_to_save must name modules whose weights are in memory, but accelerate offloads text_projection, so "
        "that a copy of it would never be trained nor loaded. Load the model without offloading."
    ):
        get_peft_model(offloaded, SEPConfig(num_vision_prompts=4, modules_to_save=["text_projection"]))


# no weights at all


def empty_clip(way: str) -> CLIPModel:
    config = make_clip().config
    with init_empty_weights() if way == "init_empty_weights" else torch.device("meta"):
        return CLIPModel(config)


@pytest.mark.parametrize("way", ["init_empty_weights", "torch.device"])
def test_sizes_are_planned_without_memory(way, capsys):
    model = get_peft_model(empty_clip(way), SEPConfig(num_vision_prompts=4))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.print_trainable_parameters()
    get_peft_model(make_clip(), SEPConfig(num_vision_prompts=4)).print_trainable_parameters()
    on_meta, in_memory = capsys.readouterr().out.splitlines()
    assert on_meta == in_memory and on_meta.startswith("trainable params: ")


def test_an_adapter_lies_where_its_tower_does():
    """Whatever default device is set, and also where one tower has weights and the other has none."""
    clip = make_clip()
    with torch.device("meta"):
        model = get_peft_model(clip, SEPConfig(num_vision_prompts=4))
    assert not any(parameter.is_meta for parameter in model.parameters())
    clip = make_clip()
    clip.text_model.to("meta")
    towers = get_peft_model(clip, SEPConfig(num_vision_prompts=4)).base_model.towers
    assert {m: tower.sep_prompts["default"].is_meta for m, tower in towers.items()} == {"text": True, "vision": False}
