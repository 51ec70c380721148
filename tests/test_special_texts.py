"""What towers of special build, most of them for texts, return beside the direction of the mix."""

from __future__ import annotations

import pytest
import torch
from families import CASES
from family_models import adapt, tower_inputs, tower_of

from sep_peft import SEPClassifier
from sep_peft.classifier.class_encoder import padding_of
from sep_peft.method.mix import mix_embeddings
from sep_peft.method.sequence import extend_mask


@pytest.mark.parametrize(
    ("name", "tower"), [("videoprism", "text"), ("videoprism", "vision"), ("videoprism text", "text")]
)
@torch.no_grad()
def test_the_mix_has_unit_length_where_the_pooled_output_has(name, tower):
    case = CASES[name]
    layer = tower_of(adapt(case), tower)
    inputs = tower_inputs(case, tower)
    found, expected = layer(**inputs).pooler_output, mix_embeddings(*layer.embed(**inputs), 0.5)
    assert found.shape == layer._call_base(**inputs).pooler_output.shape  # (3, 1, D) for videos
    torch.testing.assert_close(found.flatten(0, -2), expected)
    layer.base_layer.config.apply_l2norm = False
    assert not torch.allclose(layer(**inputs).pooler_output.flatten(0, -2).norm(dim=-1), torch.ones(3), atol=0.1)


@pytest.mark.parametrize("frozen_weight", [0.0, 0.5])
@pytest.mark.parametrize(("name", "tower"), [("clvp", "text"), ("clvp", "vision"), ("clvp encoder", "text")])
@torch.no_grad()
def test_projected_outputs_belong_to_the_pooled_ones(name, tower, frozen_weight):
    case = CASES[name]
    layer = tower_of(adapt(case, frozen_weight=frozen_weight), tower)
    output = layer(**tower_inputs(case, tower))
    torch.testing.assert_close(output.embeds, layer.base_layer.projection(output.pooler_output))


@torch.no_grad()
def test_rotary_positions_of_prompts_and_tokens():
    """Tokens move up where the prompts join the text, and keep their positions where layers below have read them."""
    case, seen = CASES["clvp encoder"], []
    for start_layer in (0, 1):
        layer = tower_of(adapt(case, start_layer=start_layer, frozen_weight=0.0), "text")
        last = layer._inner[-1].base_layer
        last.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        layer(**case.text([4]))
    assert [kwargs["position_ids"].tolist() for kwargs in seen] == [[[0, 1, 2, 3, 4, 5, 6]], [[0, 1, 2, 0, 1, 2, 3]]]
    assert [kwargs["rotary_pos_emb"].shape[1] for kwargs in seen] == [7, 7]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_causal_masks_take_prompts_before_the_first_token(dtype):
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    expected = torch.ones(6, 6, dtype=torch.bool).tril()
    if dtype != torch.bool:
        lowest = torch.finfo(dtype).min
        visible, expected = torch.where(visible, 0.0, lowest), torch.where(expected, 0.0, lowest)
    assert torch.equal(extend_mask(visible[None, None], 2, 0, causal=True)[0, 0], expected)


@torch.no_grad()
def test_padding_counts_where_it_does_in_the_model_itself():
    """As docs say of SigLIP; a classifier pads its classes to the full length."""
    case = CASES["siglip"]
    model = adapt(case)
    short, long = (case.text([4], total=total, mask=False) for total in (6, 8))
    with model.disable_adapter():
        base = [model.get_text_features(**text).pooler_output for text in (short, long)]
    found = [model.get_text_features(**text).pooler_output for text in (short, long)]
    assert not torch.allclose(*base, atol=1e-2) and not torch.allclose(*found, atol=1e-2)
    assert padding_of(model) == {
        "padding": "max_length",
        "max_length": model.config.text_config.max_position_embeddings,
    }


def test_speech_is_not_classified():
    case = CASES["clvp"]
    with pytest.raises(ValueError) as caught:
        SEPClassifier(adapt(case), case.text([3, 4]))
    assert str(caught.value) == (
        "SEPClassifier classifies images, but ClvpModelForConditionalGeneration has a tower that reads input_ids in "
        "the place of the one that sees."
    )


@pytest.mark.parametrize(("name", "model"), [("xclip", "XCLIPModel"), ("videoprism", "VideoPrismClipModel")])
def test_videos_are_not_classified(name, model):
    case = CASES[name]
    with pytest.raises(ValueError) as caught:
        SEPClassifier(adapt(case), case.text([3, 4]))
    assert str(caught.value) == (
        f"SEPClassifier classifies images, but {model} sees videos, of several frames each. Train its adapter with the "
        "model's own loss."
    )
