"""Where the tensors of a module are."""

from __future__ import annotations

from torch import nn

from sep_peft.classifier.following import Following


def devices_of(module: nn.Module) -> set[str]:
    """Types of the devices where anything of a module is."""
    following = [t for m in module.modules() if isinstance(m, Following) for t in m.following.values()]
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers(), *following)}
