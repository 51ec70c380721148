"""Fixtures of all tests, and how tests run; the models themselves are made in `small_clip` and other helpers.

`conftest` registers it.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections import OrderedDict
from collections.abc import Iterator

import jinja2
import peft
import pytest
import torch
import torch._dynamo
import transformers
from bundled import ASSETS, NAMES
from peft import PeftModel, get_peft_model
from small_classifier import SMALL
from small_clip import make_clip, make_images, make_texts, perturb
from transformers import AutoProcessor, CLIPModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version, logging

from sep_peft import SEPClassifier, SEPConfig


logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny, and tests may run side by side
torch._dynamo.config.run_gc_after_compile = False  # a tenth of the compiler's time; `freeze` collects


def pytest_collection_finish() -> None:
    """What is imported stays, so collections of garbage, as at the end of every training, need not look through it."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def freeze() -> Iterator[None]:
    """The same for what the tests of a file imported, compiled and reported; their models are collected before."""
    yield
    gc.collect()
    gc.freeze()


def _copy_ordered(found: OrderedDict, memo: dict) -> OrderedDict:
    """As `copy.deepcopy` copies it, in a fifth of the time: a module has a dozen of them, most without an entry."""
    made = memo[id(found)] = OrderedDict()
    for key, value in found.items():
        made[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
    return made


copy._deepcopy_dispatch[OrderedDict] = _copy_ordered  # tests copy models thousands of times

#: Hundreds of model cards are written from the same two templates, which huggingface_hub compiles for each.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)


@pytest.fixture
def clip() -> CLIPModel:
    return make_clip()


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    return make_texts([5, 3, 9, 4])


@pytest.fixture
def images() -> torch.Tensor:
    return make_images(5)


@pytest.fixture
def own_adapters() -> None:
    """For tests of a model's own `add_adapter`, `set_adapter` and so on; skips where transformers refuses this PEFT."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} with PEFT {peft.__version__}: {error}")


@pytest.fixture(scope="session")
def processor():
    """Of the bundled small CLIP."""
    return AutoProcessor.from_pretrained(ASSETS / "clip-small")


@pytest.fixture(scope="session")
def small_model() -> PeftModel:
    """The bundled small CLIP with SEP; tests must not change it."""
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(ASSETS / "clip-small"), SEPConfig.published(**SMALL))
    perturb(model, scale=0.02)
    return model


@pytest.fixture
def imaged(small_model, processor) -> SEPClassifier:
    """A classifier of `NAMES` over the bundled small CLIP."""
    return SEPClassifier.from_class_names(small_model, processor, NAMES).eval()
