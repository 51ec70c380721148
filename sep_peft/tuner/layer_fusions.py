"""The fusions of one adapter in one tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..method.coupled import CoupledTokenFusion
from ..method.fusion import TokenFusion
from ..method.independent import LearnedPrompts
from .config import SEPConfig
from .settings import TowerSettings


#: Key of the one fusion module that all layers use with `share_fusion=True`.
SHARED = "shared"


def fusion_keys(settings: TowerSettings) -> list[str]:
    """Keys of the fusions that an adapter has in one tower."""
    if not settings.fusion_layers:
        return []
    return [SHARED] if settings.share_fusion else [str(index) for index in settings.fusion_layers]


def new_fusion(config: SEPConfig, modality: str, width: int, device: str | None = None) -> TokenFusion | LearnedPrompts:
    """What makes the prompts anew before one layer, fresh and in fp32, for the tower of `modality` and `width` D."""
    if config.fusion == "independent":
        return LearnedPrompts(config.prompts_of(modality), width, device=device, dtype=torch.float32)
    kind = CoupledTokenFusion if config.batch_coupled else TokenFusion
    return kind(width, config.fusion_hidden_size, config.fusion_rank, device=device, dtype=torch.float32)


class LayerFusions(nn.ModuleDict):
    """The fusions of one adapter in one tower, by the key of their layer.

    Args:
        fusions: key -> fusion; none is added or taken out later.
    """

    def __init__(self, fusions: Mapping[str, TokenFusion | LearnedPrompts]):
        super().__init__(fusions)
        # Adapters are switched, and cached class texts are compared, by way of all parameters. A search through some 20
        # modules a layer takes longer than either, so the modules that own parameters are found once. Their
        # dictionaries of parameters are not remembered: `torch.export` puts others in their place.
        self._owners = tuple(module for module in self.modules() if module._parameters)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters, in the order of `nn.Module.parameters`."""
        if not recurse:
            return iter(())  # a dictionary of modules has none of its own
        return (
            parameter for owner in self._owners for parameter in owner._parameters.values() if parameter is not None
        )
