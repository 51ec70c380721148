"""The objective on images with captions: each image is told from the others by its caption, and the other way round.

Sources: CLIP's symmetric softmax loss (arXiv 2103.00020) and SigLIP's sigmoid loss (arXiv 2303.15343), both as
transformers computes them; texts that are negatives by intent join the captions, as in NegCLIP (arXiv 2210.01936).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def own_texts(image_texts: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Which texts of a batch belong to which of its images, because they are among their captions; (N, M) bool.

    Args:
        image_texts: (N, K), numbers of all captions of each image; -1 where it has fewer.
        texts: (M,), numbers of the texts.
    """
    own = torch.zeros(len(image_texts), len(texts), dtype=torch.bool, device=texts.device)
    for column in image_texts.T:  # (N,)
        own |= column[:, None] == texts
    return own


def softmax_loss(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, the mean of both directions::

        L = (mean_i CE(logits[i], i) + mean_i CE(logits[:, i], i)) / 2

    Column i < N is the caption that was drawn for image i, the others are hard negatives, which images alone are
    compared with. Another column with a text of the image's own (`own`) is left out: it is no negative of it.

    Args:
        logits: (N, M), M >= N, scaled by the model's scale.
        own: (N, M) bool, as `own_texts` gives it.

    Returns:
        (), without repeated captions and hard negatives what transformers' CLIP computes.
    """
    count = len(logits)
    told = logits.masked_fill(_repeated(own), float("-inf"))
    labels = torch.arange(count, device=logits.device)
    return (F.cross_entropy(told, labels) + F.cross_entropy(told[:, :count].T, labels)) / 2


def sigmoid_loss(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss, where each pair of an image and a text is a question of its own::

        L = - 1/N sum_ij log sigmoid(z_ij logits[i, j]),   z_ij = 1 where i = j, otherwise -1

    Args:
        logits, own: as for `softmax_loss`; the logits have the model's bias as well.

    Returns:
        (), without repeated captions and hard negatives what transformers' SigLIP computes.
    """
    signs = 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device) - 1
    terms = F.logsigmoid(signs * logits).masked_fill(_repeated(own), 0.0)
    return -terms.sum() / len(logits)


def _repeated(own: torch.Tensor) -> torch.Tensor:
    """Texts of an image's own in another column than its own, (N, M)."""
    return own & ~torch.eye(*own.shape, dtype=torch.bool, device=own.device)
