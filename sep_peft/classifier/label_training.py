"""What makes logits into log odds while a training runs whose images may have several labels."""

from __future__ import annotations

import torch
from torch import nn

from ..method.losses import PROTOTYPE_SCALE
from ..method.mix import unit
from .label_calibration import fit_scale


class TrainedSigmoids(nn.Module):
    """Slope and biases of the loss of several labels; a calibration on images that training did not see follows it.

    Args:
        count: of the classes, C.
    """

    def __init__(self, count: int):
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.biases = nn.Parameter(torch.zeros(count))
        self.prototype_biases = nn.Parameter(torch.zeros(count))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of texts (B, C) -> log odds (B, C)."""
        return self.log_slope.exp() * logits + self.biases

    @torch.no_grad()
    def start(
        self, logits: torch.Tensor, embeds: torch.Tensor, prototypes: torch.Tensor | None, targets: torch.Tensor
    ) -> None:
        """Begin with zero-shot as it is right most often on the training images: see `fit_scale`.

        Args:
            logits: (N, C), of zero-shot.
            embeds: frozen image embeddings, (N, E), of unit length.
            prototypes: as they begin, (C, E); None: there are none.
            targets: (N, C), 1 for the labels of each image and 0 for the other classes.
        """
        scale = fit_scale(logits, targets)
        self.log_slope.fill_(scale.slope).log_()
        self.biases.copy_(torch.tensor(scale.biases))
        if prototypes is not None:
            cosines = PROTOTYPE_SCALE * embeds @ unit(prototypes).T  # (N, C)
            shares = targets.float().mean(dim=0).clamp(1 / (2 * len(targets)), 1 - 1 / (2 * len(targets)))
            self.prototype_biases.copy_(shares.logit() - cosines.mean(dim=0))
