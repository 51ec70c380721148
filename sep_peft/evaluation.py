"""Measuring a classifier; see `sep_peft.training.evaluation`."""

from .training.evaluation import Evaluation, evaluate


__all__ = ["Evaluation", "evaluate"]
