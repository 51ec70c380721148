"""`output_attentions` gives maps of the base model's count and shapes, made of what the prompted pass has computed."""

from __future__ import annotations

import pytest
import torch
from families import CASES
from family_models import TOWERS, adapt, adapt_once, tower_inputs, tower_of


EAGER = [p for p in TOWERS if p.values[2] == "eager"]


def maps(call, layer, inputs: dict) -> tuple[torch.Tensor, ...]:
    return call(**layer._bind((), inputs), output_attentions=True).attentions


@pytest.mark.parametrize("options", [{}, {"start_layer": 1}, {"start_layer": 1, "frozen_weight": 0.0}], ids=str)
@pytest.mark.parametrize(("name", "tower", "attention"), EAGER)
@torch.no_grad()
def test_maps_have_the_shapes_of_the_base_model(name, tower, attention, options):
    case = CASES[name]
    layer = tower_of(adapt_once(case, attention, **options), tower)
    inputs = tower_inputs(case, tower)
    plain, found = maps(layer._call_base, layer, inputs), maps(layer, layer, inputs)
    assert len(plain) > 1  # every family has them
    assert [x.shape for x in found] == [x.shape for x in plain]
    if options and not layer.spec.in_stages:
        torch.testing.assert_close(found[0], plain[0])  # below the first prompts nothing has changed


@pytest.mark.parametrize(
    ("name", "tower", "prompts"),
    [("clip", "text", [1, 2, 3]), ("clip", "vision", [-2, -1]), ("xclip", "vision", [10, 11])],
)
@torch.no_grad()
def test_maps_are_those_of_the_prompted_pass_without_prompts(name, tower, prompts):
    """Rows then leave out what tokens pay to prompts."""
    case = CASES[name]
    layer = tower_of(adapt(case, "eager", frozen_weight=0.0), tower)
    inputs, whole = tower_inputs(case, tower), []
    attentions = [m for key, m in layer.base_layer.named_modules() if key.endswith("self_attn")]
    hooks = [m.register_forward_hook(lambda module, args, output: whole.append(output[1])) for m in attentions]
    found = maps(layer, layer, inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(whole) == 3
    for kept, full in zip(found, whole, strict=True):
        tokens = torch.ones(full.shape[-1], dtype=torch.bool)
        tokens[prompts] = False
        assert torch.equal(kept, full[:, :, tokens][..., tokens])
        torch.testing.assert_close(full.sum(dim=-1), torch.ones(full.shape[:-1]))
        paid = full[:, :, tokens][..., ~tokens].sum(dim=-1)
        torch.testing.assert_close(kept.sum(dim=-1), 1 - paid)
        assert paid[:, :, -1].min() > 0.01
