"""One tiny model per family: the table that drives `test_families.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf


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
        attentions: attention implementations that the family has; the last one runs the tests of the whole model.
        shifts: prompts of the text tower move positions; elsewhere longer native texts are given their positions.
        masks: the image tower's layers take an attention mask.
        compiled: whether `torch.compile(fullgraph=True)` is tested.
        options: of the configuration of SEP.
        left: texts are padded on the left as well.
        more_images: further kinds of inputs of the image tower.
        causal_without_mask: where no mask reaches the layers of a causal text tower, attention is causal all the same.
        pools_all: the text tower pools all its tokens, so states of a longer native text are compared, not its pooling.
    """

    config: Callable[[], hf.PretrainedConfig]
    model: type
    text: Callable[..., Inputs] | None = None
    image: Callable[[int], Inputs] | None = None
    attentions: tuple[str, ...] = ("eager", "sdpa")
    shifts: bool = True
    compiled: bool = False
    options: dict = field(default_factory=dict)
    left: bool = False
    more_images: tuple[Callable[[int], Inputs], ...] = ()
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


def patches(shapes: list[tuple[int, int]], total: int, mask: bool = True) -> Callable[[int], Inputs]:
    """Pictures as `total` patches of 8 x 8, of which height times width are real; `mask` False leaves the mask out."""

    def make(count: int, seed: int = 4) -> Inputs:
        sizes = torch.tensor(shapes[:count])
        generator = torch.Generator().manual_seed(seed)
        real = torch.arange(total) < sizes.prod(dim=1)[:, None]  # (B, L)
        return {
            "pixel_values": torch.randn(len(sizes), total, 3 * 8 * 8, generator=generator) * real[..., None],
            "pixel_attention_mask": real.long() if mask else None,
            "spatial_shapes": sizes,
        }

    return make


PADDED_PATCHES = patches([(2, 4), (3, 3), (1, 5)], total=11)
FULL_PATCHES = patches([(2, 4), (4, 2), (1, 8)], total=8)
UNMASKED_PATCHES = patches([(2, 4), (4, 2), (1, 8)], total=8, mask=False)


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
    "siglip text": Case(
        config=lambda: hf.SiglipTextConfig(**text_size(projection_size=20)),
        model=hf.SiglipTextModel,
        text=words(bos=None, eos=58, pad=1),
        shifts=False,
    ),
    "siglip vision": Case(
        config=lambda: hf.SiglipVisionConfig(**vision_size()), model=hf.SiglipVisionModel, image=pictures()
    ),
    "siglip image classification": Case(
        config=lambda: hf.SiglipConfig(text_config=text_size(), vision_config=vision_size(), num_labels=3),
        model=hf.SiglipForImageClassification,
        image=pictures(),
    ),
    "siglip2": Case(
        config=lambda: hf.Siglip2Config(
            text_config=text_size(projection_size=WIDTH), vision_config=vision_size(num_patches=16)
        ),
        model=hf.Siglip2Model,
        text=words(bos=None, eos=58, pad=0),
        image=PADDED_PATCHES,
        shifts=False,
        compiled=True,
        left=True,
        more_images=(FULL_PATCHES, UNMASKED_PATCHES),
    ),
    "siglip2 text": Case(
        config=lambda: hf.Siglip2TextConfig(**text_size(projection_size=20)),
        model=hf.Siglip2TextModel,
        text=words(bos=None, eos=58, pad=0),
        shifts=False,
        left=True,
    ),
    "siglip2 vision": Case(
        config=lambda: hf.Siglip2VisionConfig(**vision_size(num_patches=16)),
        model=hf.Siglip2VisionModel,
        image=PADDED_PATCHES,
        more_images=(FULL_PATCHES, UNMASKED_PATCHES),
    ),
    "siglip2 image classification": Case(
        config=lambda: hf.Siglip2Config(
            text_config=text_size(), vision_config=vision_size(num_patches=16), num_labels=3
        ),
        model=hf.Siglip2ForImageClassification,
        image=PADDED_PATCHES,
        more_images=(FULL_PATCHES, UNMASKED_PATCHES),
    ),
    "metaclip_2": Case(
        config=lambda: hf.MetaClip2Config(
            text_config=text_size(eos_token_id=2), vision_config=vision_size(), projection_dim=20
        ),
        model=hf.MetaClip2Model,
        text=words(bos=0, eos=2, pad=1),
        image=pictures(),
    ),
    "metaclip_2 text": Case(
        config=lambda: hf.MetaClip2TextConfig(**text_size(eos_token_id=2)),
        model=hf.MetaClip2TextModel,
        text=words(bos=0, eos=2, pad=1),
    ),
    "metaclip_2 text with projection": Case(
        config=lambda: hf.MetaClip2TextConfig(**text_size(eos_token_id=2)),
        model=hf.MetaClip2TextModelWithProjection,
        text=words(bos=0, eos=2, pad=1),
    ),
    "metaclip_2 vision": Case(
        config=lambda: hf.MetaClip2VisionConfig(**vision_size()), model=hf.MetaClip2VisionModel, image=pictures()
    ),
    "metaclip_2 vision with projection": Case(
        config=lambda: hf.MetaClip2VisionConfig(**vision_size()),
        model=hf.MetaClip2VisionModelWithProjection,
        image=pictures(),
    ),
    "metaclip_2 image classification": Case(
        config=lambda: hf.MetaClip2Config(text_config=text_size(), vision_config=vision_size(), num_labels=3),
        model=hf.MetaClip2ForImageClassification,
        image=pictures(),
    ),
    "chinese_clip": Case(
        config=lambda: hf.ChineseCLIPConfig(
            text_config=text_size(pad_token_id=0), vision_config=vision_size(), projection_dim=20
        ),
        model=hf.ChineseCLIPModel,
        text=words(bos=2, eos=3, pad=0),
        image=pictures(),
    ),
    "altclip": Case(
        config=lambda: hf.AltCLIPConfig(
            text_config=text_size(project_dim=28), vision_config=vision_size(), projection_dim=20
        ),
        model=hf.AltCLIPModel,
        text=words(bos=0, eos=2, pad=1),
        image=pictures(),
    ),
    "clipseg": Case(
        config=lambda: hf.CLIPSegConfig(text_config=text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.CLIPSegModel,
        text=CLIP_WORDS,
        image=pictures(),
    ),
    "owlvit": Case(
        config=lambda: hf.OwlViTConfig(
            text_config=text_size(max_position_embeddings=16, pad_token_id=0),
            vision_config=vision_size(),
            projection_dim=20,
        ),
        model=hf.OwlViTModel,
        text=words(bos=57, eos=58, pad=0),
        image=pictures(),
        shifts=False,
    ),
    "owlv2": Case(
        config=lambda: hf.Owlv2Config(
            text_config=text_size(max_position_embeddings=16, pad_token_id=0),
            vision_config=vision_size(),
            projection_dim=20,
        ),
        model=hf.Owlv2Model,
        text=words(bos=57, eos=58, pad=0),
        image=pictures(),
        shifts=False,
    ),
    "tipsv2": Case(
        config=lambda: hf.Tipsv2Config(
            text_config=text_size(bos_token_id=None, eos_token_id=None, pad_token_id=0),
            vision_config=vision_size(layerscale_value=0.9),
        ),
        model=hf.Tipsv2Model,
        text=words(bos=None, eos=None, pad=0),
        image=pictures(),
        pools_all=True,
    ),
    "aimv2": Case(
        config=lambda: hf.Aimv2Config(text_config=text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.Aimv2Model,
        text=CLIP_WORDS,
        image=pictures(),
        # With sdpa the model itself is causal for texts of unequal lengths and looks both ways for equal ones, so its
        # own results depend on the batch; with eager attention they do not.
        attentions=("sdpa", "eager"),
        causal_without_mask=False,
    ),
    "bert and vit": Case(
        config=lambda: hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**vision_size()), hf.BertConfig(**text_size()), projection_dim=20
        ),
        model=hf.VisionTextDualEncoderModel,
        text=words(bos=2, eos=3, pad=0),
        image=pictures(),
    ),
}
