"""A GPU computes what the released code computed on a CPU, as exactly as its type of numbers allows."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from reference_files import CHECKPOINT, EXPECTED, LAYERS, REFERENCE
from transformers import CLIPModel

from sep_peft import SEPClassifier, convert_reference_checkpoint
from sep_peft.training import Recipe


pytestmark = pytest.mark.gpu
#: How far from what was computed in fp32 on a CPU, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device):
    folder = tmp_path_factory.mktemp("converted")
    clip = CLIPModel.from_pretrained(REFERENCE / "clip")
    convert_reference_checkpoint(CHECKPOINT, clip, folder, text_layers=LAYERS, vision_layers=LAYERS)
    return folder


@pytest.fixture
def make(folder, put):
    def make(dtype: torch.dtype = torch.float32) -> SEPClassifier:
        clip = put(CLIPModel.from_pretrained(REFERENCE / "clip", dtype=dtype))
        model = PeftModel.from_pretrained(clip, folder, is_trainable=True)
        texts = [put({"input_ids": EXPECTED[f"in.{name}_ids"]}) for name in ("class", "template")]
        classifier = SEPClassifier(model, *texts, recipe=Recipe.published())
        state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
        classifier.prototypes.data.copy_(state["VPT_fc.weight"])
        return classifier

    return make


def close(found: torch.Tensor, name: str, relative: float) -> None:
    expected, found = EXPECTED[name], found.detach().float().cpu()
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= relative * expected.abs().max(), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_embeddings_and_logits(dtype, make, put):
    classifier, images = make(dtype).eval(), put(EXPECTED["in.pixel_values"])
    towers = classifier.model.base_model.towers
    image = towers["vision"].embed(pixel_values=images.to(dtype))
    text = towers["text"].embed(input_ids=put(EXPECTED["in.class_ids"]))
    close(image.prompted, "out.image_adapted", TOLERANCE[dtype])
    close(image.frozen, "out.image_frozen", TOLERANCE[dtype])
    close(text.prompted, "out.text_adapted", TOLERANCE[dtype])
    close(classifier.encoder.frozen_embeds(), "out.text_frozen", TOLERANCE[dtype])
    close(classifier(images.to(dtype)).logits, "out.logits_eval", TOLERANCE[dtype])


def check_gradients(classifier: SEPClassifier, relative: float, scales: bool = True) -> None:
    """Those of prototypes, prompts and fusions; those of learned scales are sums of much that cancels out."""
    towers = classifier.model.base_model.towers
    close(classifier.prototypes.grad, "grad.VPT_fc.weight", relative)
    for tower, prompts, fusion in (("text", "ctx", "prompt_projections"), ("vision", "ctx_visual", "visual_prompts")):
        close(towers[tower].sep_prompts["default"].grad, f"grad.{prompts}", relative)
        for index, layer in enumerate(LAYERS):
            found = towers[tower].sep_fusion["default"][str(layer)]
            close(found.fc2.weight.grad, f"grad.{fusion}.{index}.mlp_pa_visual.c_proj.weight", relative)
            if scales:
                close(found.scale1.grad, f"grad.{fusion}.{index}.scale1", relative)


def test_loss_and_gradients(make, put):
    classifier = make().train()
    output = classifier(put(EXPECTED["in.pixel_values"]), put(EXPECTED["in.labels"]))
    close(output.loss, "out.loss", 1e-4)
    output.loss.backward()
    check_gradients(classifier, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_in_mixed_precision(dtype, make, put, device):
    """Autocast over fp32 weights; in fp16 with a scaled loss, whose gradients are then unscaled."""
    classifier = make().train()
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=2.0**10)
    with torch.autocast(device.type, dtype):
        loss = classifier(put(EXPECTED["in.pixel_values"]), put(EXPECTED["in.labels"])).loss
    close(loss, "out.loss", 3e-2)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    check_gradients(classifier, 0.2, scales=False)
    scaler.step(optimizer)
    scaler.update()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in parameters)
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True) if p.grad.any())
