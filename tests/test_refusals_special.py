"""Towers of special build that take no prompts say why, before the model is touched."""

from __future__ import annotations

import pytest
import transformers as hf
from families import blip_2_config
from peft import get_peft_model

from sep_peft import SEPConfig


QFORMER = (
    "num_text_prompts must be 0 for this model, because texts go through the Q-Former, whose layers also read the "
    "image tower and its query tokens."
)
GENERATION = (
    "num_{}_prompts must be 0 for this model, because a language model reads texts and what the Q-Former makes of "
    "images, and no joint space is there."
)
REFUSED = [
    pytest.param(hf.Blip2ForImageTextRetrieval, {}, QFORMER, id="retrieval, text"),
    *[
        pytest.param(model, {f"num_{other}_prompts": 0}, GENERATION.format(tower), id=f"{model.__name__}, {tower}")
        for model in (hf.Blip2Model, hf.Blip2ForConditionalGeneration)
        for tower, other in (("text", "vision"), ("vision", "text"))
    ],
]


@pytest.mark.parametrize(("model_class", "options", "message"), REFUSED)
def test_refused_towers_say_why_and_stay_as_they_were(model_class, options, message):
    model = model_class(blip_2_config())
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, SEPConfig.published(**options))
    assert str(caught.value) == message
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
