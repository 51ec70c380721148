"""Models of the families' cases with SEP, their inputs, and what they return."""

from __future__ import annotations

import pytest
import torch
from copies import made_once
from families import CASES, Case
from peft import PeftModel, get_peft_model
from small_clip import perturb

from sep_peft import SEPConfig


TOWERS = [
    pytest.param(name, tower, attention, id=f"{name}-{tower}-{attention}")
    for name, case in CASES.items()
    for tower in case.towers
    for attention in case.attentions
]
READING = [(name, tower) for name, case in CASES.items() for tower in case.towers if case.words(tower)]
FIRST = [pytest.param(name, id=name) for name in CASES]
PROMPTS = {"num_text_prompts": 3, "num_vision_prompts": 2}


_ADAPTED: dict[tuple, tuple[Case, PeftModel]] = {}


def adapt(case: Case, attention: str | None = None, perturbed: bool = True, **options) -> PeftModel:
    """A model of its own for who asks."""
    attention = attention or case.attentions[-1]
    if options or not perturbed:
        return _adapt(case, attention, perturbed, **options)
    return _adapt_usual(case, attention)


def adapt_once(case: Case, attention: str | None = None, **options) -> PeftModel:
    """A model of a case, the same object for all who ask for these options; nobody may change it."""
    key = id(case), attention or case.attentions[-1], *sorted(options.items())
    if key not in _ADAPTED:
        _ADAPTED[key] = case, adapt(case, attention, **options)  # the case too, so that no other gets its identity
    return _ADAPTED[key][1]


@made_once
def _adapt_usual(case: Case, attention: str) -> PeftModel:
    return _adapt(case, attention)


def _adapt(case: Case, attention: str | None, perturbed: bool = True, **options) -> PeftModel:
    model = get_peft_model(case.build(attention), SEPConfig.published(**(PROMPTS | case.options | options)))
    if perturbed:
        perturb(model)
    return model.eval()


def tower_inputs(case: Case, tower: str, count: int = 3, **text) -> dict[str, torch.Tensor]:
    words = case.words(tower)
    return case.image(count) if words is None else words([5, 4, 7][:count], **text)


def one_input(case: Case, tower: str) -> dict[str, torch.Tensor]:
    """Of one input, of which all frames are alike where it has several, since prompts are the same in each."""
    if tower == "vision" and case.one_image is not None:
        return case.one_image()
    return tower_inputs(case, tower, count=1)


def tower_of(model: PeftModel, tower: str):
    return model.base_model.towers[tower]


def find_features(model: PeftModel, case: Case, tower: str) -> list[torch.Tensor]:
    """Embeddings (3, E) of a tower wherever the model returns them."""
    if tower not in case.towers:
        return []
    inputs = tower_inputs(case, tower)
    found = []
    getters = ["get_text_features"] if tower == "text" else ["get_image_features"]
    if tower == "vision" and case.features is None:  # X-CLIP's relate frames to each other first
        getters.append("get_video_features")
    for getter in filter(None, (getattr(model.get_base_model(), name, None) for name in getters)):
        output = getter(**inputs)
        features = output.get("embeds", output.pooler_output)
        found.append(features if features.ndim == 2 else features[:, 0])  # FLAVA projects every token
    output = model(**case.inputs())
    if case.features is not None:
        return [*found, case.features(model.get_base_model(), output, tower)]
    for key in ("text_embeds",) if tower == "text" else ("image_embeds",):
        if output.get(key) is not None:
            found.append(output[key])
    if not found and output.get("pooler_output") is not None:
        found.append(output.get("embeds", output.pooler_output))  # a model that is a tower
    if not found:  # what a classification head gets
        with model.get_base_model().classifier.register_forward_pre_hook(lambda _, args: found.append(args[0])):
            model(**case.inputs())
    return found
