"""Every family of `families.CASES` computes on a GPU what it computes on a CPU."""

from __future__ import annotations

import pytest
import torch
from families import CASES
from family_models import FIRST, adapt, tower_inputs, tower_of


pytestmark = pytest.mark.gpu


def embeddings_and_gradients(model, case, tower, put) -> dict[str, torch.Tensor]:
    """Of both branches, and of every parameter of the adapter in the tower, on the CPU."""
    model.zero_grad()
    found = tower_of(model, tower).embed(**put(tower_inputs(case, tower)))
    found.prompted.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    tensors = {"prompted": found.prompted, "frozen": found.frozen, **gradients}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", FIRST)
def test_embeddings_and_gradients(name, put):
    case = CASES[name]
    for attention in case.attentions:
        model, there = adapt(case, attention), put(adapt(case, attention))
        for tower in case.towers:
            expected = embeddings_and_gradients(model, case, tower, lambda x: x)
            found = embeddings_and_gradients(there, case, tower, put)
            assert found.keys() == expected.keys()
            for part, value in expected.items():
                scale = value.abs().max().item()
                torch.testing.assert_close(
                    found[part], value, rtol=2e-3, atol=2e-4 * max(scale, 1e-2), msg=f"{tower} {attention} {part}"
                )


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_the_whole_model_in_bf16(name, put):
    """Which fp32 adapters on a bf16 base must not stop."""
    case = CASES[name]
    model = put(adapt(case).to(torch.bfloat16))
    for tower in case.towers:
        inputs = put(tower_inputs(case, tower))
        inputs = {
            k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }
        found = tower_of(model, tower).embed(**inputs)
        assert found.prompted.isfinite().all() and found.frozen.isfinite().all()
