"""What decided: how much each patch of an image adds to the score of a class, by integrated gradients.

Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017). It was chosen by deletion and
insertion tests; docs/explanations.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..method.mix import wide
from ..tuner.tower import SEPTower
from .logits import ClassWeights
from .patches import PatchGrid
from .prediction import image_logits


#: Places between the plain image and the image at which gradients are taken.
STEPS = 16
#: Bytes that the backward pass may keep of all places that are computed together.
KEPT_BYTES = 2**30
#: Numbers that the backward pass of a layer keeps of a token and channel, without attention maps: Korthikanti et al.,
#: "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.1.
KEPT_NUMBERS = 17


def attribute(
    tower: SEPTower, inputs: Mapping[str, torch.Tensor], grid: PatchGrid, weights: ClassWeights, label: int
) -> torch.Tensor:
    """How much each patch adds to the log odds of a class, above a plain image of the mean color; in evaluation.

    The sum over all patches is the difference between both images, as far as sixteen places tell. Gradients go through
    both branches, the frozen one as well; no gradient of a parameter is made.

    Args:
        tower: of the images, whose active or chosen adapter predicts.
        inputs: of one image, what the tower takes.
        grid: of the image.
        weights: of the C classes.
        label: index of the class.

    Returns:
        (rows, columns), in nats, on the CPU.
    """
    image = inputs["pixel_values"]
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}

    def score(images: torch.Tensor) -> torch.Tensor:
        repeated = {name: _repeat(value, len(images)) for name, value in others.items()}
        logits = image_logits(tower, {"pixel_values": images, **repeated}, weights, through_frozen=True)
        # where an image may have several classes, a logit is the log odds of its class
        return log_odds(logits, label) if weights.sigmoids is None else logits[:, label]

    effects = integrate_gradients(score, grid.plain(image), image, _together(tower, grid))
    return grid.sums(effects).float().cpu()


def integrate_gradients(
    score: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, end: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """``(end - start)`` times the mean gradient of a score on the straight way between the two.

    Args:
        score: (B, ...) -> (B,), each of its own input.
        start, end: (1, ...).
        batch_size: places whose gradients are taken together.

    Returns:
        (1, ...), in fp32 or wider.
    """
    total = torch.zeros_like(wide(end))
    places = (torch.arange(STEPS, device=end.device) + 0.5) / STEPS  # middles of equal stretches
    for some in places.to(end.dtype).split(batch_size):
        with torch.enable_grad():
            inputs = torch.lerp(start, end, some.view(-1, *[1] * (end.ndim - 1))).requires_grad_()  # (B,) -> (B, 1, ..)
            (gradients,) = torch.autograd.grad(score(inputs).sum(), inputs)
        total += wide(gradients).sum(dim=0, keepdim=True)
    return total / STEPS * (wide(end) - wide(start))


def log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """Logits (B, C) -> ``log(p / (1 - p))`` of one class, (B,); its logit where there is no other class."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)  # (B, C - 1)
    return logits[:, label] - others.logsumexp(dim=1)


def _together(tower: SEPTower, grid: PatchGrid) -> int:
    """Places whose gradients are taken together: as many as `KEPT_BYTES` hold, of both branches."""
    settings = tower.active_settings
    if settings is not None and settings.batch_coupled:  # what stands in one batch would be one input
        return 1
    bytes_of_one = 2 * 4 * KEPT_NUMBERS * grid.count * tower.hidden_size * tower.num_layers
    return min(STEPS, max(1, KEPT_BYTES // bytes_of_one))


def _repeat(value, count: int):
    """An input of one image for `count` of them; anything but a tensor (1, ...) belongs to all."""
    has_sample = isinstance(value, torch.Tensor) and value.ndim and len(value) == 1
    return value.expand(count, *[-1] * (value.ndim - 1)) if has_sample else value
