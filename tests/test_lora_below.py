"""A model that carries LoRA takes SEP above it: trained apart or together, saved apart."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_classifier import raises
from small_clip import make_clip, make_images, make_texts, perturb

from sep_peft import SEPClassifier, SEPConfig, lifted


IMAGES, TEXTS, LABELS = make_images(3), make_texts([5, 4, 6]), torch.tensor([2, 0, 1])
INPUTS = {**TEXTS, "pixel_values": IMAGES}


def make_lora(adapter: str = "style", seed: int = 1) -> PeftModel:
    model = get_peft_model(make_clip(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def add_sep(lora: PeftModel, adapter: str = "default") -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(lora.get_base_model(), SEPConfig(num_vision_prompts=4), adapter).eval()
    perturb(model, adapter)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    return model(**INPUTS).logits_per_image


def gradients(model: torch.nn.Module) -> set[str]:
    """Kinds of parameters that a step of training reaches; all of a kind or none."""
    classifier = SEPClassifier(model, TEXTS, prototype_weight=0.0).train()
    classifier(IMAGES, LABELS).loss.backward()
    parameters = dict(model.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    return {"lora" if "lora_" in name else "sep" if ".sep_" in name else "base" for name in parameters
            if parameters[name].grad is not None}  # fmt: skip


@pytest.mark.parametrize("names", [("style", "default"), ("default", "default"), ("default", "task")])
def test_sep_changes_the_model_with_lora_and_disabled_is_that_model(names):
    lora = make_lora(names[0])
    expected = outputs(lora)
    model = add_sep(lora, names[1])
    assert (outputs(model) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)
    assert (outputs(model) - expected).abs().max() > 1e-3
    assert not torch.equal(expected, outputs(make_clip()))


def test_each_method_keeps_its_own_configurations():
    lora = make_lora("default")
    model = add_sep(lora)
    assert isinstance(lora.peft_config["default"], LoraConfig) and len(lora.peft_config) == 1
    assert isinstance(model.peft_config["default"], SEPConfig) and len(model.peft_config) == 1
    lora = make_lora()
    model = add_sep(lora)
    assert (list(lora.peft_config), list(model.peft_config)) == (["style"], ["default"])


def test_a_configuration_that_does_not_fit_leaves_everything_as_it_was():
    lora = make_lora()
    expected, keys = outputs(lora), lora.state_dict().keys()
    with pytest.raises(ValueError, match="start_layer"):
        get_peft_model(lora.get_base_model(), SEPConfig(start_layer=99, num_vision_prompts=4))
    assert torch.equal(outputs(lora), expected)
    assert lora.state_dict().keys() == keys
    assert lora.get_base_model().peft_config is lora.peft_config


def test_train_either_or_both():
    lora = make_lora()
    model = add_sep(lora)
    assert gradients(model) == {"lora", "sep"}
    lora.base_model.set_requires_grad("style", False)
    model.zero_grad()
    assert gradients(model) == {"sep"}
    lora.base_model.set_requires_grad("style", True)
    model.base_model.set_requires_grad("default", False)
    model.zero_grad()
    assert gradients(model) == {"lora"}


def test_what_one_method_trains_or_uses_does_not_touch_the_other():
    lora = make_lora("default")
    model = add_sep(lora)
    grads = {n: p.requires_grad for n, p in model.named_parameters() if "lora_" in n}
    model.base_model.set_requires_grad("default", False)
    model.add_adapter("second", SEPConfig(num_text_prompts=2, num_vision_prompts=4))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert {n: p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == grads
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(make_lora("default")))


def test_gradients_of_lora_take_the_frozen_branch_as_a_constant():
    """Finite differences over one entry of LoRA, with the frozen embeddings of before."""
    model = add_sep(make_lora()).double()
    tower = model.base_model.towers["vision"]
    name, parameter = next((n, p) for n, p in model.named_parameters() if "vision" in n and "lora_B" in n)
    pixels = IMAGES.double()
    prompted, frozen = tower.embed(pixel_values=pixels)
    assert prompted.requires_grad and not frozen.requires_grad, name
    (gradient,) = torch.autograd.grad(prompted[0, 0], parameter)
    with torch.no_grad():
        step, sides = 1e-6, []
        for sign in (1, -1):
            parameter[0, 0] += sign * step
            sides.append(tower.embed(pixel_values=pixels)[0][0, 0])
            parameter[0, 0] -= sign * step
    torch.testing.assert_close(gradient[0, 0], (sides[0] - sides[1]) / (2 * step), rtol=1e-4, atol=1e-8)


def test_saved_apart_loaded_together(tmp_path):
    lora = make_lora()
    below = outputs(lora)
    model = add_sep(lora)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "sep")
    with lifted(model) as base:
        assert torch.equal(outputs(base), below)
        lora.save_pretrained(tmp_path / "lora")
    assert torch.equal(outputs(model), expected)
    assert not any("lora" in key for key in load_file(tmp_path / "sep/adapter_model.safetensors"))
    keys = list(load_file(tmp_path / "lora/style/adapter_model.safetensors"))
    assert keys and not any("sep_" in key or "base_layer" in key for key in keys)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["README.md", "style"]
    alone = PeftModel.from_pretrained(make_clip(), tmp_path / "lora/style").eval()
    assert torch.equal(outputs(alone), below)
    both = PeftModel.from_pretrained(alone.get_base_model(), tmp_path / "sep").eval()
    assert torch.equal(outputs(both), expected)


def test_lora_loaded_and_merged_below_sep(tmp_path):
    make_lora("default", seed=2).save_pretrained(tmp_path)
    lora = make_lora()
    model = add_sep(lora)
    expected = outputs(add_sep(make_lora(seed=2)))
    with lifted(model):
        lora.load_adapter(tmp_path, "other")
        lora.set_adapter("other")
    torch.testing.assert_close(outputs(model.eval()), expected)
    with lifted(model):
        lora.merge_and_unload()
    assert not any("lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(outputs(model), expected)


def test_an_error_in_the_block_puts_sep_back():
    model = add_sep(make_lora())
    expected, keys = outputs(model), model.state_dict().keys()
    with pytest.raises(RuntimeError, match=r"^full$"), lifted(model):
        raise RuntimeError("full")
    assert torch.equal(outputs(model), expected)
    assert model.state_dict().keys() == keys


def test_sep_taken_out_leaves_the_model_with_lora():
    lora = make_lora()
    expected, keys = outputs(lora), list(lora.state_dict())
    model = add_sep(lora)
    with lifted(model):
        assert list(lora.state_dict()) == keys
    assert torch.equal(outputs(lora), outputs(model))  # LoRA's model sees SEP as well: it is the same model
    model.delete_adapter("default")
    assert torch.equal(outputs(lora), expected)


def test_transformers_own_adapters(own_adapters):
    clip = make_clip()
    clip.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "style")
    clip.add_adapter(SEPConfig(num_vision_prompts=4), "task")
    assert set(clip.peft_config) == {"style", "task"}
    clip.set_adapter("task")
    assert any(".sep_" in n and p.requires_grad for n, p in clip.named_parameters())


def test_a_peft_model_itself_is_refused():
    lora = make_lora()
    keys = lora.state_dict().keys()
    with raises(
        "The model is a PeftModel. To add SEP above the adapters it has, wrap the model inside: "
        "get_peft_model(model.get_base_model(), SEPConfig())."
    ):
        get_peft_model(lora, SEPConfig(num_vision_prompts=4))
    assert lora.state_dict().keys() == keys
