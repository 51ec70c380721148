"""What makes logits into log odds while a training runs whose images may have several labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from ..method.losses import PROTOTYPE_SCALE
from ..method.mix import unit
from ..tuner.messages import shown
from .calibration import is_number
from .label_calibration import MAX_BIAS, fit_scale


#: Largest logarithm of a slope, either way: e^30 is far beyond what any training reaches, and its logits are finite.
MAX_LOG_SLOPE = 30.0


@dataclass(frozen=True)
class KeptSigmoids:
    """The values of `TrainedSigmoids`, as classes keep them: exactly, as JSON holds every fp32 number.

    Args:
        log_slope: logarithm of the slope of all logits.
        biases: one a class, added to the logits of the texts.
        prototype_biases: one a class, added to the logits of the prototypes in the loss.

    Raises:
        ValueError: a value is not allowed, or the numbers of both kinds of biases differ.
    """

    log_slope: float
    biases: tuple[float, ...]
    prototype_biases: tuple[float, ...]

    def __post_init__(self):
        if not (is_number(self.log_slope) and abs(self.log_slope) <= MAX_LOG_SLOPE):
            raise ValueError(
                f"log_slope of the sigmoids must be a number from {-MAX_LOG_SLOPE:g} to {MAX_LOG_SLOPE:g}, got "
                f"{shown(self.log_slope)}. Train with a lower learning rate."
            )
        for name in ("biases", "prototype_biases"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(is_number(each) and abs(each) <= MAX_BIAS for each in values):
                raise ValueError(
                    f"{name} of the sigmoids must be numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}, got {shown(values)}. "
                    "Train with a lower learning rate."
                )
        if len(self.biases) != len(self.prototype_biases):
            raise ValueError(
                "biases and prototype_biases of the sigmoids must be as many, but are "
                f"{len(self.biases)} and {len(self.prototype_biases)}."
            )

    def only(self, rows: Sequence[int]) -> KeptSigmoids:
        """Those of some classes, by their indices."""
        biases = (tuple(each[row] for row in rows) for each in (self.biases, self.prototype_biases))
        return KeptSigmoids(self.log_slope, *biases)

    def to_json(self) -> dict[str, Any]:
        """For the class file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> KeptSigmoids:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is something else, or a value is not allowed.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"sigmoids of the class list must have {', '.join(names)}, got {shown(data)}.")
        biases = (tuple(x) if isinstance(x := data[name], list) else x for name in names[1:])
        return cls(data[names[0]], *biases)


class TrainedSigmoids(nn.Module):
    """Slope and biases of the loss of several labels; a calibration on images that training did not see follows it.

    Args:
        count: of the classes, C.
        kept: values to begin with; None: a slope of 1 and no biases.
    """

    def __init__(self, count: int, kept: KeptSigmoids | None = None):
        super().__init__()
        kept = kept or KeptSigmoids(0.0, (0.0,) * count, (0.0,) * count)
        self.log_slope = nn.Parameter(torch.tensor(kept.log_slope))
        self.biases = nn.Parameter(torch.tensor(kept.biases))
        self.prototype_biases = nn.Parameter(torch.tensor(kept.prototype_biases))

    def keep(self) -> KeptSigmoids:
        """The values as they are.

        Raises:
            ValueError: one is not finite, or too large to be that of a training.
        """
        biases = (tuple(each.tolist()) for each in (self.biases, self.prototype_biases))
        return KeptSigmoids(self.log_slope.item(), *biases)

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


def train_alike(
    model: nn.Module,
    before: Sequence[nn.Module | nn.Parameter | None],
    after: Sequence[nn.Module | nn.Parameter | None],
) -> None:
    """Have what takes the place of parameters of the loss require gradients as these did.

    Args:
        model: whose parameters say it of what has nothing before it.
        before, after: modules or parameters in the same order; None: there is none.
    """

    def parameters(part: nn.Module | nn.Parameter | None) -> list[nn.Parameter]:
        return list(part.parameters()) if isinstance(part, nn.Module) else [part] if part is not None else []

    for old, new in zip(before, after, strict=True):
        trains = any(each.requires_grad for each in parameters(old) or model.parameters())
        for parameter in parameters(new):
            parameter.requires_grad_(trains)
