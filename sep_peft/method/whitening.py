"""Whitening: a linear map of image embeddings after which cosines tell images of one class from others best.

Sources: probabilistic linear discriminant analysis with one covariance within classes and one between them (Ioffe,
"Probabilistic Linear Discriminant Analysis", ECCV 2006; Prince and Elder, ICCV 2007), with embeddings of unit length
afterwards (Garcia-Romero and Espy-Wilson, Interspeech 2011). Whitening that labels taught is what image retrieval does
after training a tower (Mikolajczyk and Matas, ICCV 2007; Radenovic, Tolias and Chum, arXiv 1711.02512).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .fit_heads import MIN_VARIANCE, class_means
from .mix import unit, wide


#: How much classes that were not seen are thought to differ in every direction, beside what those that were seen
#: differ in theirs; chosen on validation images, where classes that were not trained are found as well as before.
NEW_CLASSES = 1.0


@dataclass(frozen=True)
class Whitening:
    """``x -> unit(A (x - m))``.

    Args:
        mean: m, (E,).
        matrix: A, (E, E).

    Raises:
        ValueError: shapes do not fit, or a number is not finite.
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __post_init__(self):
        size = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if tuple(self.matrix.shape) != (size, size):
            raise ValueError(
                f"A whitening needs a mean (E,) and a matrix (E, E), but got {tuple(self.mean.shape)} and "
                f"{tuple(self.matrix.shape)}."
            )
        if not all(each.is_floating_point() and each.isfinite().all() for each in (self.mean, self.matrix)):
            raise ValueError("mean and matrix of a whitening must be finite floats, but some values are not.")

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., E) that compare with each other by their product, (..., E), of unit length.

        Raises:
            ValueError: they have another size.
        """
        if embeds.shape[-1] != len(self.mean):
            raise ValueError(
                f"The whitening is for embeddings of {len(self.mean)} numbers, but got {embeds.shape[-1]}."
            )
        return apply_whitening(embeds, self.mean, self.matrix)


def apply_whitening(embeds: torch.Tensor, mean: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``unit(A (x - m))`` of embeddings (..., E), with m (E,) and A (E, E)."""
    return unit((embeds - mean.to(embeds)) @ matrix.to(embeds).T)


def fit_whitening(embeds: torch.Tensor, labels: torch.Tensor) -> Whitening:
    """Fit a whitening on N images of C classes. ::

        A = (I + U^T (diag(g) - I) U) W,   W = (S + tr(S) / (N - 1) I)^(-1/2)
        g_k = h(b_k + b_0) / h(b_0),   h(b) = sqrt(b / (1 + 2 b))

    S is the covariance of the embeddings around their class means, shrunk as `gda` does; m is the mean of all. U (k, E)
    and b are directions and variances of the whitened class means, and ``b_0 = NEW_CLASSES sum_k b_k / E`` is what
    classes that were not seen are thought to vary by in any direction. Products of embeddings with variance 1 within a
    class and b between classes, weighed by ``h(b)^2``, are what the logarithm of the odds of "one class" against "two"
    says of a pair; the weight of what no class mean varies in is set to 1. Where every class has a single image, S is
    the covariance around the mean of all.

    Args:
        embeds: (N, E), of unit length.
        labels: (N,) class indices.

    Raises:
        ValueError: there are fewer than two classes.
    """
    known, labels = labels.unique(return_inverse=True)
    count, size, classes = len(embeds), embeds.shape[1], len(known)
    if classes < 2:
        raise ValueError(f"A whitening is fitted on images of two classes at least, but there are {classes}.")
    x = embeds.double()
    means, mean = class_means(x, labels, classes), x.mean(dim=0)  # (C, E), (E,)
    centred = x - (mean if classes == count else means[labels])
    within = centred.T @ centred / max(count - classes, 1)  # (E, E)
    shrink = within.trace().clamp_min(MIN_VARIANCE) / max(count - 1, 1)
    variances, axes = torch.linalg.eigh(within)
    white = axes * (variances.clamp_min(0) + shrink).rsqrt() @ axes.T  # (E, E), W
    spread, directions = torch.linalg.svd((means - means.mean(dim=0)) @ white, full_matrices=False)[1:]
    directions = directions[: classes - 1]  # (k, E), k <= C - 1
    between = spread[: classes - 1].square() / (classes - 1)
    anywhere = (NEW_CLASSES * between.sum() / size).clamp_min(1e-12)
    gains = _weight(between + anywhere) / _weight(anywhere)
    matrix = white + directions.T @ ((gains - 1)[:, None] * (directions @ white))
    return Whitening(mean.to(wide(embeds).dtype), matrix.to(wide(embeds).dtype))


def _weight(variance: torch.Tensor) -> torch.Tensor:
    """h of `fit_whitening`."""
    return (variance / (1 + 2 * variance)).sqrt()
