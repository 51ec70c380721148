"""Training and measuring: data, recipes and the loop."""

from ..method.recipe import Recipe
from .data import CachedImages, EpochCallback, EpochDataset, EpochSampler, LabelledImages
from .evaluation import Evaluation, evaluate
from .fit import fit
from .loop import make_optimizer, make_schedule, train


__all__ = [
    "CachedImages",
    "EpochCallback",
    "EpochDataset",
    "EpochSampler",
    "Evaluation",
    "LabelledImages",
    "Recipe",
    "evaluate",
    "fit",
    "make_optimizer",
    "make_schedule",
    "train",
]
