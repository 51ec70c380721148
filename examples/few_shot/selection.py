"""An ablation of SEP: tokens drawn at random stand in for the representative ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from sep_peft.tuner import passes


@contextmanager
def random_selection(seed: int = 0) -> Iterator[None]:
    """While it lasts, each fusion reads distinct tokens drawn at random instead of the selected ones.

    For images any token may be drawn, for texts any between the first candidate and the end. Draws follow a generator
    of their own, which starts anew with the context, so a run can be repeated.
    """
    generator = torch.Generator().manual_seed(seed)

    def any_tokens(hidden: torch.Tensor, count: int, *args, **kwargs) -> torch.Tensor:
        order = torch.rand(hidden.shape[:2], generator=generator).argsort(dim=1)  # (B, L)
        return order[:, :count].to(hidden.device)

    def any_following(start: torch.Tensor, end: torch.Tensor, count: int) -> torch.Tensor:
        share = torch.rand((len(start), count), generator=generator).to(start.device)
        return start[:, None] + (share * (end - start + 1)[:, None]).long()  # (B, count)

    with mock.patch.multiple(passes, largest_tokens=any_tokens, following_tokens=any_following):
        yield
