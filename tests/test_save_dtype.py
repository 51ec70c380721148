"""Adapters saved in fewer bytes: `save_dtype` and `cast_adapter`."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from small_classifier import IMAGES, contents, logits_of, make_classifier, raises
from small_clip import make_clip

from sep_peft import SEPClassifier, cast_adapter
from sep_peft.tuner.save_id import read_save_id


WEIGHTS, PROTOTYPES = "adapter_model.safetensors", "sep_prototypes.safetensors"
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_is_rounded_and_nothing_else_changes(dtype, tmp_path):
    classifier = make_classifier().keep_prototypes(1.0)
    full_folder, half_folder = tmp_path / "full" / "task", tmp_path / "half" / "task"  # whose name is in the card
    classifier.save_pretrained(full_folder)
    classifier.save_pretrained(half_folder, save_dtype=dtype)
    for name in (WEIGHTS, PROTOTYPES):
        full, half = load_file(full_folder / name), load_file(half_folder / name)
        assert full.keys() == half.keys()
        assert all(torch.equal(half[key], full[key].to(dtype)) and half[key].dtype == dtype for key in full)
    ids = {folder: read_save_id(folder / WEIGHTS).encode() for folder in (full_folder, half_folder)}
    assert ids[full_folder] != ids[half_folder]  # they are two saves
    others = [
        {k: v.replace(own, b"") for k, v in contents(folder).items() if "safetensors" not in k}
        for folder, own in ids.items()
    ]
    assert others[0] == others[1]
    with safe_open(half_folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sep_save_id": ids[half_folder].decode()}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_loaded_again_it_is_fp32_rounded(dtype, low, tmp_path):
    classifier = make_classifier()
    classifier.save_pretrained(tmp_path, save_dtype=dtype)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip(), low_cpu_mem_usage=low)
    for name, parameter in classifier.named_parameters():
        if ".sep_" in name:
            parameter.copy_(parameter.to(dtype))
            assert loaded.get_parameter(name).dtype == torch.float32, name
    assert torch.equal(logits_of(loaded), logits_of(classifier))


def test_an_adapter_that_peft_saved(tmp_path):
    model = make_classifier().model
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / WEIGHTS)
    cast_adapter(tmp_path, torch.bfloat16)
    cast_adapter(str(tmp_path), torch.float32)
    after = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(after[key], before[key].bfloat16().float()) for key in before)
    PeftModel.from_pretrained(make_clip(), tmp_path)(**{"pixel_values": IMAGES, "input_ids": torch.tensor([[61, 62]])})


def test_other_types():
    message = "save_dtype must be None or one of torch.float32, torch.bfloat16, torch.float16, but got torch.int8."
    with raises(message):
        make_classifier().save_pretrained("/nonexistent", save_dtype=torch.int8)
    with raises(message):
        cast_adapter("/nonexistent", torch.int8)


def test_values_too_large_leave_the_files_as_they_were(tmp_path):
    classifier = make_classifier()
    classifier.save_pretrained(tmp_path)
    before = contents(tmp_path)
    parameter = next(p for n, p in classifier.named_parameters() if "sep_prompts" in n)
    parameter.data.flatten()[0] = 1e5
    for dtype in (None, *HALVES):
        with pytest.raises(ValueError, match=r"^The adapter 'default' holds numbers that are .* larger than 65504 in "):
            classifier.save_pretrained(tmp_path, save_dtype=dtype)  # it could not be loaded
    assert contents(tmp_path) == before
    classifier.model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"has a value of 1e\+05, too large for torch.float16; take torch.bfloat16\.$"):
        cast_adapter(tmp_path, torch.float16)
    assert contents(tmp_path) == before
    cast_adapter(tmp_path, torch.bfloat16)


def test_nothing_to_cast(tmp_path):
    with raises(f"{tmp_path} holds no {WEIGHTS}.", FileNotFoundError):
        cast_adapter(tmp_path, torch.bfloat16)
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(SafetensorError, match="cut short"):
        cast_adapter(tmp_path, torch.bfloat16)
