"""How many tokens a tower has, as far as its configuration and its weights tell before it runs."""

from __future__ import annotations

from torch import nn

from ..families.spec import TowerSpec
from .wrappers import count_positions, layer_lists


#: Modules whose parameters are as wide as the tower and join no tokens.
NO_VECTORS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.MultiheadAttention)


def most_tokens(tower: nn.Module, spec: TowerSpec) -> int | None:
    """A number that the tokens of a tower never exceed, prompts not counted; None where nothing tells one.

    Each token of a text has a position. An image of the configured size has its patches, and before them learned
    vectors such as CLS; a tower may hold further vectors that are no tokens, so the number may be too large by a few.
    """
    if spec.inputs == "input_ids":
        if spec.positions is not None:
            return count_positions(tower.get_submodule(spec.positions))
        positions = getattr(tower.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None
    patches = count_patches(tower)
    if patches is None:
        return None
    learned = _learned_vectors(tower, spec)
    # the positions of all patches are among them, or positions are not learned
    return sum(learned) + (0 if max(learned, default=0) >= patches else patches)


def count_patches(tower: nn.Module) -> int | None:
    """Patches of an image of the configured size; None where the size is open."""
    size, patch = getattr(tower.config, "image_size", None), getattr(tower.config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    return (size // patch) ** 2


def count_image_tokens(tower: nn.Module) -> int | None:
    """Tokens of an image of the configured size in every layer, CLS not counted; None where the size is open."""
    patches = count_patches(tower)
    groups = getattr(tower.config, "num_output_groups", ())  # GroupViT's later stages see groups in place of patches
    return None if patches is None else min([patches, *groups])


def _learned_vectors(tower: nn.Module, spec: TowerSpec) -> list[int]:
    """How many vectors of the tower's width each parameter and embedding outside of the layers holds."""
    width = getattr(tower.config, spec.hidden_size)
    inside = {module for layers in layer_lists(tower, spec.layers) for module in layers.modules()}
    return [
        parameter.numel() // width
        for module in tower.modules()
        if module not in inside and not isinstance(module, NO_VECTORS)
        for parameter in module.parameters(recurse=False)
        if parameter.shape[-1:] == (width,)
    ]
