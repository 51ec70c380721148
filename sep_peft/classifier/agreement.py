"""`Agreement`: whether several processes have the same classes, by what DistributedDataParallel sends them anyway."""

from __future__ import annotations

import hashlib

import torch
from torch import distributed, nn

from ..tracing import is_traced
from .classes import TaskClasses


class Agreement(nn.Module):
    """Whether the classes of this process are those of the first one.

    Before a forward DistributedDataParallel copies the buffers of the first process to all others. The one buffer here
    is a number that stands for the classes; where another one arrives than was stated, the processes differ. A module
    that is called without DistributedDataParallel, or by one process, always agrees with itself.
    """

    number: torch.Tensor  # a buffer, ()

    def __init__(self):
        super().__init__()
        self._own = 0
        self.register_buffer("number", torch.zeros((), dtype=torch.int64), persistent=False)

    def state(self, classes: TaskClasses) -> None:
        """Remember what this process has from here on: names, texts, and how prototypes and margin count."""
        kept = None if classes.prototypes is None else tuple(classes.prototypes.shape)
        texts = classes.templates, classes.description_texts
        stated = classes.names, texts, kept, classes.prototype_logit_weight, classes.zero_shot_margin
        digest = hashlib.sha256(repr(stated).encode()).digest()
        self._own = int.from_bytes(digest[:7], "big")
        self.number.fill_(self._own)

    def check(self) -> None:
        """
        Raises:
            ValueError: the first process has other classes.
        """
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several and not is_traced() and int(self.number) != self._own:
            raise ValueError(
                "This process has other classes, prototypes or templates than the first one. Call set_classes, "
                "keep_prototypes and finish_training in every process, or evaluate in one process alone, without "
                "DistributedDataParallel."
            )
