"""What torch and accelerate do to a model with SEP from outside: it works as with LoRA, or says why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from small_classifier import logits_of, make_classifier, make_model, raises
from small_clip import make_clip
from small_sep import adapted, outputs
from torch import nn

from sep_peft import SEPClassifier, SEPConfig


def make_lora() -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(make_clip(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


# accelerate.cpu_offload


@pytest.mark.parametrize("name", ["published", "rank", "shared", "start", "shallow", "vision only"])
def test_offloaded_with_the_adapter(name: str):
    """And without it, and taken out."""
    expected, base = outputs(adapted(name)), outputs(make_clip())
    model = cpu_offload(adapted(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model.unload()), base)


def test_an_offloaded_classifier():
    classifier = make_classifier().eval()
    expected = logits_of(classifier)
    cpu_offload(classifier.model)
    assert torch.equal(logits_of(classifier), expected)


def test_a_further_adapter_where_others_are_offloaded():
    expected, model = outputs(make_model()), make_model()
    cpu_offload(model)
    with raises(
        "accelerate offloads text_model with the adapters that it had then, so a further one would not be found. Add "
        "all adapters to the model first, and offload it then."
    ):
        model.add_adapter("other", SEPConfig())
    assert list(model.peft_config) == ["default"] and torch.equal(outputs(model), expected)


@pytest.mark.parametrize("make", [make_model, make_lora])
def test_what_is_offloaded_is_not_saved(make: Callable, tmp_path):
    """By PEFT, whatever the method."""
    with raises("Cannot copy out of meta tensor; no data!", NotImplementedError):
        cpu_offload(make()).save_pretrained(tmp_path)


# torch.nn.DataParallel


@pytest.mark.parametrize("make", [make_model, make_lora])
def test_data_parallel_on_one_device(make: Callable):
    model = make()
    expected = outputs(model)
    assert torch.equal(outputs(nn.DataParallel(model)), expected)


@pytest.mark.parametrize("make", [make_model, make_classifier])
def test_data_parallel_on_several_devices_is_refused(make: Callable):
    """Torch makes the copies module by module, before anything is computed."""
    with raises(
        "SEP does not run in torch.nn.DataParallel on several devices. Start one process for each device with torchrun "
        "or accelerate launch; DistributedDataParallel, Trainer and fit then share out the images.",
        RuntimeError,
    ):
        [module._replicate_for_data_parallel() for module in make().modules()]


# torch.ao.quantization


def quantized(model: nn.Module, inplace: bool = False) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=inplace)


pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


@pytest.mark.parametrize(("inplace", "options"), [(False, {}), (True, {}), (False, {"fusion_rank": 2})])
def test_quantized_with_the_adapter(inplace: bool, options: dict):
    """LoRA asks the quantized layer for the dtype of its weights, which such a layer has not."""
    model = make_model(**options).eval()
    expected, base = outputs(model), outputs(quantized(make_clip()))
    found = quantized(model, inplace)
    assert (found is model) == inplace
    difference = (outputs(found) - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()
    with found.disable_adapter():
        assert torch.equal(outputs(found), base)
    assert inplace or torch.equal(outputs(model), expected)
    assert torch.equal(outputs(found.unload()), base)
    with raises("'function' object has no attribute 'dtype'", AttributeError):
        outputs(quantized(make_lora().eval()))


def test_quantized_before_the_adapter():
    """LoRA knows no such layers."""
    base, expected = outputs(quantized(make_clip())), outputs(make_model())
    model = make_model(clip=quantized(make_clip()))
    assert 0 < (outputs(model) - expected).abs().max() < 0.1 * expected.abs().max()
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)


def test_a_quantized_classifier():
    classifier = make_classifier().eval()
    expected = logits_of(classifier)
    found = quantized(classifier)
    assert isinstance(found, SEPClassifier)
    assert 0 < (logits_of(found) - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(logits_of(classifier), expected)


def test_a_quantized_adapter_is_not_saved_in_part(tmp_path):
    with raises(
        "This adapter cannot be saved, because modules of it were replaced, as torch.ao.quantization.quantize_dynamic "
        "does. Save it before it is quantized."
    ):
        quantized(make_model().eval()).save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
