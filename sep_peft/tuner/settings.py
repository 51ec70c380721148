"""`TowerSettings`: what one adapter wants of one tower."""

from __future__ import annotations

from dataclasses import dataclass

from ..families.spec import TowerSpec
from .config import CHOSEN_TOKENS, SEPConfig


@dataclass(frozen=True)
class TowerSettings:
    """What one adapter wants of one tower; `num_prompts=0` leaves the tower alone."""

    num_prompts: int
    fusion: str
    fusion_tokens: str
    start_layer: int
    fusion_layers: tuple[int, ...]
    share_fusion: bool
    frozen_weight: float
    batch_coupled: bool

    @classmethod
    def from_config(cls, config: SEPConfig, modality: str, num_layers: int) -> TowerSettings:
        """The settings of the "text" or "vision" tower, which has `num_layers` layers."""
        layers, start = config.layers_of(modality), config.start_layer_of(modality)
        if config.fusion == "none":
            layers = ()
        elif layers is None:
            layers = range(start + 1, num_layers)
        return cls(
            num_prompts=config.prompts_of(modality),
            fusion=config.fusion,
            fusion_tokens=config.fusion_tokens,
            start_layer=start,
            fusion_layers=tuple(layers),
            share_fusion=config.share_fusion,
            frozen_weight=config.frozen_weight,
            batch_coupled=config.batch_coupled,
        )

    @property
    def selects_tokens(self) -> bool:
        """Whether fusions read tokens that are chosen from those of an input."""
        return self.fusion == "attention" and self.fusion_tokens in CHOSEN_TOKENS and bool(self.fusion_layers)

    def position_shift(self, spec: TowerSpec) -> int:
        """How far tokens after the prompts move up in the positions of a tower with this spec."""
        has_room = spec.positions is not None or spec.rotary is not None
        return self.num_prompts if self.start_layer == 0 and has_room else 0
