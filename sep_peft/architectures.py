"""Where the towers of a model are and how they behave: data, one row per `config.model_type`, no logic.

Measured against transformers 5.23.0. Paths are dotted and relative to what the field says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TowerSpec:
    """One tower of a dual encoder.

    Attributes:
        path: the tower, below the model.
        layers: the list of encoder layers, below the tower.
        projection: what maps the pooled output into the joint space, below the model; None where the tower does.
        inputs: name of the tower's main argument.
        insert_at: index before which prompts stand; None appends them.
        causal: whether the masks that reach the layers contain causality.
        positions: the position-embedding module whose indices move up behind the prompts, below the tower; None where
            prompts carry no position.
        entry_norm: the norm between embeddings and the first layer that prompts pass as well, below the tower.
        leading_tokens: tokens before the first patch, such as CLS.
        pools_at_eos: the pooled token is EOS, so nothing behind EOS matters.
    """

    path: str
    layers: str
    projection: str | None
    inputs: Literal["input_ids", "pixel_values"]
    insert_at: int | None = None
    causal: bool = False
    positions: str | None = None
    entry_norm: str | None = None
    leading_tokens: int = 0
    pools_at_eos: bool = False


@dataclass(frozen=True)
class Architecture:
    """A dual encoder: its towers, and where the scale of its logits is."""

    text: TowerSpec
    vision: TowerSpec
    logit_scale: str = "logit_scale"
    logit_bias: str | None = None

    @property
    def towers(self) -> dict[str, TowerSpec]:
        return {"text": self.text, "vision": self.vision}


CLIP = Architecture(
    text=TowerSpec(
        path="text_model",
        layers="encoder.layers",
        projection="text_projection",
        inputs="input_ids",
        insert_at=1,
        causal=True,
        positions="embeddings.position_embedding",
        pools_at_eos=True,
    ),
    vision=TowerSpec(
        path="vision_model",
        layers="encoder.layers",
        projection="visual_projection",
        inputs="pixel_values",
        entry_norm="pre_layrnorm",
        leading_tokens=1,
    ),
)

#: model_type -> row
ARCHITECTURES: dict[str, Architecture] = {
    "clip": CLIP,  # transformers/models/clip
}
