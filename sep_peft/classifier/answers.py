"""What is said of an image: its best classes, a set that holds its class as often as is promised, or none of these.

**None of these.** The rule compares the logit of each class with the one that images of this class typically get, and
takes the class that is ahead by most: standardized logits, as Jung, Lee, Gwak, Choi and Choo, "Standardized Max Logits"
(ICCV 2021), with the means of classes of few images drawn to that of all, and one spread. Some classes give large
logits to many images, and what is of no class goes to those. Images for which every class is further behind than it is
for nearly all held-out images look like no class. It was compared with the energy of Liu, Wang, Owens and Li (NeurIPS
2020), cosines, distances and the largest score (Hendrycks and Gimpel, ICLR 2017) on training images alone
(docs/scores.md). A calibration without typical logits goes by the energy.

**Sets.** Split conformal prediction with the score of the class itself as its conformity: Sadinle, Lei and Wasserman,
"Least Ambiguous Set-Valued Classifiers" (JASA 2019), after Vovk, Gammerman and Shafer (2005). Of n held-out images and
a new one that is drawn like them each is equally likely to have the lowest score, and so on. After cross-fitting the
held-out images are those of all parts together, as in cross-conformal prediction: Vovk, "Cross-conformal predictors"
(Annals of Mathematics and Artificial Intelligence, 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .calibration import Calibration, is_number, nearness
from .classes import TaskClasses
from .label_calibration import LabelCalibration, LabelScale


@dataclass(frozen=True)
class Answers:
    """What `predict` was asked for.

    Args:
        top_k: how many classes to name, best first; None: all, or those of the set. Where an image may have several
            classes, at most so many.
        min_score: of the best class, from 0 to 1; below it the answer is none of these. None: no limit. Where an image
            may have several classes, those with at least this score are named in the place of those above their own
            thresholds.
        unknown: whether the answer may be none of these by the rule of the calibration.
        coverage: how often the set is to hold the image's class, above 0 and below 1; None: no set.

    Raises:
        TypeError: `unknown` is no bool.
        ValueError: a value is not allowed, or both a set and a number of classes are asked for.
    """

    top_k: int | None = None
    min_score: float | None = None
    unknown: bool = False
    coverage: float | None = None

    def __post_init__(self):
        if not isinstance(self.unknown, bool):
            raise TypeError(f"unknown must be True or False, but got {self.unknown!r}.")
        if self.min_score is not None and not (is_number(self.min_score) and 0 <= self.min_score <= 1):
            raise ValueError(f"min_score must be a number from 0 to 1, but got {self.min_score!r}.")
        if self.coverage is None:
            return
        if not (is_number(self.coverage) and 0 < self.coverage < 1):
            raise ValueError(f"coverage must be a number above 0 and below 1, but got {self.coverage!r}.")
        if self.top_k is not None:
            raise ValueError(f"coverage chooses how many classes to name. Leave out top_k, which is {self.top_k}.")

    def check(self, classes: TaskClasses, calibration: Calibration | LabelCalibration | LabelScale | None) -> None:
        """
        Args:
            classes: to tell apart.
            calibration: of their logits, or where an image may have several of them the scale of these logits; None:
                there is none, as for zero-shot.

        Raises:
            ValueError: a set or the rule is asked for, and the calibration has nothing to go by, or an
                image may have several of them; or their scores are not known.
        """
        if classes.multi_label:
            self._check_labels(calibration)
            return
        assert calibration is None or isinstance(calibration, Calibration), "others are of several labels"
        for name, asked, known in (
            ("unknown=True", self.unknown, calibration is not None and calibration.knows_strangers),
            ("coverage", self.coverage is not None, calibration is not None and calibration.label_scores),
        ):
            if asked and not known:
                raise ValueError(
                    f"{name} needs held-out images of these classes, but their calibration has none. It is made for "
                    "the classes that an adapter is trained on, by fit or sep_peft.training.calibrate."
                )

    def _check_labels(self, calibration: object) -> None:
        """
        Raises:
            ValueError: what is asked for is for classes of which an image has one, or there is no calibration.
        """
        for name, asked in (("unknown=True", self.unknown), ("coverage", self.coverage is not None)):
            if asked:
                raise ValueError(
                    f"{name} is for classes of which an image has one. Where it may have several, those are named "
                    "whose scores reach their thresholds, or min_score, and an empty list is none of these."
                )
        if calibration is None:
            raise ValueError(
                "Where an image may have several classes, scores need a calibration, and there is none. fit makes one, "
                "and so does sep_peft.training.calibrate."
            )

    def of(
        self,
        logits: torch.Tensor,
        classes: TaskClasses,
        calibration: Calibration | LabelCalibration | None,
        scale: LabelScale | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Logits (B, C) -> for each sample its classes with their scores, best first; nothing for none of these.

        Args:
            logits: as calibrated.
            classes: that the logits are of.
            calibration: that they were calibrated by; None: they were not.
            scale: where an image may have several of the classes, the one that they were calibrated by.

        Raises:
            FloatingPointError: logits are not finite, so there are no scores.
            ValueError: as `check`.
        """
        if not logits.isfinite().all():
            raise FloatingPointError(
                "The logits are not finite. A weight of the model or its adapter is not, or one overflows in "
                f"{logits.dtype}; run the model in torch.float32 or load its files again."
            )
        if classes.multi_label:
            self._check_labels(scale)
            return self._labels(logits, classes, scale)
        self.check(classes, calibration)
        assert not isinstance(calibration, LabelCalibration), "which is of several labels"
        scores, indices = logits.softmax(dim=-1).topk(len(classes) if self.top_k is None else self.top_k, dim=-1)
        counts = self._counts(logits, scores, calibration)
        return [
            [{"label": classes.names[i], "score": score} for score, i in list(zip(own, places, strict=True))[:count]]
            for own, places, count in zip(scores.tolist(), indices.tolist(), counts.tolist(), strict=True)
        ]

    def _labels(
        self, logits: torch.Tensor, classes: TaskClasses, scale: LabelScale | None
    ) -> list[list[dict[str, Any]]]:
        """Of calibrated logits (B, C) the classes that reach their thresholds, best first, at most `top_k`."""
        assert scale is not None, "checked above"
        least = torch.tensor(scale.thresholds if self.min_score is None else [self.min_score], dtype=torch.float64)
        scores = logits.sigmoid().double().cpu()
        named = scores >= least
        ranked = scores.masked_fill(~named, -1.0).sort(dim=1, descending=True, stable=True)
        counts = named.sum(dim=1).clamp_max(len(classes) if self.top_k is None else self.top_k)
        return [
            [{"label": classes.names[i], "score": score} for score, i in list(zip(own, places, strict=True))[:count]]
            for own, places, count in zip(ranked.values.tolist(), ranked.indices.tolist(), counts.tolist(), strict=True)
        ]

    def _counts(self, logits: torch.Tensor, scores: torch.Tensor, calibration: Calibration | None) -> torch.Tensor:
        """How many of the scores (B, K), best first, are named for each sample, (B,)."""
        counts = torch.full(scores.shape[:1], scores.shape[1], device=scores.device)
        if calibration is not None and self.coverage is not None:
            # the best class is always in the set, which makes it hold the image's class more often
            counts = (scores >= calibration.least_score(self.coverage)).sum(dim=1).clamp_min(1)
        rejected = torch.zeros_like(counts, dtype=torch.bool)
        if self.min_score is not None:
            rejected |= scores[:, 0] < self.min_score
        if calibration is not None and self.unknown:
            rejected |= _is_strange(logits, calibration)
        return counts.masked_fill(rejected, 0)


def _is_strange(logits: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """Which samples of calibrated logits (B, C) look like no class, (B,)."""
    if calibration.least_nearness is not None:
        return nearness(logits, calibration.typical_logits) < calibration.least_nearness
    assert calibration.least_energy is not None, "checked before"
    return energies(logits) < calibration.least_energy


def energies(logits: torch.Tensor) -> torch.Tensor:
    """``log sum exp`` of calibrated logits (B, C), (B,): large where an image looks like a class."""
    return logits.logsumexp(dim=-1)
