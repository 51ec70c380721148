"""Training and measuring: data, recipes and the loop."""

from ..method.recipe import Recipe
from .data import FixedViews, Images, random_crop_and_flip
from .fit import fit, make_optimizer


__all__ = ["FixedViews", "Images", "Recipe", "fit", "make_optimizer", "random_crop_and_flip"]
