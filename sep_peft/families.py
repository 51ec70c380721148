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
}
