"""Which kernels of attention run, and that all of them give the same."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sep_peft import SEPClassifier, SEPConfig


pytestmark = pytest.mark.gpu
IMAGES, NAMES = make_images(5), make_texts([5, 3, 9, 4])


def make_model(dtype: torch.dtype) -> PeftModel:
    model = get_peft_model(make_clip().to(dtype), SEPConfig(num_text_prompts=3, num_vision_prompts=4))
    perturb(model)
    return model.eval()


def attention_kernels(call) -> set[str]:
    """Names of the operations of scaled dot product attention that a call runs, such as "flash"."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as seen:
        call()
    return {
        kind
        for event in seen.key_averages()
        for kind in ("flash", "efficient", "cudnn", "math")
        if event.key.startswith("aten::_scaled_dot_product") and kind in event.key
    }


@torch.no_grad()
def test_flash_attention_of_images_and_class_texts(device, put):
    """Neither an image's tokens with prompts nor class texts, which have no mask, keep it from running."""
    model = put(make_model(torch.bfloat16))
    vision = model.base_model.towers["vision"]
    images = put(IMAGES.bfloat16())
    assert "flash" in attention_kernels(lambda: vision.embed(pixel_values=images))
    classifier = SEPClassifier(model, put(NAMES)).eval()
    encoder = classifier.encoder
    trained = lambda: encoder.weights(training=True)  # noqa: E731  encodes the texts anew
    trained()
    assert "flash" in attention_kernels(trained)


@pytest.mark.parametrize("backend", ["MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION"])
def test_kernels_agree(backend, device, put):
    """Images and texts, forward and backward; the fusions' attention, in fp32, takes what is left."""
    if backend == "EFFICIENT_ATTENTION" and device.type != "cuda":
        pytest.skip("it is about CUDA itself")
    model = put(make_model(torch.float32))
    towers = model.base_model.towers

    def embed() -> list[torch.Tensor]:
        model.zero_grad()
        image = towers["vision"].embed_prompted(pixel_values=put(IMAGES))
        text = towers["text"].embed_prompted(**put(NAMES))
        (image.sum() + text.sum()).backward()
        return [image, text, *(tower.sep_prompts["default"].grad.clone() for tower in towers.values())]

    expected = embed()
    with sdpa_kernel([getattr(SDPBackend, backend), SDPBackend.MATH], set_priority=True):
        found = embed()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
