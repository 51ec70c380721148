"""The model families of transformers: data, one row per `config.model_type`, no logic.

Measured against transformers 5.23.0. A family is a row here and a case in tests/families.py.
"""

from __future__ import annotations

from dataclasses import replace

from .architectures import Architecture, TowerSpec


CLIP_TEXT = TowerSpec(
    path="text_model",
    layers="encoder.layers",
    inputs="input_ids",
    projection="text_projection",
    insert_at=1,
    causal=True,
    positions="embeddings.position_embedding",
    text_end="eos",
)
CLIP_VISION = TowerSpec(
    path="vision_model",
    layers="encoder.layers",
    inputs="pixel_values",
    projection="visual_projection",
    entry_norm="pre_layrnorm",
    leading_tokens=1,
)

CLIP_TEXT_ALONE = replace(CLIP_TEXT, path="", projection=None)
CLIP_VISION_ALONE = replace(CLIP_VISION, path="", projection=None)
#: A classification head over the mean of all patches.
CLIP_CLASSIFICATION = Architecture(vision=replace(CLIP_VISION, projection=None, pooled="mean_tokens"), logit_scale=None)

SIGLIP_TEXT = TowerSpec(
    path="text_model",
    layers="encoder.layers",
    inputs="input_ids",
    insert_at=0,  # there is no BOS
    max_length_padding=True,  # it pools at the last token, whatever that is, and was trained with texts padded to 64
)
SIGLIP_VISION = TowerSpec(path="vision_model", layers="encoder.layers", inputs="pixel_values")

GROUPVIT_TEXT = replace(CLIP_TEXT, mixes_behind_projection=True)
GROUPVIT_VISION = TowerSpec(
    path="vision_model",
    layers="encoder.stages.*.layers",
    inputs="pixel_values",
    projection="visual_projection",
    mixes_behind_projection=True,
)

#: Why BLIP-2 takes no prompts.
SHARED_QFORMER = "texts go through the Q-Former, whose layers also read the image tower and its query tokens"
READ_THROUGH_QFORMER = (
    "the Q-Former stands between the image tower and the joint space and makes one embedding per query token, so there "
    "is no pooled output of both branches to mix"
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
VIDEOPRISM_TEXT = TowerSpec(
    path="text_model",
    layers="layers",
    inputs="input_ids",
    insert_at=0,  # there is no BOS, and CLS comes last
    causal=True,
    max_length_padding=True,  # CLS, from which it pools, sees padding where no mask is passed
    unit_option="apply_l2norm",
)

#: Towers of `VisionTextDualEncoderModel`: model_type of the tower's configuration -> its row.
DUAL_ENCODER_TEXT: dict[str, TowerSpec] = {
    "bert": TowerSpec(
        path="text_model",
        layers="encoder.layer",
        inputs="input_ids",
        projection="text_projection",
        insert_at=1,
        positions="embeddings.position_embeddings",
        entry_embedding="embeddings.token_type_embeddings",
        entry_norm="embeddings.LayerNorm",
    ),
}
DUAL_ENCODER_VISION: dict[str, TowerSpec] = {
    "clip_vision_model": CLIP_VISION,
    "vit": TowerSpec(
        path="vision_model", layers="layers", inputs="pixel_values", projection="visual_projection", leading_tokens=1
    ),
}

#: model_type -> row
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
    "siglip": Architecture(SIGLIP_TEXT, SIGLIP_VISION, logit_bias="logit_bias"),
    "groupvit": Architecture(GROUPVIT_TEXT, GROUPVIT_VISION),
    "groupvit_text_model": Architecture(
        text=replace(GROUPVIT_TEXT, projection=None, mixes_behind_projection=False), logit_scale=None
    ),
    "groupvit_vision_model": Architecture(
        vision=replace(GROUPVIT_VISION, projection=None, mixes_behind_projection=False), logit_scale=None
    ),
    "blip-2": Architecture(
        text=TowerSpec(path="qformer", layers="encoder.layer", inputs="input_ids", refused=SHARED_QFORMER),
        vision=TowerSpec(
            path="vision_model", layers="encoder.layers", inputs="pixel_values", refused=READ_THROUGH_QFORMER
        ),
        logit_scale=None,
    ),
    "clvp": Architecture(
        text=CLVP_TEXT,
        vision=replace(
            CLVP_TEXT,
            path="speech_encoder_model",
            refused="its other tower reads speech tokens that the model's own decoder makes from the text",
        ),
    ),
    "clvp_encoder": Architecture(
        text=replace(CLVP_TEXT, path="", projection="projection"),
        logit_scale=None,
    ),
    "videoprism": Architecture(
        text=VIDEOPRISM_TEXT,
        vision=TowerSpec(
            path="video_model",
            layers="auxiliary_layers",
            inputs="pixel_values",
            refused="its video tower runs three lists of layers, over the patches of a frame, over the frames of a "
            "patch and over both, and prompts of one have no place in the next",
        ),
        logit_scale=None,
    ),
    "videoprism_text_model": Architecture(text=replace(VIDEOPRISM_TEXT, path=""), logit_scale=None),
}
