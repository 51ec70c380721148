"""What transformers' `Trainer` asks of the model it trains, beside its forward."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import distributed, nn

from ..tracing import is_traced
from ..tuner.model import PREFIX, find_towers
from .card import TAGS


logger = logging.getLogger(__name__)


#: Attributes that are those of the model below: its configuration, how its layers are checkpointed, and where they are.
#: Where the model has none, neither has the classifier: Trainer looks for them by `hasattr`.
OF_THE_MODEL = (
    "activation_checkpointing_disable",
    "activation_checkpointing_enable",
    "config",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "hf_device_map",
    "is_activation_checkpointing",
    "is_gradient_checkpointing",
    "quantization_method",
)


class TrainerMixin(nn.Module):
    """A module that Trainer takes as it takes a `PeftModel`; what it trains is its child `model`."""

    model: nn.Module

    #: Tells Trainer that `forward` takes `num_items_in_batch` and normalizes the loss by it.
    accepts_loss_kwargs = True
    #: What `include_for_metrics=["inputs"]` and the count of inputs take of a batch.
    main_input_name = "pixel_values"
    #: For the card of a model that Trainer uploads.
    model_tags = TAGS
    #: Keys that may be missing in a checkpoint; Trainer asks before it warns of missing ones.
    _keys_to_ignore_on_save = None

    _told = False  # see `tell_that_there_is_no_loss`

    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(_leave_base_out)
        self.register_load_state_dict_post_hook(_base_may_be_missing)

    def __getattr__(self, name: str) -> Any:
        if name in OF_THE_MODEL:
            return getattr(super().__getattr__("model"), name)
        return super().__getattr__(name)

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the text tower, to which `neftune_noise_alpha` adds noise; images have none."""
        return cast(Any, find_towers(self.model)["text"].base_layer).get_input_embeddings()

    def tell_that_there_is_no_loss(self) -> None:
        """Say once, in the log, that a training step without labels leaves the objective of SEP out."""
        if self.training and torch.is_grad_enabled() and not is_traced() and not self._told:
            self._told = True
            logger.warning(
                "The classifier trains without labels, so SEP's objective is not computed: neither the consistency "
                "with the frozen model nor the prototypes are trained. Trainer's label_smoothing_factor and "
                "compute_loss_func keep the labels back and take the logits alone."
            )

    # Accelerate marks a model that it has prepared for evaluation as prepared for training too, and then hands it out
    # without DistributedDataParallel: every process would train on its own images alone.

    @property
    def _is_accelerate_prepared(self) -> bool:
        return vars(self).get("_prepared", False) and not _needs_wrapping(self)

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, prepared: bool) -> None:
        vars(self)["_prepared"] = prepared


def _of_the_base(classifier: nn.Module) -> set[str]:
    """Names of the base model's frozen parameters. They come with the base model, so the state of a classifier, of
    which Trainer makes checkpoints, is without them."""
    named = cast(nn.Module, classifier.model).named_parameters(remove_duplicate=False)
    own = (f".{PREFIX}", ".modules_to_save.")
    return {f"model.{name}" for name, p in named if not p.requires_grad and not any(part in name for part in own)}


def _leave_base_out(classifier: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Of a state dict, whatever the classifier is a part of."""
    names = {prefix + name for name in _of_the_base(classifier)}
    for key in [key for key in state if key in names or _above(key, names)]:
        del state[key]


def _above(key: str, names: set[str]) -> bool:
    """Whether a key belongs to one of the names, as the scales of quantized weights do, such as `weight.absmax`."""
    return any(key[:end] in names for end, letter in enumerate(key) if letter == ".")


def _base_may_be_missing(classifier: nn.Module, found: Any) -> None:
    """When a state is loaded: keys that no state has are not missing."""
    names = _of_the_base(classifier)
    found.missing_keys[:] = [key for key in found.missing_keys if not _ends_in(key, names)]


def _ends_in(key: str, names: set[str]) -> bool:
    """Whether a key is one of the names, after the path of the classifier in a larger module."""
    return key in names or any(key[end + 1 :] in names for end, letter in enumerate(key) if letter == ".")


def _needs_wrapping(model: nn.Module) -> bool:
    """Whether processes that train this model together exchange gradients by a wrapper around it, as DDP does."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule  # where processes run, torch has it

    return not isinstance(model, FSDPModule)  # which exchanges them from inside
