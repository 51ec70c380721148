"""Base models in 8 and 4 bits. torchao runs on a CPU; what bitsandbytes does there depends on its build."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb
from transformers import BitsAndBytesConfig, CLIPModel

from sep_peft import SEPClassifier, SEPConfig


TEXTS, IMAGES = make_texts([5, 3, 9, 4]), make_images(3)
BITS = [8, 4]


def quantize(bits: int) -> CLIPModel:
    """The tiny CLIP with all its linear layers in 8 or 4 bits."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    kinds = {8: torch.int8, 4: torch.int4}
    clip = make_clip()
    quantization.quantize_(clip, quantization.IntxWeightOnlyConfig(weight_dtype=kinds[bits]))
    return clip


def adapt(clip: CLIPModel) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(clip, SEPConfig.published(num_text_prompts=2, num_vision_prompts=2))
    perturb(model)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**TEXTS, pixel_values=IMAGES).logits_per_image


@pytest.mark.parametrize("bits", BITS)
def test_adapter_over_quantized_weights(bits, tmp_path):
    """It trains in fp32, is saved and loaded, and leaves the quantized model as it was."""
    clip = quantize(bits)
    with torch.no_grad():
        plain, full = logits(clip), logits(make_clip())
    assert not torch.equal(plain, full)
    model = adapt(clip)
    output = logits(model)
    output.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".sep_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(quantize(bits), tmp_path)), logits(model))
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model.unload()), plain)


@pytest.mark.parametrize("bits", BITS)
def test_classifier_over_quantized_weights(bits):
    """Class texts are cached, and noticed when the adapter changes."""
    classifier = SEPClassifier(adapt(quantize(bits)), TEXTS).eval()
    with torch.no_grad():
        before = classifier(IMAGES).logits
        assert torch.equal(classifier(IMAGES).logits, before)
        for name, parameter in classifier.named_parameters():
            if "text_model.sep_prompts" in name:
                parameter.add_(1)
        assert not torch.equal(classifier(IMAGES).logits, before)
    loss = classifier.train()(IMAGES, torch.tensor([0, 3, 1])).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs a GPU here")
@pytest.mark.parametrize("bits", BITS)
def test_bitsandbytes(bits, tmp_path):
    make_clip().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = adapt(CLIPModel.from_pretrained(tmp_path, quantization_config=config, device_map="cuda"))
    inputs = {key: value.cuda() for key, value in (TEXTS | {"pixel_values": IMAGES}).items()}
    model(**inputs).logits_per_image.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
