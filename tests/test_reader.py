"""BLIP-2: both branches of the image tower pass the Q-Former alone and are mixed after it, query by query."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from families import BERT_WORDS, CASES, images
from family_models import adapt, tower_of
from peft import PeftModel, get_peft_model

from sep_peft import SEPConfig
from sep_peft.families import table as families
from sep_peft.method.mix import frozen_share, mix_embeddings
from sep_peft.tuner.wrappers import SEPReader


CASE = CASES["blip_2 retrieval"]
INPUTS = BERT_WORDS([5, 4, 7]) | images()(3)


def read_by_hand(matching: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the Q-Former returns for the prompted and for the frozen branch, (3, Q or Q + L, 24)."""
    model, seen = adapt(CASE, frozen_weight=0.0), []
    reader = model.get_base_model().qformer
    with reader.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state)):
        model(**INPUTS, use_image_text_matching_head=matching)
        prompted = seen[0]
        seen.clear()
        with model.disable_adapter():
            model(**INPUTS, use_image_text_matching_head=matching)
    return prompted, seen[0]


@pytest.mark.parametrize("frozen_weight", [0.3, 0.5])
@torch.no_grad()
def test_similarities_are_those_of_mixed_queries(frozen_weight):
    model = adapt(CASE, frozen_weight=frozen_weight)
    base = model.get_base_model()
    output = model(**INPUTS)
    branches = [base.vision_projection(read) for read in read_by_hand(matching=False)]
    expected = mix_embeddings(*branches, frozen_weight)
    assert expected.shape == (3, 4, 20)
    torch.testing.assert_close(output.image_embeds, expected, rtol=1e-4, atol=2e-5)
    best = (expected @ output.text_embeds.T).max(dim=1).values
    torch.testing.assert_close(output.logits_per_image, best, rtol=1e-4, atol=2e-5)
    with model.disable_adapter():
        assert torch.equal(model(**INPUTS).text_embeds, output.text_embeds)  # no image, no mix
    as_tuple = model(**INPUTS, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits_per_image)


@torch.no_grad()
def test_matching_head_sees_the_mix_of_both_branches():
    model = adapt(CASE)
    base = model.get_base_model()
    prompted, frozen = read_by_hand(matching=True)
    share = frozen_share(*(base.vision_projection(read) for read in (prompted, frozen)), 0.5)
    mixed = share * frozen + (1 - share) * prompted
    found = model(**INPUTS, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(found, base.itm_head(mixed[:, :4]).mean(dim=1), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found, base.itm_head(prompted[:, :4]).mean(dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_of_both_branches_go_to_the_reader_side_by_side():
    model = adapt(CASE)
    found = tower_of(model, "vision")(**images()(3)).last_hidden_state
    prompted = adapt(CASE, frozen_weight=0.0)(**INPUTS).vision_model_output.last_hidden_state
    with model.disable_adapter():
        frozen = model(**INPUTS).vision_model_output.last_hidden_state
    assert prompted.shape == frozen.shape == (3, 10, 32)
    torch.testing.assert_close(found, torch.cat([prompted, frozen], dim=-1))


@torch.no_grad()
def test_a_copy_of_the_model_mixes_by_its_own_tower():
    model = adapt(CASE)
    expected = model(**INPUTS).image_embeds
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**INPUTS).image_embeds, expected)
        tower, reader = tower_of(other, "vision"), other.get_base_model().qformer
        assert reader._mix.method.__self__ is tower
        settings = tower.sep_settings["default"]
        tower.sep_settings["default"] = dataclasses.replace(settings, frozen_weight=0.9)
        assert not torch.allclose(other(**INPUTS).image_embeds, expected, atol=1e-3)
        assert torch.equal(model(**INPUTS).image_embeds, expected)


@torch.no_grad()
def test_the_reader_may_be_trained(tmp_path):
    """It stays one of the model's own modules to PEFT, mixes by the model's tower, and is unwrapped with the rest."""
    keys = list(CASE.build().state_dict())
    model = adapt(CASE, modules_to_save=["qformer"])
    tower, trained = tower_of(model, "vision"), model.get_base_model().qformer.modules_to_save["default"]
    assert isinstance(trained, SEPReader) and trained._mix.method.__self__ is tower
    before = model(**INPUTS).image_embeds
    trained.layernorm.weight += 0.3
    changed = model(**INPUTS).image_embeds
    assert not torch.allclose(changed, before, atol=1e-3)
    expected = mix_embeddings(*tower.embed(**images()(3)), 0.5)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=2e-5)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(CASE.build(), tmp_path)
    assert torch.equal(fresh(**INPUTS).image_embeds, changed)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == keys
    assert unloaded.qformer is trained.base_layer


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "reader",
            "The spec of the vision tower names {} as reader, but Blip2ForImageTextRetrieval has no such module.",
        ),
        (
            "queries",
            "The spec of the vision tower names {} as queries, but Blip2ForImageTextRetrieval has no such parameter.",
        ),
    ],
)
def test_paths_that_do_not_exist_are_named(field, message):
    row = families.ARCHITECTURES["blip-2"]
    row = dataclasses.replace(row, vision=dataclasses.replace(row.vision, **{field: "nowhere"}))
    with pytest.raises(ValueError, match=f"^{re.escape(message.format('nowhere'))}$"):
        get_peft_model(CASE.build(), SEPConfig.published(num_text_prompts=0, architecture=row))
