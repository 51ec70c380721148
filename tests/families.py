"""One tiny model per family: the table that drives `test_families.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from transformers.models.clvp.modeling_clvp import ClvpEncoder


WIDTH, LAYERS, VOCABULARY = 32, 3, 60
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A family's tiny model.

    Attributes:
        config: makes the configuration.
        model: class of the model.
        text: makes the inputs of the text tower for texts of given lengths, padded to `total`; None without text tower.
        image: makes the inputs of the image tower for a number of images; None without image tower.
        attentions: attention implementations that the family has, the usual one last.
        shifts: prompts of the text tower move positions; elsewhere longer native texts are given their positions.
        masks: the image tower's layers take an attention mask.
        compiled: whether `torch.compile(fullgraph=True)` is tested.
        options: of the adapter.
        whole: makes the inputs of the whole model for three texts and images; None where they are those of its towers.
        causal_without_mask: where no mask reaches the layers of a causal text tower, attention is causal all the same.
        pools_all: the text tower pools all its tokens, so states of a longer native text are compared, not its pooling.
        copied_at: first layer of the image tower behind which the tokens stay the same ones.
    """

    config: Callable[[], hf.PretrainedConfig]
    model: type
    text: Callable[..., Inputs] | None = None
    image: Callable[[int], Inputs] | None = None
    attentions: tuple[str, ...] = ("eager", "sdpa")
    shifts: bool = True
    compiled: bool = False
    options: dict = field(default_factory=dict)
    whole: Callable[[], dict] | None = None
    copied_at: int = 1
    causal_without_mask: bool = True
    pools_all: bool = False

    def build(self, attention: str | None = None) -> torch.nn.Module:
        """The model with seeded weights, norms and biases away from zero and one."""
        torch.manual_seed(0)
        config = self.config()
        model = self.model._from_config(config, attn_implementation=attention or self.attentions[-1]).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    def inputs(self) -> dict:
        """Inputs of the whole model, for three texts and images."""
        if self.whole is not None:
            return self.whole()
        return (self.text([5, 4, 7]) if self.text else {}) | (self.image(3) if self.image else {})


def words(bos: int | None, eos: int | None, pad: int) -> Callable[..., Inputs]:
    """Texts with the special tokens of a family; `mask` False leaves the attention mask out."""

    def make(
        lengths: list[int], total: int | None = None, mask: bool = True, left: bool = False, seed: int = 3
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        total = total or max(lengths)
        input_ids, attention_mask = torch.full((len(lengths), total), pad), torch.zeros(len(lengths), total).long()
        for row, length in enumerate(lengths):
            ids = torch.randint(5, 50, (length,), generator=generator)
            if bos is not None:
                ids[0] = bos
            if eos is not None:
                ids[-1] = eos
            part = slice(total - length, total) if left else slice(0, length)
            input_ids[row, part], attention_mask[row, part] = ids, 1
        return {"input_ids": input_ids, "attention_mask": attention_mask} if mask else {"input_ids": input_ids}

    return make


def pictures(size: int = 24) -> Callable[[int], Inputs]:
    """Random pictures (count, 3, size, size)."""

    def make(count: int, seed: int = 4) -> Inputs:
        return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))}

    return make


def text_size(**changes) -> dict:
    """Sizes of a text tower, in the names that most configurations have."""
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 24,
        "bos_token_id": 57,
        "eos_token_id": 58,
        "pad_token_id": 1,
        "projection_dim": 20,
    }
    return size | changes


def vision_size(**changes) -> dict:
    """Sizes of an image tower, in the names that most configurations have."""
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "projection_dim": 20,
    }
    return size | changes


def groupvit_vision_size() -> dict:
    """Sizes of a GroupViT image tower with three stages: one more hidden state than these."""
    return vision_size(num_hidden_layers=5, depths=[1, 2, 2], num_group_tokens=[4, 3, 0], num_output_groups=[4, 3, 3])


def clvp_config() -> hf.ClvpConfig:
    """A CLVP whose encoders have the sizes of the other text towers."""
    encoder = text_size(eos_token_id=0, pad_token_id=None, num_attention_heads=1)  # rotary on at least 32 channels
    del encoder["max_position_embeddings"]
    return hf.ClvpConfig(
        text_config=encoder,
        speech_config=encoder,
        decoder_config={
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 40,
            "max_text_tokens": 40,
            "hidden_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_attn_blocks": 1,
            "feature_size": 8,
            "bos_token_id": 57,
            "eos_token_id": 58,
            "decoder_fixing_codes": [3, 4, 4, 5],
        },
    )


def videoprism_vision_size() -> dict:
    """Sizes of a VideoPrism video tower."""
    size = vision_size(image_size=16, num_frames=2, tubelet_size=[1, 8, 8], num_spatial_layers=1)
    for name in ("num_hidden_layers", "patch_size", "projection_dim"):
        del size[name]
    return size | {"num_temporal_layers": 1, "num_auxiliary_layers": 1}


CLIP_WORDS = words(bos=57, eos=58, pad=1)

CASES: dict[str, Case] = {
    "clip": Case(
        config=lambda: hf.CLIPConfig(text_config=text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.CLIPModel,
        text=CLIP_WORDS,
        image=pictures(),
        compiled=True,
    ),
    "clip text with projection": Case(
        config=lambda: hf.CLIPTextConfig(**text_size()), model=hf.CLIPTextModelWithProjection, text=CLIP_WORDS
    ),
    "clip vision with projection": Case(
        config=lambda: hf.CLIPVisionConfig(**vision_size()), model=hf.CLIPVisionModelWithProjection, image=pictures()
    ),
    "clip text": Case(config=lambda: hf.CLIPTextConfig(**text_size()), model=hf.CLIPTextModel, text=CLIP_WORDS),
    "clip vision": Case(
        config=lambda: hf.CLIPVisionConfig(**vision_size()), model=hf.CLIPVisionModel, image=pictures()
    ),
    "clip image classification": Case(
        config=lambda: hf.CLIPConfig(
            text_config=text_size(), vision_config=vision_size(), projection_dim=20, num_labels=3
        ),
        model=hf.CLIPForImageClassification,
        image=pictures(),
    ),
    "siglip": Case(
        config=lambda: hf.SiglipConfig(text_config=text_size(projection_size=WIDTH), vision_config=vision_size()),
        model=hf.SiglipModel,
        text=words(bos=None, eos=58, pad=1),
        image=pictures(),
        shifts=False,
        compiled=True,
    ),
    "bert and vit": Case(
        config=lambda: hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**vision_size()), hf.BertConfig(**text_size()), projection_dim=20
        ),
        model=hf.VisionTextDualEncoderModel,
        text=words(bos=2, eos=3, pad=0),
        image=pictures(),
    ),
    "groupvit": Case(
        config=lambda: hf.GroupViTConfig(
            text_config=text_size(),
            vision_config=groupvit_vision_size(),
            projection_dim=20,
            projection_intermediate_dim=24,
        ),
        model=hf.GroupViTModel,
        text=CLIP_WORDS,
        image=pictures(),
        attentions=("eager",),
        copied_at=3,  # copies of the tokens of one stage are no copies in the next one
    ),
    "groupvit text": Case(
        config=lambda: hf.GroupViTTextConfig(**text_size()),
        model=hf.GroupViTTextModel,
        text=CLIP_WORDS,
        attentions=("eager",),
    ),
    "groupvit vision": Case(
        config=lambda: hf.GroupViTVisionConfig(**groupvit_vision_size()),
        model=hf.GroupViTVisionModel,
        image=pictures(),
        attentions=("eager",),
        copied_at=3,
    ),
    "clvp": Case(
        config=clvp_config,
        model=hf.ClvpModelForConditionalGeneration,
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        pools_all=True,
        options={"num_vision_prompts": 0},
        whole=lambda: (
            words(bos=None, eos=None, pad=0)([5, 4, 7])
            | {"input_features": torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(5))}
        ),
    ),
    "clvp encoder": Case(
        config=lambda: clvp_config().text_config,
        model=ClvpEncoder,
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        pools_all=True,
    ),
    "videoprism": Case(
        config=lambda: hf.VideoPrismConfig(text_config=text_size(), vision_config=videoprism_vision_size()),
        model=hf.VideoPrismClipModel,
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        shifts=False,  # padded to all 64 positions
        causal_without_mask=False,
        options={"num_vision_prompts": 0},
        whole=lambda: (
            words(bos=None, eos=None, pad=0)([5, 4, 7])
            | {"pixel_values_videos": torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}
        ),
    ),
    "videoprism text": Case(
        config=lambda: hf.VideoPrismTextConfig(**text_size()),
        model=hf.VideoPrismTextModel,
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        shifts=False,
        causal_without_mask=False,
    ),
}
