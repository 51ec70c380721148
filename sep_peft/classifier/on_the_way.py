"""`OnTheWay`: a value that an accelerator still computes, taken to the host without anybody waiting for it."""

from __future__ import annotations

from typing import Any

import torch


class OnTheWay:
    """A copy of a tensor on the host, which is there when the accelerator comes to it.

    Args:
        tensor: on any device; of one on the CPU there is no copy. A device whose values cannot come later, such as
            Apple's, is waited for.
    """

    def __init__(self, tensor: torch.Tensor):
        later = not at_hand(tensor) and can_come_later(tensor.device)
        self._value = tensor.to("cpu", non_blocking=later)
        self._event = _event(tensor.device) if later else None

    def get(self) -> torch.Tensor | None:
        """The value; None while it is on the way."""
        return self._value if self._event is None or self._event.query() else None


def at_hand(tensor: torch.Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _event(device: torch.device) -> Any:
    """Tells when the device has done all that it was told until here."""
    module = torch.get_device_module(device)
    event = module.Event()
    event.record(module.current_stream(device))
    return event


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. The host does not wait for the copy, but where the device could read it too late.

    A device with streams takes what lies in pageable memory before the host goes on. Apple's, which has none, would
    read that memory later, when something else may stand there.
    """
    return tensor.to(device, non_blocking=can_come_later(device))


def can_come_later(device: torch.device) -> bool:
    """Whether a value of this accelerator can be on the way: its module of torch has streams and events."""
    module = getattr(torch, device.type, None)
    return hasattr(module, "Event") and hasattr(module, "current_stream")
