"""The model families of transformers: data, one spec per `config.model_type`, no logic.

Measured against transformers 5.23.0. A family is a spec here and a case in tests/families.py.
"""

from __future__ import annotations

from dataclasses import replace

from .spec import Architecture, TowerSpec


CLIP_TEXT = TowerSpec(
    path="text_model",
    layers="encoder.layers",
    inputs="input_ids",
    projection="text_projection",
    insert_at=1,
    causal=True,
    positions="embeddings.position_embedding",
    text_end="eos",
    mlp_norm="layer_norm2",
)
CLIP_VISION = TowerSpec(
    path="vision_model",
    layers="encoder.layers",
    inputs="pixel_values",
    projection="visual_projection",
    entry_norm="pre_layrnorm",
    leading_tokens=1,
    mlp_norm="layer_norm2",
)

CLIP_TEXT_ALONE = replace(CLIP_TEXT, path="", projection=None)
CLIP_VISION_ALONE = replace(CLIP_VISION, path="", projection=None)
#: A classification head over the mean of all patches.
CLIP_CLASSIFICATION = Architecture(
    vision=replace(CLIP_VISION, projection=None, pooling="mean_tokens", mlp_norm=None), logit_scale=None
)

SIGLIP_TEXT = TowerSpec(
    path="text_model",
    layers="encoder.layers",
    inputs="input_ids",
    insert_at=0,  # there is no BOS
    max_length_padding=True,  # it pools at the last token, whatever that is, and was trained with texts padded to 64
)
#: Why a tower without its head takes no prompts.
HEADLESS = "without its pooling head ({}=False) its vision tower has no pooled output of both branches to mix"
SIGLIP_VISION = TowerSpec(
    path="vision_model",
    layers="encoder.layers",
    inputs="pixel_values",
    needed_options={"vision_use_head": HEADLESS.format("vision_use_head")},
)

#: A classification head over the mean of all patches; the tower's own pooling is not used.
SIGLIP_CLASSIFICATION = Architecture(
    vision=replace(SIGLIP_VISION, pooling="mean_tokens", needed_options={}), logit_scale=None
)

#: Images of any shape, padded to one number of patches.
SIGLIP_2_VISION = replace(SIGLIP_VISION, mask_input="pixel_attention_mask")
SIGLIP_2_CLASSIFICATION = Architecture(
    vision=replace(SIGLIP_2_VISION, pooling="mean_tokens", needed_options={}), logit_scale=None
)

#: It pools at the first EOS, also where that is 2 as in the released weights.
METACLIP_2_TEXT = replace(CLIP_TEXT, text_end="first_eos")

BERT_TEXT = TowerSpec(
    path="text_model",
    layers="encoder.layer",
    inputs="input_ids",
    projection="text_projection",
    insert_at=1,
    positions="embeddings.position_embeddings",
    entry_embedding="embeddings.token_type_embeddings",
    entry_norm="embeddings.LayerNorm",
)
#: BERT as a tower; its own pooler is not used, and not trained where the tower stands alone.
ALIGN_TEXT = CHINESE_CLIP_TEXT = FLAVA_TEXT = replace(BERT_TEXT, pooling="first_token")

VIT_VISION = TowerSpec(
    path="vision_model",
    layers="layers",
    inputs="pixel_values",
    projection="visual_projection",
    leading_tokens=1,
    mlp_norm="layernorm_after",
)
DINO_2_VISION = replace(VIT_VISION, layers="encoder.layer", mlp_norm="norm2")

BLIP_TEXT = replace(BERT_TEXT, entry_embedding=None)
BLIP_VISION = replace(CLIP_VISION, entry_norm=None)
#: Its features come from the first token through biased projections.
BLIP_RETRIEVAL = Architecture(
    text=replace(BLIP_TEXT, path="text_encoder", projection="text_proj", pooling="first_token"),
    vision=replace(BLIP_VISION, projection="vision_proj", pooling="first_token"),
    logit_scale=None,
)

FLAVA_VISION = TowerSpec(
    path="image_model",
    layers="encoder.layer",
    inputs="pixel_values",
    projection="image_projection",
    pooling="first_token",
    leading_tokens=1,
)
FLAVA_PRETRAINING = Architecture(
    text=replace(FLAVA_TEXT, path="flava.text_model", projection="flava.text_projection"),
    vision=replace(FLAVA_VISION, path="flava.image_model", projection="flava.image_projection"),
    logit_scale="flava.logit_scale",
)

#: Why towers take no prompts.
CONVOLUTIONAL = "its vision tower is convolutional and has no sequence of tokens that prompts could join"
WINDOWED = "its {} tower folds its tokens into a grid, where prompts have no place"
CONVOLUTIONAL_VISION = TowerSpec("vision_model", "", "pixel_values", "visual_projection", refused=CONVOLUTIONAL)
WINDOWED_VISION = replace(CONVOLUTIONAL_VISION, refused=WINDOWED.format("vision"))
#: ClapModel's other tower hears: it stands in the place of the one that sees.
CLAP_AUDIO = TowerSpec("audio_model", "", "pixel_values", "audio_projection", refused=WINDOWED.format("audio"))

#: XLM-RoBERTa inside a tower that maps all its tokens.
ALTCLIP_TEXT = TowerSpec(
    path="text_model",
    layers="roberta.encoder.layers",
    inputs="input_ids",
    projection="text_projection",
    pooling="first_token",  # by get_text_features, while forward takes the pooler_output
    pooler_repeats=True,
    insert_at=1,
    positions="roberta.embeddings.position_embeddings",
    entry_embedding="roberta.embeddings.token_type_embeddings",
    entry_norm="roberta.embeddings.LayerNorm",
)

_NO_GRADIENTS = "the model runs its towers without gradients"
CLIPSEG_SEGMENTATION = Architecture(
    text=replace(CLIP_TEXT, path="clip.text_model", refused=_NO_GRADIENTS),
    vision=replace(CLIP_VISION, path="clip.vision_model", refused=_NO_GRADIENTS),
    logit_scale=None,
)

#: 16 positions are too few to move the text up.
OWL_TEXT = replace(CLIP_TEXT, positions=None, text_end="highest")
OWL_VISION = replace(CLIP_VISION, entry_norm="pre_layernorm")

XCLIP_TEXT = replace(CLIP_TEXT, text_end="highest")
#: Prompts and the mix concern each frame of a video alone: the model relates frames after its projection, and layers
#: by a message token.
XCLIP_VISION = replace(CLIP_VISION, entry_norm="pre_layernorm", layer_tokens=1, videos=True)

#: Padding is masked and left out of the mean that the tower pools, so the text may move up.
TIPS_2_TEXT = TowerSpec(
    path="text_model",
    layers="encoder.layers",
    inputs="input_ids",
    insert_at=0,  # there is no BOS
    positions="embeddings.position_embedding",
)
#: CLS and one register.
TIPS_2_VISION = TowerSpec(path="vision_model", layers="encoder.layer", inputs="pixel_values", leading_tokens=2)

#: Attention is causal where a mask reaches the layers and looks both ways where none does; with sdpa none does when
#: nothing is padded. So padding decides, and must not be cut off.
AIM_2_TEXT = replace(CLIP_TEXT, text_end="first_eos", max_length_padding=True, mlp_norm="rms_norm2")
AIM_2_VISION = TowerSpec(
    path="vision_model",
    layers="encoder.layers",
    inputs="pixel_values",
    projection="visual_projection",
    needed_options={"use_head": HEADLESS.format("use_head")},
)

GROUPVIT_TEXT = replace(CLIP_TEXT, mixes_after_projection=True)
GROUPVIT_VISION = TowerSpec(
    path="vision_model",
    layers="encoder.stages.*.layers",
    inputs="pixel_values",
    projection="visual_projection",
    mixes_after_projection=True,
)

#: The Q-Former reads all tokens of the image tower and makes one embedding per query.
BLIP_2_VISION = replace(
    BLIP_VISION, projection="vision_projection", reader="qformer", queries="query_tokens", mlp_norm=None
)
#: Why BLIP-2's other towers take no prompts.
SHARED_QFORMER = "texts go through the Q-Former, whose layers also read the image tower and its query tokens"
LANGUAGE_MODEL = "a language model reads texts and what the Q-Former makes of images, and no joint space is there"
BLIP_2_TEXT = TowerSpec(path="qformer", layers="encoder.layer", inputs="input_ids", refused=SHARED_QFORMER)
BLIP_2_GENERATION = Architecture(
    text=replace(BLIP_2_TEXT, path="language_model", refused=LANGUAGE_MODEL),
    vision=replace(BLIP_2_VISION, refused=LANGUAGE_MODEL),
    logit_scale=None,
)

CLVP_TEXT = TowerSpec(
    path="text_encoder_model",
    layers="layers",
    inputs="input_ids",
    projection="text_encoder_model.projection",
    insert_at=0,  # BOS and EOS are for the conditioning encoder alone
    max_length_padding=True,  # it pools the mean over all tokens, padding included
    rotary="rotary_pos_emb",
    projected="embeds",
)
#: It stands in the place of the tower that sees, and reads the ids of speech tokens.
CLVP_SPEECH = replace(CLVP_TEXT, path="speech_encoder_model", projection="speech_encoder_model.projection")
VIDEOPRISM_TEXT = TowerSpec(
    path="text_model",
    layers="layers",
    inputs="input_ids",
    insert_at=0,  # there is no BOS, and CLS comes last
    causal=True,
    max_length_padding=True,  # CLS, from which it pools, sees padding where no mask is passed
    unit_option="apply_l2norm",
)
#: Prompts concern each frame of a video alone: the layers over frames, and those over all tokens, have none.
VIDEOPRISM_VIDEO = TowerSpec(
    path="video_model",
    layers="vision_model.spatial_layers",
    inputs="pixel_values",
    videos=True,
    unit_option="apply_l2norm",
)
#: Why the same layers without `VideoPrismVideoModel` around them take no prompts.
UNPOOLED = "it pools nothing, so that there is no output of both branches to mix"

#: Towers of `VisionTextDualEncoderModel`: model_type of the tower's configuration -> its spec.
DUAL_ENCODER_TEXT: dict[str, TowerSpec] = {
    "bert": BERT_TEXT,
    "roberta": BERT_TEXT,
}
DUAL_ENCODER_VISION: dict[str, TowerSpec] = {
    "beit": replace(
        VIT_VISION,
        refused_options=dict.fromkeys(
            ("use_relative_position_bias", "use_shared_relative_position_bias"),
            "its relative position bias is a table of patches by patches, where prompts have no place",
        ),
        mlp_norm=None,  # it pools the mean
    ),
    "clip_vision_model": CLIP_VISION,
    "deit": replace(VIT_VISION, leading_tokens=2),  # CLS and the distillation token
    "dinov2": DINO_2_VISION,
    "dinov2_with_registers": DINO_2_VISION,
    # Rotary positions belong to its last tokens, so prompts stand after CLS.
    "dinov3_vit": replace(VIT_VISION, layers="model.layer", insert_at=1, mlp_norm="norm2"),
    "siglip_vision_model": replace(SIGLIP_VISION, projection="visual_projection"),
    "vit": VIT_VISION,
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext", "resnet"), CONVOLUTIONAL_VISION),
    **dict.fromkeys(("pvt", "swin", "swinv2"), WINDOWED_VISION),
}

#: model_type -> architecture
ARCHITECTURES: dict[str, Architecture] = {
    "clip": Architecture(CLIP_TEXT, CLIP_VISION, variants={"CLIPForImageClassification": CLIP_CLASSIFICATION}),
    "clip_text_model": Architecture(
        text=CLIP_TEXT_ALONE,
        logit_scale=None,
        variants={"CLIPTextModelWithProjection": Architecture(text=CLIP_TEXT, logit_scale=None)},
    ),
    "clip_vision_model": Architecture(
        vision=CLIP_VISION_ALONE,
        logit_scale=None,
        variants={"CLIPVisionModelWithProjection": Architecture(vision=CLIP_VISION, logit_scale=None)},
    ),
    "align": Architecture(
        text=ALIGN_TEXT,
        vision=replace(CONVOLUTIONAL_VISION, projection=None),
        logit_scale="temperature",
        scale="divide",
    ),
    "align_text_model": Architecture(text=replace(ALIGN_TEXT, path="", projection=None), logit_scale=None),
    "blip": Architecture(BLIP_TEXT, BLIP_VISION, variants={"BlipForImageTextRetrieval": BLIP_RETRIEVAL}),
    "blip_text_model": Architecture(text=replace(BLIP_TEXT, path="", projection=None), logit_scale=None),
    "blip_vision_model": Architecture(vision=replace(BLIP_VISION, path="", projection=None), logit_scale=None),
    # the scale of the logits per audio; those per text have one of their own
    "clap": Architecture(replace(BERT_TEXT, mixes_after_projection=True), CLAP_AUDIO, logit_scale="logit_scale_a"),
    "clap_text_model": Architecture(
        text=replace(BERT_TEXT, path="", projection=None),
        logit_scale=None,
        variants={
            "ClapTextModelWithProjection": Architecture(
                text=replace(BERT_TEXT, mixes_after_projection=True), logit_scale=None
            )
        },
    ),
    "flava": Architecture(FLAVA_TEXT, FLAVA_VISION, variants={"FlavaForPreTraining": FLAVA_PRETRAINING}),
    "flava_text_model": Architecture(text=replace(FLAVA_TEXT, path="", projection=None), logit_scale=None),
    "flava_image_model": Architecture(vision=replace(FLAVA_VISION, path="", projection=None), logit_scale=None),
    "xclip": Architecture(XCLIP_TEXT, XCLIP_VISION),
    "xclip_text_model": Architecture(text=replace(XCLIP_TEXT, path="", projection=None), logit_scale=None),
    "xclip_vision_model": Architecture(vision=replace(XCLIP_VISION, path="", projection=None), logit_scale=None),
    "siglip": Architecture(
        SIGLIP_TEXT,
        SIGLIP_VISION,
        logit_bias="logit_bias",
        variants={"SiglipForImageClassification": SIGLIP_CLASSIFICATION},
    ),
    "siglip_text_model": Architecture(text=replace(SIGLIP_TEXT, path=""), logit_scale=None),
    "siglip_vision_model": Architecture(vision=replace(SIGLIP_VISION, path=""), logit_scale=None),
    "siglip2": Architecture(
        SIGLIP_TEXT,
        SIGLIP_2_VISION,
        logit_bias="logit_bias",
        variants={"Siglip2ForImageClassification": SIGLIP_2_CLASSIFICATION},
    ),
    "siglip2_text_model": Architecture(text=replace(SIGLIP_TEXT, path=""), logit_scale=None),
    "siglip2_vision_model": Architecture(vision=replace(SIGLIP_2_VISION, path=""), logit_scale=None),
    "metaclip_2": Architecture(
        METACLIP_2_TEXT, CLIP_VISION, variants={"MetaClip2ForImageClassification": CLIP_CLASSIFICATION}
    ),
    "metaclip_2_text_model": Architecture(
        text=replace(METACLIP_2_TEXT, path="", projection=None),
        logit_scale=None,
        variants={"MetaClip2TextModelWithProjection": Architecture(text=METACLIP_2_TEXT, logit_scale=None)},
    ),
    "metaclip_2_vision_model": Architecture(
        vision=CLIP_VISION_ALONE,
        logit_scale=None,
        variants={"MetaClip2VisionModelWithProjection": Architecture(vision=CLIP_VISION, logit_scale=None)},
    ),
    "chinese_clip": Architecture(CHINESE_CLIP_TEXT, CLIP_VISION),
    "chinese_clip_text_model": Architecture(
        text=replace(CHINESE_CLIP_TEXT, path="", projection=None), logit_scale=None
    ),
    "chinese_clip_vision_model": Architecture(vision=CLIP_VISION_ALONE, logit_scale=None),
    "altclip": Architecture(ALTCLIP_TEXT, CLIP_VISION),
    "altclip_text_model": Architecture(text=replace(ALTCLIP_TEXT, path="", projection=None), logit_scale=None),
    "altclip_vision_model": Architecture(vision=CLIP_VISION_ALONE, logit_scale=None),
    "clipseg": Architecture(CLIP_TEXT, CLIP_VISION, variants={"CLIPSegForImageSegmentation": CLIPSEG_SEGMENTATION}),
    "clipseg_text_model": Architecture(text=CLIP_TEXT_ALONE, logit_scale=None),
    "clipseg_vision_model": Architecture(vision=CLIP_VISION_ALONE, logit_scale=None),
    "owlvit": Architecture(OWL_TEXT, OWL_VISION),
    "owlvit_text_model": Architecture(text=replace(OWL_TEXT, projection=None), logit_scale=None),
    "owlvit_vision_model": Architecture(vision=replace(OWL_VISION, projection=None), logit_scale=None),
    "owlv2": Architecture(OWL_TEXT, OWL_VISION),
    "owlv2_text_model": Architecture(text=replace(OWL_TEXT, projection=None), logit_scale=None),
    "owlv2_vision_model": Architecture(vision=replace(OWL_VISION, projection=None), logit_scale=None),
    "tipsv2": Architecture(TIPS_2_TEXT, TIPS_2_VISION, logit_scale="temperature", scale="divide"),
    "tipsv2_text_model": Architecture(text=replace(TIPS_2_TEXT, path=""), logit_scale=None),
    "tipsv2_vision_model": Architecture(vision=replace(TIPS_2_VISION, path=""), logit_scale=None),
    "aimv2": Architecture(AIM_2_TEXT, AIM_2_VISION, max_scale="max_log_logit_scale"),
    "aimv2_text_model": Architecture(text=replace(AIM_2_TEXT, path="", projection=None), logit_scale=None),
    "aimv2_vision_model": Architecture(vision=replace(AIM_2_VISION, path="", projection=None), logit_scale=None),
    "groupvit": Architecture(GROUPVIT_TEXT, GROUPVIT_VISION),
    "groupvit_text_model": Architecture(
        text=replace(GROUPVIT_TEXT, projection=None, mixes_after_projection=False), logit_scale=None
    ),
    "groupvit_vision_model": Architecture(
        vision=replace(GROUPVIT_VISION, projection=None, mixes_after_projection=False), logit_scale=None
    ),
    "blip-2": Architecture(
        text=BLIP_2_TEXT,
        vision=BLIP_2_VISION,
        logit_scale=None,
        variants={
            "Blip2VisionModelWithProjection": Architecture(vision=BLIP_2_VISION, logit_scale=None),
            "Blip2Model": BLIP_2_GENERATION,
            "Blip2ForConditionalGeneration": BLIP_2_GENERATION,
        },
    ),
    "blip_2_vision_model": Architecture(vision=replace(BLIP_VISION, path="", projection=None), logit_scale=None),
    "clvp": Architecture(CLVP_TEXT, CLVP_SPEECH),
    "clvp_encoder": Architecture(
        text=replace(CLVP_TEXT, path="", projection="projection"),
        logit_scale=None,
    ),
    "videoprism": Architecture(
        text=VIDEOPRISM_TEXT,
        vision=VIDEOPRISM_VIDEO,
        logit_scale=None,
    ),
    "videoprism_vision_model": Architecture(
        vision=replace(VIDEOPRISM_VIDEO, path=""),
        logit_scale=None,
        variants={
            "VideoPrismVisionModel": Architecture(
                vision=replace(VIDEOPRISM_VIDEO, path="", refused=UNPOOLED), logit_scale=None
            )
        },
    ),
    "videoprism_text_model": Architecture(text=replace(VIDEOPRISM_TEXT, path=""), logit_scale=None),
}
