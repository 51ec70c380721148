"""Models whose towers have no place for prompts are refused before anything in them changes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import BERT_WORDS, CASES, images, text_size, vision_size
from peft import get_peft_model

from sep_peft import SEPConfig
from sep_peft.families.table import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION
from sep_peft.method.mix import mix_embeddings, unit


CONVOLUTIONAL = (
    "num_vision_prompts must be 0 for this model, because its vision tower is convolutional and has no sequence of "
    "tokens that prompts could join."
)
WINDOWED = (
    "num_vision_prompts must be 0 for this model, because its {} tower folds its tokens into a grid, where prompts "
    "have no place."
)
BIASED = (
    "num_vision_prompts must be 0 for this model, because its relative position bias is a table of patches by patches, "
    "where prompts have no place."
)
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
REFUSED = {
    "convnext": (lambda: hf.ConvNextConfig(**STAGES), CONVOLUTIONAL),
    "convnextv2": (lambda: hf.ConvNextV2Config(**STAGES), CONVOLUTIONAL),
    "dinov3_convnext": (lambda: hf.DINOv3ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1]), CONVOLUTIONAL),
    "resnet": (
        lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        CONVOLUTIONAL,
    ),
    "swin": (lambda: hf.SwinConfig(**SWIN), WINDOWED.format("vision")),
    "swinv2": (lambda: hf.Swinv2Config(**SWIN), WINDOWED.format("vision")),
    "pvt": (
        lambda: hf.PvtConfig(
            image_size=32,
            num_encoder_blocks=2,
            depths=[1, 1],
            sequence_reduction_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[4, 2],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        WINDOWED.format("vision"),
    ),
    "beit with a bias per layer": (
        lambda: hf.BeitConfig(**vision_size(use_relative_position_bias=True)),
        BIASED,
    ),
    "beit with a shared bias": (
        lambda: hf.BeitConfig(**vision_size(use_shared_relative_position_bias=True)),
        BIASED,
    ),
}


def dual_encoder(vision: hf.PretrainedConfig, text: hf.PretrainedConfig | None = None) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    text = text or hf.BertConfig(**text_size(pad_token_id=0))
    if not hasattr(vision, "hidden_size"):  # which the model reads
        vision.hidden_size = vision.hidden_sizes[-1]
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=20)
    return hf.VisionTextDualEncoderModel(config).eval()


def assert_refused(model: hf.PreTrainedModel, message: str, **options) -> None:
    """The whole message, and a model as it was."""

    def state() -> list:
        modules = [(name, id(module)) for name, module in model.named_modules()]
        return modules + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    before = state()
    with pytest.raises(ValueError) as error:
        get_peft_model(model, SEPConfig.published(**options))
    assert str(error.value) == message
    assert state() == before


@pytest.mark.parametrize("name", REFUSED)
def test_dual_encoders_with_other_image_towers(name):
    config, message = REFUSED[name]
    assert_refused(dual_encoder(config()), message)


@pytest.mark.parametrize(("name", "message"), [("align", CONVOLUTIONAL), ("clap", WINDOWED.format("audio"))])
def test_families_with_one_tower_for_prompts(name, message):
    assert_refused(CASES[name].build(), message)


@torch.no_grad()
def test_the_other_tower_still_takes_prompts():
    """Without image prompts the text tower of a refused combination is prompted, and the image tower left alone."""
    model = dual_encoder(REFUSED["resnet"][0]())
    inputs = BERT_WORDS([5, 4]) | images(32)(2)
    model.vision_model.pooler = torch.nn.Sequential(model.vision_model.pooler, torch.nn.Flatten())
    before = model(**inputs)
    adapted = get_peft_model(model, SEPConfig.published(num_vision_prompts=0)).eval()
    after = adapted(**inputs)
    assert list(adapted.base_model.towers) == ["text"]
    assert torch.equal(after.image_embeds, before.image_embeds)
    assert not torch.equal(after.text_embeds, before.text_embeds)


HEADLESS = (
    "num_vision_prompts must be 0 for this model, because without its pooling head ({}=False) its vision tower has no "
    "pooled output of both branches to mix."
)


def headless(name: str, option: str) -> hf.PreTrainedModel:
    config = CASES[name].config()
    setattr(config if name.endswith(("vision", "alone")) else config.vision_config, option, False)
    return CASES[name].model._from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("siglip", "vision_use_head"),
        ("siglip vision", "vision_use_head"),
        ("siglip2", "vision_use_head"),
        ("siglip2 vision", "vision_use_head"),
        ("bert and siglip", "vision_use_head"),
        ("aimv2", "use_head"),
        ("aimv2 vision alone", "use_head"),
    ],
)
def test_image_towers_without_their_head(name, option):
    assert_refused(headless(name, option), HEADLESS.format(option))


@pytest.mark.parametrize("name", ["siglip image classification", "siglip2 image classification"])
@torch.no_grad()
def test_classification_does_without_the_head(name):
    """It takes the mean of all patches."""
    model = headless(name, "vision_use_head")
    before = model(**CASES[name].image(3)).logits
    adapted = get_peft_model(model, SEPConfig.published(num_vision_prompts=2)).eval()
    after = adapted(**CASES[name].image(3)).logits
    layer = adapted.base_model.towers["vision"]
    mix = mix_embeddings(*layer.embed(**CASES[name].image(3)), 0.5)
    seen = []
    with model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        assert torch.equal(adapted(**CASES[name].image(3)).logits, after)
    assert not torch.equal(after, before)
    torch.testing.assert_close(unit(seen[0]), mix, rtol=1e-4, atol=2e-5)


def test_a_model_type_without_a_row():
    known = ", ".join(sorted([*ARCHITECTURES, "vision-text-dual-encoder"]))
    model = hf.ViTModel(hf.ViTConfig(**vision_size()))
    own = "Describe your own with SEPConfig(architecture=sep_peft.Architecture(...))."
    assert_refused(model, f"SEP does not know the towers of ViTModel (model type 'vit'); it knows {known}. {own}")


def test_a_tower_without_a_row():
    start = "SEP does not know a tower of model type {!r} inside a VisionTextDualEncoderModel; it knows {}."
    vit = hf.ViTConfig(**vision_size())
    known = ", ".join(sorted(DUAL_ENCODER_TEXT))
    assert_refused(dual_encoder(vit, hf.ElectraConfig(**text_size())), start.format("electra", known))
    known = ", ".join(sorted(name for name, row in DUAL_ENCODER_VISION.items() if row.refused is None))
    assert_refused(dual_encoder(hf.ViTMAEConfig(**vision_size())), start.format("vit_mae", known))
