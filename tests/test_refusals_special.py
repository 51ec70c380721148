"""Towers of special build that take no prompts say why, before the model is touched."""

from __future__ import annotations

import pytest
import transformers as hf
from families import text_size, vision_size
from peft import get_peft_model

from sep_peft import SEPConfig


def blip_2(model_class: type) -> hf.PreTrainedModel:
    config = hf.Blip2Config(
        vision_config=vision_size(),
        qformer_config=text_size(encoder_hidden_size=32, cross_attention_frequency=1),
        text_config={"model_type": "opt", "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 1, "vocab_size": 60}
        | {"num_attention_heads": 2, "word_embed_proj_dim": 32},
        num_query_tokens=4,
        image_text_hidden_size=20,
    )
    return model_class(config)


QFORMER = (
    "num_text_prompts must be 0 for this model, because texts go through the Q-Former, whose layers also read the "
    "image tower and its query tokens."
)
BEHIND_QFORMER = (
    "num_vision_prompts must be 0 for this model, because the Q-Former stands between the image tower and the joint "
    "space and makes one embedding per query token, so there is no pooled output of both branches to mix."
)
REFUSED = [
    pytest.param(lambda: blip_2(hf.Blip2ForImageTextRetrieval), {"num_vision_prompts": 0}, QFORMER, id="blip-2 text"),
    pytest.param(
        lambda: blip_2(hf.Blip2ForImageTextRetrieval), {"num_text_prompts": 0}, BEHIND_QFORMER, id="blip-2 vision"
    ),
    pytest.param(lambda: blip_2(hf.Blip2Model), {"num_text_prompts": 0}, BEHIND_QFORMER, id="blip-2 with LLM"),
]


@pytest.mark.parametrize(("build", "options", "message"), REFUSED)
def test_refused_towers_say_why_and_stay_as_they_were(build, options, message):
    model = build()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, SEPConfig(**options))
    assert str(caught.value) == message
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
