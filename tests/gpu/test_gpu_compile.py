"""Compiled models on a GPU, also by CUDA graphs, compute what eager ones do."""

from __future__ import annotations

import pytest
import torch
from small_classifier import make_model
from small_clip import make_clip, make_images


pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(put):
    """Of two layers, since the compiler's time grows with them."""
    return put(make_model(clip=make_clip(text_layers=2, vision_layers=2))).eval()


@pytest.fixture
def compiled(device):
    """Compiles whole graphs; on the CPU without making machine code, which takes minutes there."""

    def compiled(function, **options):
        where = {} if device.type == "cuda" else {"backend": "aot_eager"}
        return torch.compile(function, fullgraph=True, **where, **options)

    return compiled


def embed(model):
    return lambda images: model.get_image_features(pixel_values=images).pooler_output


@torch.no_grad()
def test_inference(model, compiled, put):
    call = compiled(embed(model))
    for count in (3, 5):
        images = put(make_images(count))
        torch.testing.assert_close(call(images), embed(model)(images), rtol=1e-3, atol=1e-4)


def gradients(model, loss, images) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(images).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_training_step(model, compiled, put):
    model.train()
    loss = lambda images: embed(model)(images).square().mean()  # noqa: E731
    images = put(make_images(3))
    found, expected = gradients(model, compiled(loss), images), gradients(model, loss, images)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)


@torch.no_grad()
def test_cuda_graphs(model, cuda, put):
    """They are recorded and then replayed: other images give other embeddings, those of eager mode."""
    call = torch.compile(embed(model), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        images = put(make_images(3, seed=seed))
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(call(images), embed(model)(images), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_recorded_graph_sees_new_weights(model, cuda, put):
    """Of an adapter that is trained on, as long as its tensors stay the same."""
    images = put(make_images(3))
    call = torch.compile(embed(model), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        call(images)
    for name, parameter in model.named_parameters():
        if ".sep_prompts" in name:
            parameter.add_(0.3)
    torch.compiler.cudagraph_mark_step_begin()
    torch.testing.assert_close(call(images), embed(model)(images), rtol=1e-3, atol=1e-4)
