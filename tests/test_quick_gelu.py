"""Quick-GELU with a backward pass of its own: the values of transformers', the same derivatives, less memory."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from small_clip import make_clip, make_images, make_texts
from torch import nn
from transformers.activations import QuickGELUActivation

from sep_peft import SEPConfig
from sep_peft.method.quick_gelu import quick_gelu
from sep_peft.tuner.wrappers import SEPActivation


TEXTS, IMAGES = make_texts([5, 3, 9, 4]), make_images(4)
theirs = QuickGELUActivation()


def numbers(*shape: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 5, 7), (2, 1021)])
def test_values_are_those_of_transformers_bit_for_bit(dtype, shape):
    x = numbers(*shape, dtype=dtype)
    assert torch.equal(quick_gelu(x), theirs(x))
    assert torch.equal(quick_gelu(x.requires_grad_()), theirs(x))


def test_derivatives():
    x = numbers(3, 11, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(quick_gelu, x)
    assert torch.autograd.gradgradcheck(quick_gelu, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_gradients_are_those_of_the_formula(dtype, tolerance):
    x, weights = numbers(64, 33, dtype=dtype).requires_grad_(), numbers(64, 33, dtype=dtype)
    own, *_ = torch.autograd.grad(quick_gelu(x), x, weights)
    wide = x.detach().double().requires_grad_()
    expected, *_ = torch.autograd.grad(theirs(wide), wide, weights.double())
    assert own.dtype == dtype
    torch.testing.assert_close(own.double(), expected, rtol=tolerance, atol=tolerance)


def test_extremes_give_no_nan():
    x = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], requires_grad=True)
    quick_gelu(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_functional_transforms():
    x = numbers(4, 5)
    expected = torch.func.vmap(torch.func.grad(lambda row: theirs(row).sum()))(x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda row: quick_gelu(row).sum()))(x), expected)


def kept(call, x: torch.Tensor) -> list[torch.Size]:
    """Shapes of what a call keeps for its backward pass."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        call(x)
    return shapes


def test_its_backward_pass_keeps_the_input_alone():
    x = numbers(6, 7).requires_grad_()
    assert kept(quick_gelu, x) == [(6, 7)]
    assert len(kept(theirs, x)) > 1


def activations(model: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


def test_all_activations_of_prompted_towers_are_wrapped_and_given_back():
    clip = make_clip()
    count = activations(clip, QuickGELUActivation)
    assert count == 3 + 4
    model = get_peft_model(clip, SEPConfig(num_vision_prompts=4))
    model.add_adapter("second", SEPConfig.compact())
    assert activations(clip, SEPActivation) == activations(clip, QuickGELUActivation) == count
    model.unload()
    assert activations(clip, SEPActivation) == 0 and activations(clip, QuickGELUActivation) == count
    vision = get_peft_model(make_clip(), SEPConfig(num_text_prompts=0, num_vision_prompts=4))
    assert activations(vision, SEPActivation) == 4


def test_gradients_of_a_model_are_those_with_its_own_activations(monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(make_clip(), SEPConfig(num_vision_prompts=4)).double()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def gradients():
        logits = model(**TEXTS, pixel_values=IMAGES.double()).logits_per_image
        return logits, torch.autograd.grad(logits.square().sum(), trained.values())

    logits, own = gradients()
    monkeypatch.setattr(SEPActivation, "forward", lambda self, x: self.base_layer(x))
    expected, other = gradients()
    assert torch.equal(logits, expected)
    for key, a, b in zip(trained, own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=key)
