"""One tiny model per family: the table that drives `test_families.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import transformers as hf
from copies import made_once
from packaging.version import Version
from transformers.models.clvp.modeling_clvp import ClvpEncoder


WIDTH, LAYERS, VOCABULARY = 32, 3, 60
Inputs = dict[str, torch.Tensor]
#: Whether transformers is one of the older releases that tests run with, which have some families less.
OLDER = Version(hf.__version__) < Version("5.17")


def newer(name: str) -> type | None:
    """A class that older releases of transformers do not have; None there, and its case is left out."""
    return getattr(hf, name, None) if OLDER else getattr(hf, name)


@dataclass(frozen=True)
class Case:
    """A family's tiny model.

    Attributes:
        config: makes the configuration.
        model: class of the model.
        text: makes the inputs of the text tower for texts of given lengths, padded to `total`; None without text tower.
        image: makes the inputs of the image tower for a number of images; None without image tower.
        attentions: attention implementations that the family has; the usual one last.
        shifts: prompts of the text tower move positions; elsewhere longer native texts are given their positions.
        masks: the image tower's layers take an attention mask.
        compiled: whether `torch.compile(fullgraph=True)` is tested.
        options: of the adapter.
        whole: makes the inputs of the whole model for three texts and images; None where they are those of its towers.
        features: reads a tower's embeddings off the whole model's output, by "text" or "vision"; None where they have
            their usual names.
        frames: images that belong together; `image` makes as many per input.
        messages: tokens that an image layer adds to its keys by itself.
        left: texts are padded on the left as well.
        more_images: further kinds of inputs of the image tower.
        causal_without_mask: where no mask reaches the layers of a causal text tower, attention is causal all the same.
        pools_all: the text tower pools all its tokens, so states of a longer native text are compared, not its pooling.
        copied_at: first layer of the image tower after which the tokens stay the same ones.
        one_image: makes the inputs of the image tower for one input all of whose frames are one image; None where
            `image` makes these.
        embeddings: what makes the tokens of an image, below the image tower.
        speech: makes the inputs of the tower that hears in the place of one that sees, as `text` does; None where none
            does.
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
    features: Callable[[torch.nn.Module, dict, str], torch.Tensor] | None = None
    frames: int = 1
    messages: int = 0
    left: bool = False
    more_images: tuple[Callable[[int], Inputs], ...] = ()
    causal_without_mask: bool = True
    pools_all: bool = False
    copied_at: int = 1
    one_image: Callable[[], Inputs] | None = None
    embeddings: str = "embeddings"
    speech: Callable[..., Inputs] | None = None

    def words(self, tower: str) -> Callable[..., Inputs] | None:
        """What makes the inputs of a tower that reads ids; None for one that sees, or where there is none."""
        return self.text if tower == "text" else self.speech

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that prompts are tested in."""
        there = {"text": self.text is not None, "vision": self.image is not None or self.speech is not None}
        return tuple(tower for tower in there if there[tower])

    def build(self, attention: str | None = None) -> torch.nn.Module:
        """The model with seeded weights, norms and biases away from zero and one."""
        return _build(self.config, self.model, attention or self.attentions[-1])

    def inputs(self) -> dict:
        """Inputs of the whole model, for three texts and images."""
        if self.whole is not None:
            return self.whole()
        return (self.text([5, 4, 7]) if self.text else {}) | (self.image(3) if self.image else {})


@made_once
def _build(config: Callable, model: type, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = model._from_config(config(), attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


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


def images(size: int = 24) -> Callable[[int], Inputs]:
    """Random images (count, 3, size, size)."""

    def make(count: int, seed: int = 4) -> Inputs:
        return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))}

    return make


def patches(shapes: list[tuple[int, int]], total: int, mask: bool = True) -> Callable[[int], Inputs]:
    """Images as `total` patches of 8 x 8, of which height times width are real; `mask` False leaves the mask out."""

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
    size = vision_size(image_size=16, num_frames=2, tubelet_size=[1, 8, 8], num_spatial_layers=2)
    for name in ("num_hidden_layers", "patch_size", "projection_dim"):
        del size[name]
    return size | {"num_temporal_layers": 1, "num_auxiliary_layers": 1}


def videos(count: int, seed: int = 4) -> Inputs:
    """Random videos of two frames."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values_videos": torch.randn(count, 2, 3, 16, 16, generator=generator)}


CLIP_WORDS = words(bos=57, eos=58, pad=1)
BERT_WORDS = words(bos=2, eos=3, pad=0)
ROBERTA_WORDS = words(bos=0, eos=2, pad=1)


def dual_encoder(
    vision: Callable[[], hf.PretrainedConfig],
    text: Callable[[], hf.PretrainedConfig] = lambda: hf.BertConfig(**text_size(pad_token_id=0)),
    tokens: Callable[..., Inputs] = BERT_WORDS,
) -> Case:
    """A `VisionTextDualEncoderModel` of any two towers."""
    return Case(
        config=lambda: hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision(), text(), projection_dim=20),
        model=hf.VisionTextDualEncoderModel,
        text=tokens,
        image=images(),
    )


def blip_text_size() -> dict:
    return text_size(pad_token_id=0, bos_token_id=2, eos_token_id=3, encoder_hidden_size=WIDTH)


def blip_retrieval_features(model: torch.nn.Module, output: dict, tower: str) -> torch.Tensor:
    """What the model's own similarity is made of."""
    image = model.vision_proj(output["last_hidden_state"][:, 0])
    text = model.text_proj(output["question_embeds"][:, 0])
    score = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(score, output["itm_score"], rtol=1e-4, atol=2e-5)
    return text if tower == "text" else image


def flava_config() -> hf.FlavaConfig:
    return hf.FlavaConfig(
        text_config=text_size(pad_token_id=0),
        image_config=vision_size(vocab_size=VOCABULARY),
        multimodal_config={"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2},
        hidden_size=WIDTH,
        projection_dim=20,
        init_codebook=False,
        return_loss=False,
    )


def flava_features(model: torch.nn.Module, output: dict, tower: str) -> torch.Tensor:
    """The first token through the projection, as the contrastive head takes it."""
    if tower == "text":
        return model.text_projection(output["text_embeddings"][:, 0])
    return model.image_projection(output["image_embeddings"][:, 0])


def xclip_features(model: torch.nn.Module, output: dict, tower: str) -> torch.Tensor:
    """Embeddings before the model relates frames to each other and texts to videos."""
    if tower == "text":
        return model.text_projection(output["text_model_output"].pooler_output)
    frames = model.visual_projection(output["vision_model_output"].pooler_output)
    video = model.mit(frames.unflatten(0, (-1, 2))).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(video, dim=-1), output["video_embeds"])
    return frames


def clvp_features(model: torch.nn.Module, output: dict, tower: str) -> torch.Tensor:
    """The model speaks by itself, so what it has said is heard again in the place of the case's own speech."""
    if tower == "text":
        return output["text_embeds"]
    said = []
    with model.speech_encoder_model.register_forward_pre_hook(
        lambda module, args, kwargs: said.append(kwargs["input_ids"]), with_kwargs=True
    ):
        model(**CASES["clvp"].inputs())
    heard = model.get_speech_features(speech_ids=said[0])
    torch.testing.assert_close(torch.nn.functional.normalize(heard, dim=-1), output["speech_embeds"])
    inputs = CASES["clvp"].speech([5, 4, 7])
    return model.get_speech_features(speech_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def blip_2_config() -> hf.Blip2Config:
    return hf.Blip2Config(
        vision_config=vision_size(),
        qformer_config=text_size(
            hidden_size=24, encoder_hidden_size=WIDTH, cross_attention_frequency=1, use_qformer_text_input=True
        ),
        text_config={"model_type": "opt", "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 1, "vocab_size": 60}
        | {"num_attention_heads": 2, "word_embed_proj_dim": 32},
        num_query_tokens=4,
        image_text_hidden_size=20,
    )


#: Those of the Q-Former, which also stands between the image tower and its projection.
BLIP_2_ATTENTIONS = ("eager",) if OLDER else ("eager", "sdpa")

CASES: dict[str, Case] = {
    "clip": Case(
        config=lambda: hf.CLIPConfig(text_config=text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.CLIPModel,
        text=CLIP_WORDS,
        image=images(),
        compiled=True,
    ),
    "clip text with projection": Case(
        config=lambda: hf.CLIPTextConfig(**text_size()), model=hf.CLIPTextModelWithProjection, text=CLIP_WORDS
    ),
    "clip vision with projection": Case(
        config=lambda: hf.CLIPVisionConfig(**vision_size()), model=hf.CLIPVisionModelWithProjection, image=images()
    ),
    "clip text": Case(config=lambda: hf.CLIPTextConfig(**text_size()), model=hf.CLIPTextModel, text=CLIP_WORDS),
    "clip vision": Case(config=lambda: hf.CLIPVisionConfig(**vision_size()), model=hf.CLIPVisionModel, image=images()),
    "clip image classification": Case(
        config=lambda: hf.CLIPConfig(
            text_config=text_size(), vision_config=vision_size(), projection_dim=20, num_labels=3
        ),
        model=hf.CLIPForImageClassification,
        image=images(),
    ),
    "siglip": Case(
        config=lambda: hf.SiglipConfig(text_config=text_size(projection_size=WIDTH), vision_config=vision_size()),
        model=hf.SiglipModel,
        text=words(bos=None, eos=58, pad=1),
        image=images(),
        shifts=False,
        compiled=True,
    ),
    "bert and vit": dual_encoder(lambda: hf.ViTConfig(**vision_size())),
    "bert and clip": dual_encoder(lambda: hf.CLIPVisionConfig(**vision_size())),
    "bert and deit": dual_encoder(lambda: hf.DeiTConfig(**vision_size())),
    "bert and dinov2": dual_encoder(lambda: hf.Dinov2Config(**vision_size())),
    "bert and dinov2 with registers": dual_encoder(
        lambda: hf.Dinov2WithRegistersConfig(**vision_size(num_register_tokens=2))
    ),
    "bert and dinov3": dual_encoder(lambda: hf.DINOv3ViTConfig(**vision_size(num_register_tokens=2))),
    "bert and siglip": dual_encoder(lambda: hf.SiglipVisionConfig(**vision_size())),
    "bert and beit": dual_encoder(lambda: hf.BeitConfig(**vision_size(use_absolute_position_embeddings=True))),
    "roberta and vit": dual_encoder(
        lambda: hf.ViTConfig(**vision_size()),
        text=lambda: hf.RobertaConfig(**text_size(pad_token_id=1)),
        tokens=ROBERTA_WORDS,
    ),
    "align": Case(
        config=lambda: hf.AlignConfig(
            text_config=text_size(pad_token_id=0),
            vision_config={
                "image_size": 32,
                "width_coefficient": 0.25,
                "depth_coefficient": 0.1,
                "kernel_sizes": [3, 3],
                "in_channels": [32, 16],
                "out_channels": [16, 24],
                "strides": [1, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 2],
                "hidden_dim": 20,
            },
            projection_dim=8,
        ),
        model=hf.AlignModel,
        text=BERT_WORDS,
        attentions=("eager",),
        options={"num_vision_prompts": 0},
        whole=lambda: BERT_WORDS([5, 4, 7]) | images(32)(3),
    ),
    "clap": Case(
        config=lambda: hf.ClapConfig(
            text_config=text_size(pad_token_id=1),
            audio_config={
                "window_size": 4,
                "num_mel_bins": 16,
                "spec_size": 64,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "hidden_size": 32,
                "patch_embeds_hidden_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "num_hidden_layers": 2,
            },
            projection_dim=20,
        ),
        model=hf.ClapModel,
        text=ROBERTA_WORDS,
        attentions=("eager",),
        options={"num_vision_prompts": 0},
        whole=lambda: (
            ROBERTA_WORDS([5, 4, 7])
            | {"input_features": torch.randn(3, 1, 32, 16, generator=torch.Generator().manual_seed(5))}
        ),
    ),
    "clap text with projection": Case(
        config=lambda: hf.ClapTextConfig(**text_size(pad_token_id=1)),
        model=hf.ClapTextModelWithProjection,
        text=ROBERTA_WORDS,
        attentions=("eager",),
    ),
    "blip": Case(
        config=lambda: hf.BlipConfig(text_config=blip_text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.BlipModel,
        text=BERT_WORDS,
        image=images(),
        attentions=("eager",),
    ),
    "blip retrieval": Case(
        config=lambda: hf.BlipConfig(
            text_config=blip_text_size(), vision_config=vision_size(), image_text_hidden_size=20
        ),
        model=hf.BlipForImageTextRetrieval,
        text=BERT_WORDS,
        image=images(),
        attentions=("eager",),
        whole=lambda: BERT_WORDS([5, 4, 7]) | images()(3) | {"use_itm_head": False},
        features=blip_retrieval_features,
    ),
    "blip_2 retrieval": Case(
        config=blip_2_config,
        model=hf.Blip2ForImageTextRetrieval,
        image=images(),
        attentions=BLIP_2_ATTENTIONS,
        options={"num_text_prompts": 0},
        whole=lambda: BERT_WORDS([5, 4, 7]) | images()(3),
    ),
    "blip_2 vision with projection": Case(
        config=blip_2_config,
        model=hf.Blip2VisionModelWithProjection,
        image=images(),
        attentions=BLIP_2_ATTENTIONS,
    ),
    "blip_2 vision": Case(
        config=lambda: hf.Blip2VisionConfig(**vision_size()), model=hf.Blip2VisionModel, image=images()
    ),
    "flava": Case(
        config=flava_config,
        model=hf.FlavaModel,
        text=BERT_WORDS,
        image=images(),
        attentions=("eager",),
        features=lambda model, output, tower: flava_features(model, output, tower),
    ),
    "flava pretraining": Case(
        config=flava_config,
        model=hf.FlavaForPreTraining,
        text=BERT_WORDS,
        image=images(),
        attentions=("eager",),
        features=lambda model, output, tower: flava_features(model.flava, output, tower),
    ),
    "xclip": Case(
        config=lambda: hf.XCLIPConfig(
            text_config=text_size(),
            vision_config=vision_size(
                num_frames=2,
                mit_hidden_size=20,
                mit_intermediate_size=24,
                mit_num_hidden_layers=1,
                mit_num_attention_heads=2,
            ),
            projection_dim=20,
            prompt_layers=1,
            prompt_num_attention_heads=2,
        ),
        model=hf.XCLIPModel,
        text=CLIP_WORDS,
        image=lambda count: images()(2 * count),
        whole=lambda: CLIP_WORDS([5, 4, 7]) | {"pixel_values": images()(6)["pixel_values"].unflatten(0, (3, 2))},
        features=xclip_features,
        frames=2,
        messages=1,
    ),
    "siglip text": Case(
        config=lambda: hf.SiglipTextConfig(**text_size(projection_size=20)),
        model=hf.SiglipTextModel,
        text=words(bos=None, eos=58, pad=1),
        shifts=False,
    ),
    "siglip vision": Case(
        config=lambda: hf.SiglipVisionConfig(**vision_size()), model=hf.SiglipVisionModel, image=images()
    ),
    "siglip image classification": Case(
        config=lambda: hf.SiglipConfig(text_config=text_size(), vision_config=vision_size(), num_labels=3),
        model=hf.SiglipForImageClassification,
        image=images(),
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
        image=images(),
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
        config=lambda: hf.MetaClip2VisionConfig(**vision_size()), model=hf.MetaClip2VisionModel, image=images()
    ),
    "metaclip_2 vision with projection": Case(
        config=lambda: hf.MetaClip2VisionConfig(**vision_size()),
        model=hf.MetaClip2VisionModelWithProjection,
        image=images(),
    ),
    "metaclip_2 image classification": Case(
        config=lambda: hf.MetaClip2Config(text_config=text_size(), vision_config=vision_size(), num_labels=3),
        model=hf.MetaClip2ForImageClassification,
        image=images(),
    ),
    "chinese_clip": Case(
        config=lambda: hf.ChineseCLIPConfig(
            text_config=text_size(pad_token_id=0), vision_config=vision_size(), projection_dim=20
        ),
        model=hf.ChineseCLIPModel,
        text=words(bos=2, eos=3, pad=0),
        image=images(),
    ),
    "altclip": Case(
        config=lambda: hf.AltCLIPConfig(
            text_config=text_size(project_dim=28), vision_config=vision_size(), projection_dim=20
        ),
        model=hf.AltCLIPModel,
        text=words(bos=0, eos=2, pad=1),
        image=images(),
    ),
    "clipseg": Case(
        config=lambda: hf.CLIPSegConfig(text_config=text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.CLIPSegModel,
        text=CLIP_WORDS,
        image=images(),
    ),
    "owlvit": Case(
        config=lambda: hf.OwlViTConfig(
            text_config=text_size(max_position_embeddings=16, pad_token_id=0),
            vision_config=vision_size(),
            projection_dim=20,
        ),
        model=hf.OwlViTModel,
        text=words(bos=57, eos=58, pad=0),
        image=images(),
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
        image=images(),
        shifts=False,
    ),
    "tipsv2": Case(
        config=lambda: hf.Tipsv2Config(
            text_config=text_size(bos_token_id=None, eos_token_id=None, pad_token_id=0),
            vision_config=vision_size(layerscale_value=0.9),
        ),
        model=newer("Tipsv2Model"),
        text=words(bos=None, eos=None, pad=0),
        image=images(),
        pools_all=True,
    ),
    "aimv2": Case(
        config=lambda: hf.Aimv2Config(text_config=text_size(), vision_config=vision_size(), projection_dim=20),
        model=hf.Aimv2Model,
        text=CLIP_WORDS,
        image=images(),
        # With sdpa the model itself is causal for texts of unequal lengths and looks both ways for equal ones, so its
        # own results depend on the batch; with eager attention they do not.
        attentions=("sdpa", "eager"),
        causal_without_mask=False,
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
        image=images(),
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
        image=images(),
        attentions=("eager",),
        copied_at=3,
    ),
    "clvp": Case(
        config=clvp_config,
        model=hf.ClvpModelForConditionalGeneration,
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        pools_all=True,
        speech=words(bos=None, eos=None, pad=0),
        features=clvp_features,
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
        model=newer("VideoPrismClipModel"),
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        shifts=False,  # padded to all 64 positions
        causal_without_mask=False,
        image=videos,
        one_image=lambda: {key: value[:, :1].expand_as(value) for key, value in videos(1).items()},
        embeddings="vision_model.spatial_embeddings",
        features=lambda model, output, tower: output["text_embeds" if tower == "text" else "video_embeds"],
    ),
    "videoprism text": Case(
        config=lambda: hf.VideoPrismTextConfig(**text_size()),
        model=newer("VideoPrismTextModel"),
        text=words(bos=None, eos=None, pad=0),
        attentions=("eager",),
        shifts=False,
        causal_without_mask=False,
    ),
}

CASES = {name: case for name, case in CASES.items() if case.model is not None}


def first_token(model: torch.nn.Module, output: dict, tower: str) -> torch.Tensor:
    """What the families pool whose towers have a pooler that they do not use."""
    return output["last_hidden_state"][:, 0]


def bare(name: str, tower: str, model: type, **changes) -> Case:
    """One tower of a case, as a model of its own."""
    case, left_out = CASES[name], {"text": "image", "vision": "text"}[tower]

    def config() -> hf.PretrainedConfig:
        whole = case.config()
        return whole.text_config if tower == "text" else getattr(whole, "vision_config", None) or whole.image_config

    alone = {"config": config, "model": model, left_out: None, "whole": None, "features": None, "options": {}}
    return replace(case, **(alone | {"compiled": False} | changes))


CASES |= {
    f"{name} {tower} alone": bare(name, tower, model, **changes)
    for name, tower, model, changes in [
        ("chinese_clip", "text", hf.ChineseCLIPTextModel, {"features": first_token}),
        ("chinese_clip", "vision", hf.ChineseCLIPVisionModel, {}),
        ("altclip", "text", hf.AltCLIPTextModel, {}),
        ("altclip", "vision", hf.AltCLIPVisionModel, {}),
        ("clipseg", "text", hf.CLIPSegTextModel, {}),
        ("clipseg", "vision", hf.CLIPSegVisionModel, {}),
        ("owlvit", "text", hf.OwlViTTextModel, {}),
        ("owlvit", "vision", hf.OwlViTVisionModel, {}),
        ("owlv2", "text", hf.Owlv2TextModel, {}),
        ("owlv2", "vision", hf.Owlv2VisionModel, {}),
        ("tipsv2", "text", newer("Tipsv2TextModel"), {}),
        ("tipsv2", "vision", newer("Tipsv2VisionModel"), {}),
        ("aimv2", "text", hf.Aimv2TextModel, {}),
        ("aimv2", "vision", hf.Aimv2VisionModel, {}),
        ("xclip", "text", hf.XCLIPTextModel, {}),
        ("xclip", "vision", hf.XCLIPVisionModel, {"whole": lambda: images()(6)}),
        ("blip", "text", hf.BlipTextModel, {}),
        ("blip", "vision", hf.BlipVisionModel, {}),
        ("flava", "text", hf.FlavaTextModel, {"features": first_token}),
        ("flava", "vision", hf.FlavaImageModel, {"features": first_token}),
        ("align", "text", hf.AlignTextModel, {"features": first_token}),
        (
            "videoprism",
            "vision",
            newer("VideoPrismVideoModel"),
            {"features": lambda model, output, tower: output.pooler_output[:, 0]},
        ),
    ]
    if name in CASES
}
