"""`ClassSample`: which class texts a training step draws, and the last embeddings of all that it does not encode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..tracing import untraced
from .following import Following
from .value_sample import ValueSample, versions


#: Names of what is kept, among the tensors that follow the classifier and in its state.
EMBEDS, STEPS = "embeds", "steps"


class ClassSample(Following):
    """The last text embeddings of C classes, and how many steps have drawn some of them.

    Classes are drawn in turn: a round is a random order of all of them, cut into parts of at most the wanted size that
    differ by one class at most, and every step of the optimizer takes the next part. So a class has the same chance in
    every step, and no kept embedding is older than two rounds. Micro-batches of one step, and processes that train
    together, draw the same.

    That a step was made is told by `torch.optim.Optimizer`. Where something else has written to the parameters, such as
    a loader, all embeddings are made anew.

    Nothing of this is a parameter or a buffer. The state of the classifier has it, so checkpoints of Trainer do;
    adapters that are saved do not.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self._num_classes = num_classes
        self._key: tuple | None = None  # None: nothing is kept
        self._restored = False  # kept embeddings belong to the parameters as the next step finds them
        self._steps = 0
        self._watch(())

    def _watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the present values of parameters."""
        self._watched = list(parameters)
        self._versions, self._values = versions(self._watched), ValueSample(self._watched)

    def _has_changed(self, *, waits: bool = True) -> bool:
        """Whether one of the watched parameters has other values than when it was looked at last; see `ValueSample`."""
        return self._versions != versions(self._watched) or self._values.has_changed(waits=waits)

    def draw(self, size: int, seed: int) -> list[int]:
        """The classes of the present step, at most `size` of them, in ascending order.

        Args:
            size: from 1 to C.
            seed: of the rounds' orders.
        """
        parts = -(-self._num_classes // size)
        turn, part = divmod(self._steps, parts)
        order = torch.randperm(self._num_classes, generator=torch.Generator().manual_seed(seed + turn))
        return sorted(order[part::parts].tolist())

    def embeds(
        self,
        key: tuple,
        parameters: Iterable[nn.Parameter],
        compute: Callable[[], torch.Tensor],
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The kept embeddings (C, E), of unit length, without gradients; `refresh` writes to them.

        Args:
            key: what they depend on beside parameters; with another one the rounds begin anew.
            parameters: that they depend on.
            compute: makes all of them anew.
            like: has their shape, on their device.

        Raises:
            ValueError: what was taken up as a state has another shape.
        """
        parameters = list(parameters)
        known = self._key == key and [id(p) for p in parameters] == [id(p) for p in self._watched]
        if self._restored:
            if (found := tuple(self.following[EMBEDS].shape)) != tuple(like.shape):
                raise ValueError(
                    f"The kept class texts have the shape {found}, but the model's embeddings of the classes "
                    f"{tuple(like.shape)}: they were made with another base model. Begin the training anew."
                )
            self.following[EMBEDS] = self.following[EMBEDS].to(like.device)
            self._watch(parameters)
        elif not known or self._has_changed(waits=False):
            # the first part of another adapter's first round; after a change from outside the next part
            self._steps = self._steps + 1 if known else 0
            self.following[EMBEDS] = compute().clone()
            self._watch(parameters)
        self._key, self._restored = key, False
        with _lock:
            _kept.add(self)
        return self.following[EMBEDS]

    @torch.no_grad()
    def refresh(self, classes: torch.Tensor, embeds: torch.Tensor) -> None:
        """Keep the embeddings (S, E) of some classes (S,)."""
        kept = self.following[EMBEDS]
        kept.index_copy_(0, classes, embeds.detach().to(kept.dtype))

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has made a step; where it was on the parameters, the next draw is due."""
        own = {id(parameter) for parameter in self._watched}
        trained = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        if self._key is not None and trained and self._has_changed():
            self._steps += 1
            self._watch(self._watched)

    # state

    def state(self) -> dict[str, torch.Tensor]:
        """What a training that goes on needs: "embeds" (C, E) and "steps" (); nothing where no step has drawn."""
        if self._key is None and not self._restored:
            return {}
        return {EMBEDS: self.following[EMBEDS], STEPS: torch.tensor(self._steps)}

    def take_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave of a classifier whose parameters this one has, or has when it is next used.

        Args:
            state: empty: begin anew.

        Raises:
            ValueError: it is of another number of classes, or no state.
        """
        self._key, self._steps, self._restored = None, 0, bool(state)
        self.following.pop(EMBEDS, None)
        self._watch(())
        if not state:
            return
        embeds, steps = state.get(EMBEDS), state.get(STEPS)
        if embeds is None or steps is None or embeds.ndim != 2 or len(embeds) != self._num_classes or steps.ndim:
            self._restored = False
            shapes = {name: tuple(value.shape) for name, value in state.items()}
            raise ValueError(
                f"The kept class texts must be {EMBEDS} ({self._num_classes}, embedding size) and {STEPS} (), but got "
                f"{shapes}. Begin the training anew."
            )
        self.following[EMBEDS], self._steps = embeds.detach().clone(), int(steps)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose parameters are others of the same values."""
        same = self._restored or (self._key is not None and not self._has_changed())
        nothing = {"_watched": [], "_versions": (), "_values": ValueSample(())}
        return {**vars(self), "_restored": same, "_key": None, **nothing}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: value for name, value in self.state().items()}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        found = {name: state_dict.pop(prefix + name) for name in (EMBEDS, STEPS) if prefix + name in state_dict}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if found:
            try:
                self.take_state(found)
            except ValueError as error:
                errors.append(str(error))


_lock = threading.Lock()
#: All that keep something, to be told of steps.
_kept: WeakSet[ClassSample] = WeakSet()


@untraced
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    with _lock:
        kept = list(_kept)
    for sample in kept:
        sample.after_step(optimizer)


register_optimizer_step_post_hook(_after_step)
