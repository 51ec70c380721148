"""What is known of each model family: where its towers are and how they behave. Data, and how a model finds its own."""

from .table import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION


__all__ = ["ARCHITECTURES", "DUAL_ENCODER_TEXT", "DUAL_ENCODER_VISION"]
