"""Fixtures of all tests, and how tests run; the models themselves are made in `small_clip`."""

from __future__ import annotations

import pytest
import torch
from small_clip import make_clip, make_images, make_texts
from transformers import CLIPModel
from transformers.utils import logging


logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny, and tests may run side by side


@pytest.fixture
def clip() -> CLIPModel:
    return make_clip()


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    return make_texts([5, 3, 9, 4])


@pytest.fixture
def images() -> torch.Tensor:
    return make_images(5)
