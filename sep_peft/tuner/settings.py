"""`TowerSettings`: what one adapter wants of one tower."""

from __future__ import annotations

from dataclasses import dataclass

from .config import SEPConfig


@dataclass(frozen=True)
class TowerSettings:
    """What one adapter wants of one tower; `num_prompts=0` leaves the tower alone."""

    num_prompts: int
    start_layer: int
    fusion_layers: tuple[int, ...]
    share_fusion: bool
    frozen_weight: float
    batch_coupled: bool

    @classmethod
    def from_config(cls, config: SEPConfig, tower: str, num_layers: int) -> TowerSettings:
        layers = config.layers_of(tower)
        if config.fusion == "none":
            layers = ()
        elif layers is None:
            layers = range(config.start_layer + 1, num_layers)
        return cls(
            num_prompts=config.prompts_of(tower),
            start_layer=config.start_layer,
            fusion_layers=tuple(layers),
            share_fusion=config.share_fusion,
            frozen_weight=config.frozen_weight,
            batch_coupled=config.batch_coupled,
        )
