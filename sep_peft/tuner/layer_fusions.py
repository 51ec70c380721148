"""The fusions of one adapter in one tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..method.fusion import TokenFusion


class LayerFusions(nn.ModuleDict):
    """The fusions of one adapter in one tower, by the key of their layer.

    Args:
        fusions: key -> fusion; none is added or taken out later.
    """

    def __init__(self, fusions: Mapping[str, TokenFusion]):
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
