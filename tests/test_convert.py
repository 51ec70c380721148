"""The authors' checkpoints: what their code computed (tests/data/reference) comes out again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from reference_files import CHECKPOINT, EXPECTED, LAYERS, REFERENCE
from small_classifier import raises
from transformers import CLIPModel

from sep_peft import AdapterMismatchError, SEPClassifier, SEPConfig, convert_reference_checkpoint
from sep_peft.training import Recipe
from sep_peft.tuner.convert import FUSION_RENAMES, PACKED, TOWERS
from sep_peft.tuner.save_id import read_save_id


def reference_clip() -> CLIPModel:
    return CLIPModel.from_pretrained(REFERENCE / "clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_reference_checkpoint(CHECKPOINT, reference_clip(), folder, text_layers=LAYERS, vision_layers=LAYERS)
    return folder


@pytest.fixture
def classifier(folder) -> SEPClassifier:
    model = PeftModel.from_pretrained(reference_clip(), folder, is_trainable=True)
    return SEPClassifier(
        model,
        {"input_ids": EXPECTED["in.class_ids"]},
        {"input_ids": EXPECTED["in.template_ids"]},
        recipe=Recipe.published(),
    )


def test_weights_and_configuration_of_two_conversions_are_told_apart(folder, tmp_path):
    """Their save ids differ, as those of any two saves."""
    convert_reference_checkpoint(CHECKPOINT, reference_clip(), tmp_path, text_layers=LAYERS, vision_layers=LAYERS)
    assert read_save_id(tmp_path / SAFETENSORS_WEIGHTS_NAME) == read_save_id(folder / SAFETENSORS_WEIGHTS_NAME)
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["state_dict"]["ctx"] += 1
    torch.save(checkpoint, tmp_path / "other.tar")
    other = tmp_path / "other"
    convert_reference_checkpoint(
        tmp_path / "other.tar", reference_clip(), other, text_layers=LAYERS, vision_layers=LAYERS
    )
    shutil.copy(folder / CONFIG_NAME, other)
    with raises(
        f"{other / SAFETENSORS_WEIGHTS_NAME} and {other / CONFIG_NAME} belong to two different saves: a save was "
        "interrupted while it replaced an older one. Save again, or copy or download all files of one save."
    ):
        PeftModel.from_pretrained(reference_clip(), other)


def close(found: torch.Tensor, name: str, relative: float = 1e-4) -> None:
    expected = EXPECTED[name]
    assert (found - expected).abs().max() <= relative * expected.abs().max(), name


def test_features(classifier):
    towers = classifier.model.base_model.towers
    with torch.no_grad():
        image = towers["vision"].embed(pixel_values=EXPECTED["in.pixel_values"])
        text = towers["text"].embed(input_ids=EXPECTED["in.class_ids"])
        single = [towers["vision"].embed_prompted(x[None]) for x in EXPECTED["in.pixel_values"]]
    close(image.prompted, "out.image_adapted")
    close(image.frozen, "out.image_frozen")
    close(text.prompted, "out.text_adapted")
    close(torch.cat(single), "out.image_adapted_single")
    close(classifier.encoder.frozen_embeds(), "out.text_frozen")


def test_logits(classifier):
    with torch.no_grad():
        close(classifier.eval()(EXPECTED["in.pixel_values"]).logits, "out.logits_eval")


def test_class_texts_are_padded_as_the_released_code_pads(classifier):
    """Whatever padding the caller used: cut to the longest and filled with EOS gives the same."""
    ids = EXPECTED["in.class_ids"][:, :7]
    ids = ids.masked_fill(ids == 0, 95)
    short = SEPClassifier(classifier.model, {"input_ids": ids}, {"input_ids": EXPECTED["in.template_ids"]})
    with torch.no_grad():
        close(short.eval()(EXPECTED["in.pixel_values"]).logits, "out.logits_eval")


def test_loss_and_gradients(classifier):
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    classifier.prototypes.data.copy_(state["VPT_fc.weight"])
    output = classifier.train()(EXPECTED["in.pixel_values"], EXPECTED["in.labels"])
    close(output.loss, "out.loss")
    output.loss.backward()
    close(classifier.prototypes.grad, "grad.VPT_fc.weight", 1e-3)
    compared = {"grad.VPT_fc.weight"}
    for name, tower in classifier.model.base_model.towers.items():
        prompts, fusions = TOWERS[name]
        close(tower.sep_prompts["default"].grad, f"grad.{prompts}", 1e-3)
        compared.add(f"grad.{prompts}")
        for i, layer in enumerate(LAYERS):
            fusion = tower.sep_fusion["default"][str(layer)]
            found = {theirs: fusion.get_parameter(ours).grad for theirs, ours in FUSION_RENAMES.items()}
            for theirs, kind in PACKED.items():
                parts = [fusion.get_parameter(f"attention.{part}.{kind}").grad for part in ("query", "key", "value")]
                found[theirs] = torch.cat(parts)
            for theirs, gradient in found.items():
                close(gradient, f"grad.{fusions}.{i}.{theirs}", 1e-3)
                compared.add(f"grad.{fusions}.{i}.{theirs}")
    assert compared == {name for name in EXPECTED if name.startswith("grad.")}


def test_per_input(folder):
    """The same weights without `batch_coupled`: attention across the K tokens of each input."""
    config = SEPConfig.published(num_text_prompts=4, num_vision_prompts=3, text_layers=LAYERS, vision_layers=LAYERS)
    model = get_peft_model(reference_clip(), config)
    model.load_state_dict(PeftModel.from_pretrained(reference_clip(), folder).state_dict())
    towers = model.eval().base_model.towers
    with torch.no_grad():
        close(towers["vision"].embed_prompted(EXPECTED["in.pixel_values"]), "per_input.image_adapted")
        close(towers["text"].embed_prompted(EXPECTED["in.class_ids"]), "per_input.text_adapted")


def test_unused_entries_are_reported_and_the_base_is_untouched(tmp_path):
    clip = reference_clip()
    before = list(clip.state_dict())
    report = convert_reference_checkpoint(CHECKPOINT, clip, tmp_path, text_layers=LAYERS, vision_layers=LAYERS)
    assert list(clip.state_dict()) == before
    assert report.epoch == 50 and report.config.batch_coupled and report.config.text_layers == LAYERS
    assert {"VPT_fc.weight", "token_prefix", "token_suffix", "meta_net_.scale1"} < set(report.unused)
    assert all(
        "ln_pa_1_token" in x or ".3." in x or x.split(".")[0] not in ("prompt_projections", "visual_prompts")
        for x in report.unused
    )


@pytest.mark.parametrize(
    "missing", ["ctx", "visual_prompts.1.scale2", "prompt_projections.0.promt_attention_visual.in_proj_weight"]
)
def test_missing_entries_are_named(tmp_path, missing):
    data = torch.load(CHECKPOINT, weights_only=True)
    del data["state_dict"][missing]
    torch.save(data, tmp_path / "checkpoint")
    with pytest.raises(AdapterMismatchError, match=f"lacks .*{missing}"):
        convert_reference_checkpoint(tmp_path / "checkpoint", reference_clip(), tmp_path / "out", LAYERS, LAYERS)
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_numbers_that_overflow_in_half_precision_are_named(tmp_path, value):
    data = torch.load(CHECKPOINT, weights_only=True)
    name = "visual_prompts.1.scale2"
    data["state_dict"][name] = torch.full_like(data["state_dict"][name], value, dtype=torch.float32)
    torch.save(data, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=f"checkpoint holds numbers .* larger than 65504 in {name}"):
        convert_reference_checkpoint(tmp_path / "checkpoint", reference_clip(), tmp_path / "out", LAYERS, LAYERS)
    assert not os.path.exists(tmp_path / "out")


def test_too_few_fusions_for_the_layers(tmp_path):
    data = torch.load(CHECKPOINT, weights_only=True)
    data["state_dict"] = {k: v for k, v in data["state_dict"].items() if not k.startswith("prompt_projections.2.")}
    torch.save(data, tmp_path / "checkpoint")
    with pytest.raises(AdapterMismatchError, match=r"lacks entries .* prompt_projections\.2\.ln_pa_1_visual\.weight"):
        convert_reference_checkpoint(tmp_path / "checkpoint", reference_clip(), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "There is no checkpoint"),
        (b"not a checkpoint", ValueError, "cannot be read: it is cut short or damaged, or holds more than tensors"),
        ({"epoch": 1}, ValueError, 'holds no "state_dict"'),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, error, message):
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=message):
        convert_reference_checkpoint(path, reference_clip(), tmp_path / "out")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"state_dict": {"ctx": Evil()}}, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be read: it is cut short or damaged, or holds more than tensors"):
        convert_reference_checkpoint(tmp_path / "file", reference_clip(), tmp_path / "out")
    assert not (tmp_path / "evil").exists()
