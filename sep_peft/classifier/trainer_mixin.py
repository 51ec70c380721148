"""What transformers' `Trainer` asks of the model it trains, beside its forward."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import distributed, nn

from ..tracing import is_traced
from ..tuner.model import find_towers
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


def _needs_wrapping(model: nn.Module) -> bool:
    """Whether processes that train this model together exchange gradients by a wrapper around it, as DDP does."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule  # where processes run, torch has it

    return not isinstance(model, FSDPModule)  # which exchanges them from inside
