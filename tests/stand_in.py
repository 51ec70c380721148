"""A device that is not there in the place of a GPU: its tensors have shapes and no values.

Operations on tensors of two devices fail as on a GPU, and where the host would have to wait for values the place in the
code is noted. It is made known to torch for the whole process, so it belongs into one of its own (`fresh`).
"""

from __future__ import annotations

import sys
import traceback
import warnings
from types import SimpleNamespace

import torch
import transformers.utils.import_utils as of_transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sep_peft.classifier import value_sample
from sep_peft.classifier.following import Following


DEVICE = "absent"
#: Operations whose result the host has to know: their name -> what is taken for it.
READS = {"_local_scalar_dense": 1, "equal": True, "is_nonzero": True}


class Event:
    """Of a stream that has done everything: what was noted by then is there."""

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True


_setup_privateuseone_for_python_backend(DEVICE)
sys.modules[f"torch.{DEVICE}"] = SimpleNamespace(
    Event=Event, current_stream=lambda device: None, is_available=lambda: False, is_initialized=lambda: False
)
setattr(torch, DEVICE, sys.modules[f"torch.{DEVICE}"])
of_transformers.is_fake_tensor = lambda x: False  # which is taken for a trace, where values are not read
value_sample._has_plain_values = lambda parameter: parameter.numel() > 0  # as those of a real device have
warnings.filterwarnings("ignore", message=".*data pointer.*|.*data_ptr.*")


class Waits(TorchDispatchMode):
    """In the block operations on the device work, and `places` gets "operation at file:line" where the host waits.

    The file is the innermost one of this package or of transformers that has led to it.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, leaves = function.overloadpacket.__name__, tree_leaves((args, kwargs))
        to = kwargs.get("device")
        there = to is not None and torch.device(to).type == DEVICE
        if not there and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return function(*args, **kwargs)  # on the host
        if name in READS:
            return self._note(name) or READS[name]
        if name == "_to_copy" and to is not None and args[0].device.type != torch.device(to).type:
            if not kwargs.get("non_blocking"):
                self._note(f"copy to {torch.device(to).type}")
            if not there:  # values that have come to the host
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            return function(*args, **kwargs)

    def _note(self, what: str) -> None:
        frames = [
            frame
            for frame in traceback.extract_stack()
            if "sep_peft/" in frame.filename or "/transformers/" in frame.filename
        ]
        place = frames[-1].filename.rpartition("site-packages/")[2].rpartition("/sep_peft/")[2]
        self.places.append(f"{what} at {place}:{frames[-1].lineno} {frames[-1].line}")

    def move(self, root: nn.Module) -> None:
        """Put a module and what follows it onto the device."""
        moved: dict[int, nn.Parameter] = {}
        for module in root.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in moved:
                        moved[id(parameter)] = nn.Parameter(self.there(parameter), parameter.requires_grad)
                    module._parameters[name] = moved[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.there(buffer)
            if isinstance(module, Following):
                module.following = {name: self.there(tensor) for name, tensor in module.following.items()}

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape on the device."""
        tensor = tensor.detach()
        with self.fake:
            return self.fake.from_tensor(tensor).to(DEVICE)
