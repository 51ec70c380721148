"""Towers whose layers come in stages, between which tokens are grouped (GroupViT's images)."""

from __future__ import annotations

import pytest
import torch
from families import CASES
from family_models import adapt, tower_of

from sep_peft.tuner import passes


CASE = CASES["groupvit"]


@pytest.mark.parametrize("start_layer", range(5))
@torch.no_grad()
def test_layers_shared_with_the_frozen_pass_give_what_running_them_gives(start_layer):
    images = CASE.image(3)
    options = {"start_layer": start_layer, "num_text_prompts": 0}
    shared = tower_of(adapt(CASE, **options), "vision")
    alone = tower_of(adapt(CASE, frozen_weight=0.0, **options), "vision")
    branches = shared.embed(**images)
    torch.testing.assert_close(branches.prompted, alone.embed_prompted(**images))
    assert not torch.allclose(branches.prompted, branches.frozen, atol=1e-3)
    record = {"output_hidden_states": True, "output_attentions": True}
    first, second = shared(**images, **record), alone(**images, **record)
    for name in ("hidden_states", "attentions"):
        assert len(first[name]) == len(second[name])
        for one, other in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(one, other)


@torch.no_grad()
def test_prompts_are_carried_from_stage_to_stage(monkeypatch):
    """What is taken out after a stage enters the next one, and each stage groups without prompts."""
    entered, lengths, left = [], [], []
    insert, split = passes.insert_prompts, passes.split_prompts

    def spy_insert(hidden, prompts, prompt_index):
        entered.append(prompts)
        lengths.append(hidden.shape[1])
        return insert(hidden, prompts, prompt_index)

    def spy_split(*args):
        left.append(split(*args))
        return left[-1]

    monkeypatch.setattr(passes, "insert_prompts", spy_insert)
    monkeypatch.setattr(passes, "split_prompts", spy_split)
    tower_of(adapt(CASE, fusion="none", frozen_weight=0.0), "vision").embed_prompted(**CASE.image(1))
    assert lengths == [9 + 4, 4 + 3, 3]  # patches and group tokens, groups and group tokens, groups
    assert entered[1] is left[0][1] and entered[2] is left[1][1]


def test_no_more_prompts_than_groups():
    with pytest.raises(ValueError, match="num_vision_prompts must be at most 3"):
        adapt(CASE, num_vision_prompts=4)


@torch.no_grad()
def test_segmentation_runs_with_prompts():
    model = adapt(CASE)
    output = model(**CASE.inputs(), output_segmentation=True)
    assert output.segmentation_logits.shape == (3, 3, 24, 24)
