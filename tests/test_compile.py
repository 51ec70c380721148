"""One compiled graph serves every batch size once the batch is marked dynamic."""

from __future__ import annotations

import pytest
import torch
from small_classifier import make_classifier
from small_clip import make_images


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dynamic_images(count: int) -> torch.Tensor:
    images = make_images(count)
    torch._dynamo.mark_dynamic(images, 0)
    return images


@pytest.mark.parametrize("config", [{}, {"start_layer": 1}, {"fusion_rank": 2, "share_fusion": True}], ids=str)
def test_other_batch_sizes_compile_nothing_again(config):
    model = make_classifier(config=config).eval().model
    compiled = torch.compile(model.get_image_features, fullgraph=True)
    with torch.no_grad():
        compiled(pixel_values=dynamic_images(3))
        with torch.compiler.set_stance("fail_on_recompile"):
            for count in (2, 5, 7):
                images = dynamic_images(count)
                expected = model.get_image_features(pixel_values=images).pooler_output
                found = compiled(pixel_values=images).pooler_output
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_training_step_of_another_batch_size_compiles_nothing_again():
    model = make_classifier().train().model

    def loss(images):
        return model.get_image_features(pixel_values=images).pooler_output.square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    compiled(dynamic_images(3)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (2, 5):
            model.zero_grad()
            images = dynamic_images(count)
            compiled(images).backward()
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            loss(images).backward()
            expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
