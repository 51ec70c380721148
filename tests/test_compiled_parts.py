"""Models of which parts are compiled, before SEP comes or after it, compute what they compute without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from accelerate.utils import compile_regions, has_compiled_regions
from peft import LoraConfig, PeftModel, get_peft_model
from small_classifier import make_model, raises
from small_clip import make_clip
from small_sep import outputs, snapshot
from torch import nn

from sep_peft import SEPConfig


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_clip() -> nn.Module:
    return make_clip(text_layers=1, vision_layers=2)


def with_sep(clip: nn.Module) -> PeftModel:
    """Without prompts in the text tower, which would take as long again to compile."""
    return make_model(clip=clip, num_text_prompts=0, num_vision_prompts=2, fusion_rank=2, fusion_hidden_size=4)


def with_lora(clip: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(clip, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def compile_at(model: nn.Module, path: str) -> None:
    """In place, by a backend that runs what was traced as it is."""
    model.get_submodule(path).compile(backend="eager")


#: what compiles: below the model; in a model with SEP and in one without
PARTS = {
    "tower": ("vision_model", "vision_model"),
    "encoder": ("vision_model.base_layer.encoder", "vision_model.encoder"),
    "layer": ("vision_model.base_layer.encoder.layers.1", "vision_model.encoder.layers.1"),
    "inside the layer": ("vision_model.base_layer.encoder.layers.1.base_layer", "vision_model.encoder.layers.1"),
}


@pytest.mark.parametrize("part", PARTS)
def test_compiled_in_place_after_sep(part):
    """With the adapter, without it, and with it again."""
    model = with_sep(small_clip())
    expected = outputs(model)
    with model.disable_adapter():
        disabled = outputs(model)
    compile_at(model.get_base_model(), PARTS[part][0])
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), disabled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, disabled, atol=1e-2)


@pytest.mark.parametrize(
    ("part", "adapt"), [("tower", with_sep), ("encoder", with_sep), ("layer", with_sep), ("layer", with_lora)]
)
def test_compiled_in_place_before(part, adapt):
    """As with LoRA; the base model has computed before, so a graph without the adapter is there."""
    expected, clip = outputs(adapt(small_clip())), small_clip()
    compile_at(clip, PARTS[part][1])
    base = outputs(clip)
    model = adapt(clip)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(model.unload()), base, rtol=1e-5, atol=1e-5)


def test_gradients_through_a_compiled_encoder():
    def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
        pixel_values = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
        model.train().get_image_features(pixel_values=pixel_values).pooler_output.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model, expected = with_sep(small_clip()), gradients(with_sep(small_clip()))
    compile_at(model.get_base_model(), "vision_model.base_layer.encoder")
    found = gradients(model)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_regions_compiled_by_accelerate(tmp_path):
    """In a copy of the model with the same parameters: with the adapter, without it, and saved."""
    model = with_sep(small_clip())
    expected = outputs(model)
    with model.disable_adapter():
        disabled = outputs(model)
    regions = cast(PeftModel, compile_regions(model, backend="eager"))
    assert has_compiled_regions(regions) and not has_compiled_regions(model)
    torch.testing.assert_close(outputs(regions), expected, rtol=1e-5, atol=1e-5)
    with regions.disable_adapter():
        torch.testing.assert_close(outputs(regions), disabled, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, disabled, atol=1e-2)
    regions.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(small_clip(), tmp_path)), expected)


@pytest.mark.parametrize(
    ("compiled", "what"),
    [
        (lambda clip: torch.compile(clip), "the model is"),
        (lambda clip: put(clip, "vision_model"), "vision_model is"),
        (lambda clip: put(clip, "text_model.encoder"), "text_model.encoder is"),
    ],
    ids=["model", "tower", "encoder"],
)
def test_what_torch_compile_returned_is_refused(compiled: Callable, what: str):
    clip = small_clip()
    model, before = compiled(clip), snapshot(clip)
    with raises(
        f"SEP cannot be put into what is compiled already: {what} a module that torch.compile has returned. Add the "
        "adapter first and compile afterwards: torch.compile(get_peft_model(model, SEPConfig()))."
    ):
        get_peft_model(model, SEPConfig())
    assert snapshot(clip) == before


def put(clip: nn.Module, path: str) -> nn.Module:
    parent, _, name = path.rpartition(".")
    setattr(clip.get_submodule(parent), name, torch.compile(clip.get_submodule(path)))
    return clip


@pytest.mark.parametrize(("path", "what"), [("", "the model"), ("vision_model", "vision_model")])
def test_names_of_adapters_that_a_compiled_tower_would_not_see(path, what):
    model = with_sep(small_clip()).eval()
    pixel_values = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    names = ["__base__", "default"]
    model.get_image_features(pixel_values=pixel_values, adapter_names=names)
    compile_at(model.get_base_model(), path)
    with raises(
        f"adapter_names do not reach {what}, which was compiled in place: its graph has the active adapter. Use "
        "set_adapter, or compile the call that passes adapter_names instead."
    ):
        model.get_image_features(pixel_values=pixel_values, adapter_names=names)


@torch.no_grad()
def test_names_of_adapters_reach_a_compiled_encoder():
    model = with_sep(small_clip()).eval()
    pixel_values = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": pixel_values, "adapter_names": ["__base__", "default"]}
    expected = model.get_image_features(**inputs).pooler_output
    compile_at(model.get_base_model(), "vision_model.base_layer.encoder")
    torch.testing.assert_close(model.get_image_features(**inputs).pooler_output, expected, rtol=1e-5, atol=1e-5)
