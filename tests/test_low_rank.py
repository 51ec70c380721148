"""The attention of low rank is the attention of the factored projections, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch

from sep_peft.method.attention import FusionAttention
from sep_peft.method.fusion import TokenFusion


SIZES = [(64, 1), (128, 3), (192, 5), (130, 2)]  # 1, 2, 3 heads of 64, and 2 of 65


@pytest.mark.parametrize(("hidden_size", "rank"), SIZES)
def test_low_rank_is_the_same_map_with_the_same_gradients(hidden_size, rank):
    generator = torch.Generator().manual_seed(0)
    low = FusionAttention(hidden_size, rank, dtype=torch.float64)
    assert low.on_rank_channels
    with torch.no_grad():
        for parameter in low.parameters():  # biases too
            parameter.normal_(std=0.3, generator=generator)
    wide = FusionAttention(hidden_size, rank, dtype=torch.float64)
    wide.on_rank_channels = False
    wide.load_state_dict(low.state_dict())

    query = torch.randn(3, 4, hidden_size, dtype=torch.float64, generator=generator)
    tokens = torch.randn(3, 5, hidden_size, dtype=torch.float64, generator=generator)
    found, gradients = {}, {}
    for name, module in (("low", low), ("wide", wide)):
        inputs = query.clone().requires_grad_(), tokens.clone().requires_grad_()
        found[name] = module(*inputs)
        found[name].square().sum().backward()
        gradients[name] = [x.grad for x in inputs] + [p.grad for p in module.parameters()]

    torch.testing.assert_close(found["low"], found["wide"])
    assert found["wide"].std() > 0.1
    torch.testing.assert_close(gradients["low"], gradients["wide"], rtol=1e-6, atol=1e-9)
    assert torch.equal(low.weights(query, tokens), wide.weights(query, tokens))


@pytest.mark.parametrize(("rank", "on_channels"), [(None, False), (4, True), (63, True), (64, False)])
def test_rank_below_the_size_of_a_head_is_computed_on_the_rank(rank, on_channels):
    assert TokenFusion(128, rank=rank).attention.on_rank_channels is on_channels
