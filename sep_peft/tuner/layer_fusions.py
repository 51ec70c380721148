"""The fusions of one adapter in one tower."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView

import torch
from torch import nn

from ..method.coupled import CoupledTokenFusion
from ..method.fusion import TokenFusion
from ..method.independent import LearnedPrompts
from .config import SEPConfig
from .current import walked_adapter
from .settings import TowerSettings


#: Key of the one fusion module that all layers use with `share_fusion=True`.
SHARED = "shared"


def fusion_keys(settings: TowerSettings) -> list[str]:
    """Keys of the fusions that an adapter has in one tower."""
    if not settings.fusion_layers:
        return []
    return [SHARED] if settings.share_fusion else [str(index) for index in settings.fusion_layers]


def new_fusion(config: SEPConfig, modality: str, width: int, device: str) -> TokenFusion | LearnedPrompts:
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

    def check_parameters(self) -> None:
        """Make sure that the parameters are there, to be saved.

        Raises:
            ValueError: modules were replaced by ones without parameters.
        """
        found = {module for module in self.modules() if module._parameters}
        if not found.issuperset(self._owners):
            raise ValueError(
                "This adapter cannot be saved, because modules of it were replaced, as torch.ao.quantization."
                "quantize_dynamic does. Save it before it is quantized."
            )

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters, in the order of `nn.Module.parameters`."""
        if not recurse:
            return iter(())  # a dictionary of modules has none of its own
        return (
            parameter for owner in self._owners for parameter in owner._parameters.values() if parameter is not None
        )


class AdapterFusions(nn.ModuleDict):
    """Adapter -> its fusions in one tower.

    An adapter has some 400 modules, and PEFT walks through all modules of a model several times to add or load one.
    While `walked_adapter` names an adapter, whoever walks through the model in this thread meets the fusions of that
    one alone. Looking an adapter up by its name finds all of them at any time.
    """

    def __init__(self):
        super().__init__()
        # `nn.Module` has no method that all its walks share: each goes on to the items of this dictionary
        vars(self)["_modules"] = _WalkedModules()


class _WalkedModules(dict[str, nn.Module]):
    """The modules by adapter, of which a walk sees those that it is about."""

    def items(self) -> ItemsView[str, nn.Module]:
        return super().items() if walked_adapter.get() is None else self._walked().items()

    def values(self) -> ValuesView[nn.Module]:
        return super().values() if walked_adapter.get() is None else self._walked().values()

    def _walked(self) -> dict[str, nn.Module]:
        name = walked_adapter.get()
        return {name: self[name]} if name in self else {}
