"""Every family of transformers in its own default size, on the meta device, where weights take no memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from small_classifier import raises
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from sep_peft import SEPConfig
from sep_peft.families.find import find_architecture
from sep_peft.families.table import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION
from sep_peft.tuner.model import find_towers
from sep_peft.tuner.passes import PromptedPass
from sep_peft.tuner.tower import SEPTower


PROMPTS = {"text": 6, "vision": 4}
RANK, MLP = 4, 16
#: Towers whose own code asks for the values of a mask, which meta does not have.
ASKS_FOR_VALUES = {("align", "text"), ("clap", "text"), ("blip-2", "vision")}

#: Towers that stand in many dual encoders; those of one of them embed.
EMBEDDED_ELSEWHERE = {(f"bert and {vision}", "text") for vision in DUAL_ENCODER_VISION if vision != "vit"}
EMBEDDED_ELSEWHERE |= {(f"{text} and vit", "vision") for text in DUAL_ENCODER_TEXT if text != "bert"}


def _default_models() -> dict[str, Callable[[], torch.nn.Module]]:
    """Name of a table's entry -> makes the model."""
    found: dict[str, Callable] = {}
    for model_type, architecture in ARCHITECTURES.items():
        config = CONFIG_MAPPING[model_type]
        modeling = importlib.import_module(config.__module__.replace("configuration", "modeling"))
        stem = config.__name__.removesuffix("Config")
        usual = MODEL_MAPPING[config] if config in MODEL_MAPPING else getattr(modeling, f"{stem}Model", None)
        found[model_type] = partial(_default_model, usual or getattr(modeling, stem))
        found |= {name: partial(_default_model, getattr(modeling, name)) for name in architecture.variants}
    for text, vision in [(text, "vit") for text in DUAL_ENCODER_TEXT] + [("bert", v) for v in DUAL_ENCODER_VISION]:
        found[f"{text} and {vision}"] = partial(_dual_encoder, text, vision)
    return found


def _default_model(kind: type) -> torch.nn.Module:
    return kind(kind.config_class())


def _dual_encoder(text: str, vision: str) -> torch.nn.Module:
    seeing = CONFIG_MAPPING[vision]()
    if not hasattr(seeing, "hidden_size"):  # which transformers asks for, and convolutions have one a stage
        seeing.hidden_size = seeing.hidden_sizes[-1]
    return hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig.from_vision_text_configs(seeing, CONFIG_MAPPING[text]())
    )


MODELS = _default_models()


@pytest.mark.parametrize("name", MODELS)
def test_families_in_their_default_size(name, monkeypatch):
    with torch.device("meta"):
        base = MODELS[name]()
    specs = find_architecture(base).towers
    refused = {modality for modality, spec in specs.items() if spec.refused is not None}
    for modality in refused:
        others = {f"num_{other}_prompts": 0 for other in PROMPTS if other != modality}
        with raises(f"num_{modality}_prompts must be 0 for this model, because {specs[modality].refused}."):
            get_peft_model(base, SEPConfig(**others))
    if refused == set(specs):
        return
    plain = base.num_parameters()
    options = {f"num_{modality}_prompts": 0 for modality in refused}
    model = get_peft_model(base, SEPConfig.compact(**options)).eval()
    towers = find_towers(model)
    sizes = {m: sizes_of(tower.base_layer.config) for m, tower in towers.items() if m not in refused}
    for modality, (width, layers) in sizes.items():
        assert towers[modality].sep_prompts["default"].shape == (PROMPTS[modality], width)
        assert towers[modality].sep_settings["default"].fusion_layers == tuple(range(1, layers))
    trained = sum(PROMPTS[modality] * width + fusion_size(width) for modality, (width, _) in sizes.items())
    assert model.get_nb_trainable_parameters() == (trained, plain + trained)
    assert all(parameter.is_meta for parameter in model.parameters())
    pass_by_middle_layers(monkeypatch)
    for modality in sizes if len(specs) == 2 else ():
        if specs[modality].projection is not None and (name, modality) not in ASKS_FOR_VALUES | EMBEDDED_ELSEWHERE:
            assert_embeds(towers[modality])


def sizes_of(config: Any) -> tuple[int, int]:
    """Width and layers of a tower, as families call them."""
    if hasattr(config, "depths"):
        return config.hidden_size, sum(config.depths)
    return config.hidden_size, getattr(config, "num_spatial_layers", None) or config.num_hidden_layers


def fusion_size(width: int) -> int:
    """Numbers in one fusion: two norms, four projections of low rank with a bias, an MLP without one, two scales."""
    return 2 * 2 * width + 4 * (2 * RANK * width + width) + 2 * MLP * width + 2


def pass_by_middle_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the second layer and the last, of the same class and size, hand on what the second has returned.

    On the meta device a layer takes as long as with numbers.
    """
    run_layer, returned = PromptedPass.run_layer, []

    def run(self, layer, hidden, args, kwargs):
        if len(self.last_layers) > 1 or not 1 < layer.index < self.last_layers[0]:
            returned.append(run_layer(self, layer, hidden, args, kwargs))
        return returned[-1]

    monkeypatch.setattr(PromptedPass, "run_layer", run)


@torch.no_grad()
def assert_embeds(tower: SEPTower) -> None:
    """The prompted pass runs, and ends where the model compares texts with images."""
    embeds = tower.embed_prompted(**inputs_of(tower))
    linears = [module for module in tower.head.projection.modules() if isinstance(module, torch.nn.Linear)]
    assert embeds.is_meta and embeds.shape[-1] == linears[-1].out_features


def inputs_of(tower: SEPTower) -> dict[str, torch.Tensor]:
    """Texts without padding, or images of the configured size; eight of them, which are one video where frames meet."""
    if tower.spec.inputs == "input_ids":
        return {"input_ids": torch.ones(8, 7, dtype=torch.long, device="meta")}
    size = tower.base_layer.config.image_size
    return {"pixel_values": torch.ones(8, 3, size, size, device="meta")}
