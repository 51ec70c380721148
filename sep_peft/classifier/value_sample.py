"""Whether parameters were written to: `versions`, and `ValueSample` where torch counts none, as through `p.data`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .on_the_way import OnTheWay, at_hand, can_come_later


#: Values that are looked at of each parameter, from first to last in even steps.
SAMPLE_SIZE = 64

#: Views of parameters of one kind, and their values as they were.
_Pair = tuple[list[torch.Tensor], torch.Tensor]


def versions(parameters: Iterable[nn.Parameter]) -> tuple:
    """Changes whenever one of these is replaced, moved or written to in place, but not by way of its `data`."""
    # tensors made in inference mode count no versions
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


class ValueSample:
    """Some values of each of many parameters, as they were when this was made.

    ``p.data.add_(x)``, as in moving averages of weights, changes a parameter and not its version, and so does whatever
    is written to a tensor that was made in inference mode. What writes to all of a parameter is found here; what writes
    to single entries by way of ``.data`` may not be.

    Parameters that have no plain values, such as quantized ones and those on the meta device, are left out.

    Args:
        parameters: whose values are remembered. Their storage is kept; one that gets another is told by its address.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        kinds: dict[tuple, list[torch.Tensor]] = {}
        for parameter in parameters:
            if _has_plain_values(parameter):
                values = parameter.detach().flatten()  # of the storage, not a copy: checked in `_has_plain_values`
                step = -(-len(values) // SAMPLE_SIZE)
                kinds.setdefault((values.device, values.dtype), []).append(values[::step])
        self._views = list(kinds.values())
        self._then = [torch.cat(views) for views in self._views]
        self._looks: list[OnTheWay] = []

    def has_changed(self, *, waits: bool = True) -> bool:
        """Whether one of the values is another now.

        Args:
            waits: for an accelerator to do all that it was told. Without it such values are compared on the way, and a
                change is told by a later call.
        """
        pairs = list(zip(self._views, self._then, strict=True))
        if not waits:
            pairs, others = _split(pairs)
            if self._changed_before(others):
                return True
        # not a number is equal to nothing, and is looked up anew each time
        return not all(torch.equal(torch.cat(views), then) for views, then in pairs)

    def _changed_before(self, pairs: list[_Pair]) -> bool:
        """What the last look has found, where that has arrived; then the next one is sent."""
        found = [look.get() for look in self._looks]
        if any(value is None for value in found):
            return False
        self._looks = [OnTheWay(torch.cat(views).ne(then).any()) for views, then in pairs]
        return any(bool(value) for value in found)


def _split(pairs: list[_Pair]) -> tuple[list[_Pair], list[_Pair]]:
    """Those whose values are at hand or must be waited for, and those that can come later."""
    later = [not at_hand(then) and can_come_later(then.device) for _, then in pairs]
    return (
        [pair for pair, late in zip(pairs, later, strict=True) if not late],
        [pair for pair, late in zip(pairs, later, strict=True) if late],
    )


def _has_plain_values(parameter: nn.Parameter) -> bool:
    plain = type(parameter.data) is torch.Tensor and parameter.layout is torch.strided
    return plain and not parameter.is_meta and parameter.numel() > 0 and parameter.is_contiguous()
