"""The training objective; see `sep_peft.method.losses`."""

from .method.losses import PROTOTYPE_SCALE, SEPLoss, consistency, prototype_loss, sep_loss


__all__ = ["PROTOTYPE_SCALE", "SEPLoss", "consistency", "prototype_loss", "sep_loss"]
