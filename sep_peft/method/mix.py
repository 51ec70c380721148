"""SEP's embedding: the mix of what the prompted and the frozen tower make of one input."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for what is that already."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in `wide_dtype`."""
    return tensor.to(wide_dtype(tensor))


def unit(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (..., E) divided by their Euclidean length, computed in fp32 or wider and returned in their dtype."""
    return F.normalize(wide(embeddings), dim=-1).to(embeddings.dtype)


def mix_embeddings(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float | torch.Tensor) -> torch.Tensor:
    """SEP's embedding: ``unit(w * unit(frozen) + (1 - w) * unit(prompted))``, (B, E).

    ``frozen_weight=0.5`` is the published equal sum, 0 the prompted tower alone; (B, 1) holds one for each input.
    """
    return unit(frozen_weight * unit(frozen) + (1 - frozen_weight) * unit(prompted))


def frozen_share(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float | torch.Tensor) -> torch.Tensor:
    """How much of the frozen tower's *pooled* output makes the mix of `mix_embeddings` come out after the projection.

    For an affine projection P, ``P(c * b + (1 - c) * a) = c * P(b) + (1 - c) * P(a)``. With
    ``c = (w / |P(b)|) / (w / |P(b)| + (1 - w) / |P(a)|)`` that points where ``w * unit(P(b)) + (1 - w) * unit(P(a))``
    points, so the model's own projection, normalization and scale can follow unchanged.

    Args:
        prompted: P(a), (B, E), embeddings of the prompted tower.
        frozen: P(b), (B, E), embeddings of the frozen tower.
        frozen_weight: w; a number, or a tensor (B, 1) with one for each input.

    Returns:
        c, (B, 1), between 0 and 1, in fp32 or wider.
    """
    frozen_norm = torch.linalg.vector_norm(wide(frozen), dim=-1, keepdim=True)
    prompted_norm = torch.linalg.vector_norm(wide(prompted), dim=-1, keepdim=True)
    share = frozen_weight * prompted_norm
    return share / (share + (1 - frozen_weight) * frozen_norm)
