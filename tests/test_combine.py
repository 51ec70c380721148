"""Weighted sums of adapters, and new weights in place."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from small_classifier import raises
from small_clip import make_clip, make_images, make_texts, perturb
from small_sep import SETTINGS, adapted, outputs, snapshot

from sep_peft import AdapterMismatchError, SEPClassifier, SEPConfig, hotswap_adapter
from sep_peft.tuner.soup import OPTIONS


def two(name: str = "published", second: str | None = None, **changes) -> PeftModel:
    model = adapted(name, "one")
    torch.manual_seed(4)
    model.add_adapter("two", SEPConfig.published(**(SETTINGS[second or name] | changes)))
    perturb(model, "two", seed=4)
    return model.eval()


def parameters_of(model, adapter: str) -> dict[str, torch.Tensor]:
    """Name without the adapter's -> parameter."""
    return {
        key.replace(f".{adapter}", ""): p.detach()
        for key, p in model.named_parameters()
        if ".sep_" in key and f".{adapter}" in key
    }


# weighted sums


@pytest.mark.parametrize("name", SETTINGS)
def test_weighted_sum(name):
    model = two(name)
    before = outputs(model)
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "soup")
    one, other, soup = (parameters_of(model, adapter) for adapter in ("one", "two", "soup"))
    assert list(soup) == list(one) and soup
    for key, value in soup.items():
        torch.testing.assert_close(value, 0.25 * one[key] + 0.75 * other[key], rtol=1e-6, atol=1e-7)
    assert torch.equal(outputs(model), before)  # the active adapter has not changed
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".soup" in key)
    model.set_adapter("soup")
    assert not torch.equal(outputs(model), before)


def test_sums_that_are_known(tmp_path):
    model = two()
    expected = outputs(model)
    model.add_weighted_adapter(["one"], [1], "clone")
    model.add_weighted_adapter(["one", "one", "two"], [2.0, -1.0, 0.0], "same")
    for name in ("clone", "same"):
        model.set_adapter(name)
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    perturb(model, "clone", seed=8)
    model.set_adapter("one")
    assert torch.equal(outputs(model), expected)  # nothing is shared
    model.set_adapter("clone")
    model.save_pretrained(tmp_path, selected_adapters=["clone"])
    fresh = PeftModel.from_pretrained(make_clip(), tmp_path / "clone")
    assert torch.equal(outputs(fresh), outputs(model))


def test_adapters_in_half_precision():
    model = get_peft_model(
        make_clip().bfloat16(), SEPConfig.published(**SETTINGS["rank"]), "one", autocast_adapter_dtype=False
    )
    perturb(model, "one")
    model.add_weighted_adapter(["one"], [0.5], "halved")
    for key, value in parameters_of(model, "halved").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, parameters_of(model, "one")[key] / 2)


TAKEN = "There is an adapter 'two' already. Choose another name."


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        ([], [], "soup", "adapters must be a list of at least one adapter name, but got []."),
        ("one", [1.0], "soup", "adapters must be a list of at least one adapter name, but got 'one'."),
        (["one", "two"], [1.0], "soup", "There must be a weight for each of 2 adapters, but got 1."),
        (["one", "two"], [1.0, float("nan")], "soup", "A weight must be a finite number, but got nan."),
        (["one", "two"], [1.0, "1"], "soup", "A weight must be a finite number, but got '1'."),
        (["one", "four"], [0.5, 0.5], "soup", "There is no SEP adapter 'four' in this model."),
        (["one"], [1.0], "two", TAKEN),
        (["one"], [1.0], "a.b", "An adapter name must not be empty nor contain a dot, but got 'a.b'."),
        (
            ["one", "three"],
            [0.5, 0.5],
            "soup",
            "The adapters 'one' and 'three' differ in frozen_weight (0.5 and 0.8), num_vision_prompts (4 and 2); their "
            "parameters must mean the same.",
        ),
    ],
)
def test_sums_that_cannot_be_made_change_nothing(adapters, weights, name, message):
    model = two()
    model.add_adapter("three", SEPConfig.published(num_text_prompts=3, num_vision_prompts=2, frozen_weight=0.8))
    before, configs = snapshot(model), dict(model.peft_config)
    with raises(message):
        model.add_weighted_adapter(adapters, weights, name)
    assert snapshot(model) == before and model.peft_config == configs


def test_modules_to_save_are_not_summed():
    model = get_peft_model(make_clip(), SEPConfig.published(modules_to_save=["visual_projection"]), "one")
    message = "The adapters 'one' and 'one' have modules_to_save, which are no part of SEP's parameters."
    with raises(message):
        model.add_weighted_adapter(["one"], [1.0], "soup")


def test_options_that_must_agree():
    """All of SEP's own; a new one must be thought about here."""
    assert OPTIONS == [
        "architecture",
        "batch_coupled",
        "frozen_weight",
        "fusion",
        "fusion_hidden_size",
        "fusion_rank",
        "fusion_tokens",
        "modules_to_save",
        "num_text_prompts",
        "num_vision_prompts",
        "share_fusion",
        "start_layer",
        "target_modules",
        "text_layers",
        "vision_layers",
    ]


# hot swapping


@pytest.fixture
def saved(tmp_path) -> str:
    adapted("published", seed=8).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("name", SETTINGS)
def test_swapped_in_place(name, tmp_path):
    adapted(name, seed=8).save_pretrained(tmp_path)
    model = adapted(name, "mine")
    before = outputs(model)
    pointers = [(key, p.data_ptr(), p.requires_grad) for key, p in model.named_parameters()]
    hotswap_adapter(model, str(tmp_path), "mine")
    assert torch.equal(outputs(model), outputs(adapted(name, seed=8)))
    assert not torch.equal(outputs(model), before)
    assert [(key, p.data_ptr(), p.requires_grad) for key, p in model.named_parameters()] == pointers


def test_other_adapters_stay(saved):
    model = two()
    model.set_adapter("two")
    expected = outputs(model)
    hotswap_adapter(model, saved, "one", torch_device="cpu")
    assert torch.equal(outputs(model), expected)
    model.set_adapter("one")
    assert torch.equal(outputs(model), outputs(adapted("published", seed=8)))


def test_from_a_subfolder_into_a_model_without_peft_model(tmp_path):
    adapted("published", seed=8).save_pretrained(tmp_path / "below")
    model = inject_adapter_in_model(SEPConfig.published(**SETTINGS["published"]), make_clip())
    hotswap_adapter(model, str(tmp_path), "default", subfolder="below")
    assert torch.equal(outputs(model), outputs(adapted("published", seed=8)))


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again(tmp_path):
    sizes = {"text_layers": 2, "vision_layers": 2}  # the compiler's time grows with the layers
    other = adapted("published", seed=8, **sizes)
    other.save_pretrained(tmp_path)
    model = adapted("published", **sizes)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    texts, images = make_texts([5, 3, 9, 4]), make_images(3)
    compiled(**texts, pixel_values=images)
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap_adapter(compiled, str(tmp_path), "default")
        found = compiled(**texts, pixel_values=images).logits_per_image
    torch._dynamo.reset()
    torch.testing.assert_close(found, outputs(other), rtol=1e-4, atol=1e-5)


def test_cached_class_texts_notice(saved):
    texts = make_texts([5, 3, 7, 4]), make_texts([9, 7, 11, 8], seed=5)
    classifier = SEPClassifier(adapted("published"), *texts).eval()
    with torch.no_grad():
        before = classifier(make_images(3)).logits
        hotswap_adapter(classifier.model, saved, "default")
        after = classifier(make_images(3)).logits
        expected = SEPClassifier(adapted("published", seed=8), *texts).eval()(make_images(3)).logits
    assert torch.equal(after, expected) and not torch.equal(after, before)


def assert_refused(model: PeftModel, path: str, message: str, error: type[Exception] = ValueError) -> None:
    before, values = outputs(model), snapshot(model)
    with raises(message, error):
        hotswap_adapter(model, path, "default")
    assert torch.equal(outputs(model), before) and snapshot(model) == values


def test_an_adapter_that_is_not_there(saved):
    model = adapted("published", "one")
    with raises("There is no SEP adapter 'default' in this model."):
        hotswap_adapter(model, saved, "default")


def test_other_options(saved):
    message = (
        f"The adapter 'default' and that of {saved} differ in num_text_prompts (1 and 3), num_vision_prompts (1 and "
        "4); their parameters must mean the same."
    )
    assert_refused(adapted("one prompt"), saved, message)


def test_another_method(tmp_path):
    get_peft_model(make_clip(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    message = f"{tmp_path} holds an adapter of the method LORA, but SEP is needed."
    assert_refused(adapted("published"), str(tmp_path), message)


def test_another_architecture(tmp_path):
    get_peft_model(make_clip(vision_layers=5), SEPConfig.published(**SETTINGS["published"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was made for another architecture: it needs .*'num_layers': 5.*, but the m"):
        hotswap_adapter(adapted("published"), str(tmp_path), "default")


def test_a_file_that_does_not_fit(saved):
    file = f"{saved}/adapter_model.safetensors"
    state = load_file(file)
    key = sorted(state)[-1]
    state[key] = state[key][:1].clone()
    state["base_model.model.more"] = torch.zeros(1)
    removed = sorted(state)[1]
    del state[removed]
    save_file(state, file, metadata={"format": "pt"})
    shapes = {k: tuple(v.shape) for k, v in parameters_of(adapted("published"), "default").items()}
    message = (
        "the file of adapter 'default' does not fit this model and configuration; missing keys: "
        f"{removed}; unexpected keys: base_model.model.more; other shapes: {key} is {tuple(state[key].shape)}, needed "
        f"is {shapes[key]}"
    )
    assert_refused(adapted("published"), saved, message, AdapterMismatchError)


def test_a_model_made_in_inference_mode(saved):
    with torch.inference_mode():
        model = adapted("published")
    message = "The adapter was made in inference mode, where its weights cannot be swapped in place."
    assert_refused(model, saved, message)
