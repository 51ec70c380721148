"""Towers that start at layers of their own: each works as in a model whose one `start_layer` is its own."""

from __future__ import annotations

import pytest
import torch
from copies import made_once
from peft import PeftModel, get_peft_model
from small_classifier import CLASSES, LABELS, TEMPLATES
from small_clip import make_clip, make_images, make_texts, perturb
from typer import BadParameter

from sep_peft import SEPClassifier, SEPConfig, TrunkCache
from sep_peft.cli.options import read_start_layers
from sep_peft.tuner.model import find_towers


STARTS = {"text": 1, "vision": 2}
INPUTS = {
    "text": dict(zip(("input_ids", "attention_mask"), make_texts([5, 3, 9, 4]).values(), strict=True)),
    "vision": {"pixel_values": make_images(3)},
}
OPTIONS = {"num_text_prompts": 3, "num_vision_prompts": 2}


@made_once
def make_model(start_layer: int | dict[str, int], **options) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(make_clip(), SEPConfig(start_layer=start_layer, **OPTIONS, **options))
    perturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return make_model(STARTS)


@torch.no_grad()
@pytest.mark.parametrize("modality", STARTS)
def test_each_tower_equals_one_of_a_single_number(model, modality):
    tower = find_towers(model)[modality]
    single = find_towers(make_model(STARTS[modality]))[modality]
    single.load_state_dict(tower.state_dict())
    assert tower.sep_settings["default"].fusion_layers == tuple(range(STARTS[modality] + 1, tower.num_layers))
    for found, expected in zip(tower.embed(**INPUTS[modality]), single.embed(**INPUTS[modality]), strict=True):
        assert torch.equal(found, expected)
    other = find_towers(make_model(0))[modality]
    assert not torch.allclose(tower.embed(**INPUTS[modality])[0], other.embed(**INPUTS[modality])[0], atol=1e-4)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_clip(), tmp_path).eval()
    assert loaded.peft_config["default"].start_layer == STARTS
    inputs = INPUTS["text"] | INPUTS["vision"]
    assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


@torch.no_grad()
def test_a_batch_of_several_adapters(model):
    both = make_model(STARTS)
    both.add_adapter("other", SEPConfig(start_layer={"vision": 1}, **OPTIONS))
    mixed = both.get_image_features(**INPUTS["vision"], adapter_names=["default", "other", "__base__"]).pooler_output
    for index, name in enumerate(["default", "other"]):
        both.set_adapter(name)
        alone = both.get_image_features(pixel_values=INPUTS["vision"]["pixel_values"][index : index + 1]).pooler_output
        torch.testing.assert_close(mixed[index], alone[0], rtol=1e-5, atol=1e-6)


def step(classifier: SEPClassifier, **inputs) -> list[torch.Tensor]:
    """The loss and the gradients of one training step."""
    classifier.zero_grad()
    loss = classifier.train()(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in classifier.parameters() if p.grad is not None)]


@pytest.mark.parametrize("starts", [STARTS, {"vision": 2}], ids=str)
def test_a_step_on_a_cached_trunk(starts):
    classifier = SEPClassifier(make_model(starts), CLASSES, TEMPLATES, prototype_weight=0.0)
    images = make_images(5)
    expected = step(classifier, pixel_values=images, labels=LABELS)
    samples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, LABELS, strict=True)]
    cache = TrunkCache(classifier.model, samples)
    found = step(classifier, **torch.utils.data.default_collate([cache[index] for index in range(5)]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_cache_asks_for_the_image_tower():
    """Where its prompts enter at 0 there is no trunk, whatever the text tower's start."""
    cache = TrunkCache(make_model({"text": 2}), [{"pixel_values": make_images(1)[0], "labels": 0}])
    assert sorted(cache[0]) == ["frozen_embeds", "labels", "pixel_values"]


@pytest.mark.parametrize(("modality", "fused"), [("text", [2]), ("vision", [3])])
def test_fusions_are_traced_in_layers_above_the_own_start(model, modality, fused):
    trace: dict = {}
    find_towers(model)[modality].embed(**INPUTS[modality], trace=trace)
    assert list(trace) == fused


def test_the_command_line_reads_one_or_one_for_each():
    assert read_start_layers("9") == 9
    assert read_start_layers("text=9,vision=18") == {"text": 9, "vision": 18}
    assert read_start_layers("vision=18") == {"vision": 18}
    for text in ("", "x", "text=", "image=3", "text=1,text=2", "9,18", "text=1,", "text=1.5"):
        with pytest.raises(BadParameter) as raised:
            read_start_layers(text)
        needed = "must be a whole number, or one for each tower, such as text=9,vision=18"
        assert raised.value.message == f"{needed}, but got {text!r}."
