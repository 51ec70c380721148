"""One compiled graph serves every batch size that is marked dynamic; inductor computes what eager mode does."""

from __future__ import annotations

import pytest
import small_classifier
import torch
from peft import PeftModel, get_peft_model
from small_clip import make_clip, make_images, perturb

from sep_peft import SEPConfig


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(**config) -> PeftModel:
    """Of two layers, since the compiler's time grows with them."""
    return small_classifier.make_model(clip=make_clip(text_layers=2, vision_layers=2), **config)


def dynamic_images(count: int) -> torch.Tensor:
    images = make_images(count)
    torch._dynamo.mark_dynamic(images, 0)
    return images


def gradients(model: torch.nn.Module, loss, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(images).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: torch.nn.Module):
    return lambda images: model.get_image_features(pixel_values=images).pooler_output.square().mean()


@pytest.mark.parametrize(
    ("config", "backend"),
    [({}, "aot_eager"), ({"start_layer": 1}, "eager"), ({"fusion_rank": 2, "share_fusion": True}, "eager")],
    ids=str,
)
def test_other_batch_sizes_compile_nothing_again(config, backend):
    """What may forbid a size below dynamo is the same with every configuration, and takes half of the time."""
    model = make_model(**config).eval()
    compiled = torch.compile(model.get_image_features, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(pixel_values=dynamic_images(3))
        with torch.compiler.set_stance("fail_on_recompile"):
            for count in (2, 5, 7):
                images = dynamic_images(count)
                expected = model.get_image_features(pixel_values=images).pooler_output
                found = compiled(pixel_values=images).pooler_output
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_training_step_of_another_batch_size_compiles_nothing_again():
    model = make_model().train()
    loss = loss_of(model)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(dynamic_images(3)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (2, 5):
            images = dynamic_images(count)
            found = gradients(model, compiled, images)
            torch.testing.assert_close(found, gradients(model, loss, images), rtol=1e-3, atol=1e-6)


def test_a_training_step_with_inductor():
    """Of two layers, since the compiler's time grows with them; batches of other sizes share its code as well."""
    torch.manual_seed(3)
    config = SEPConfig.published(num_text_prompts=0, num_vision_prompts=2)
    model = get_peft_model(make_clip(text_layers=1, vision_layers=2), config).train()
    perturb(model)
    loss = loss_of(model)
    compiled = torch.compile(loss, fullgraph=True)
    compiled(dynamic_images(3)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        images = dynamic_images(5)
        found = gradients(model, compiled, images)
        torch.testing.assert_close(found, gradients(model, loss, images), rtol=1e-3, atol=1e-6)
