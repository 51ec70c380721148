"""What fusions read in the place of representative tokens, and prompts that are learned before every layer."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb
from small_sep import IMAGES, SETTINGS, TEXTS, adapted, outputs

from sep_peft import SEPConfig
from sep_peft.method.independent import LearnedPrompts
from sep_peft.method.sources import ScatteredSelection, noise_tokens, scattered, segment_means


SOURCES = ["random", "mean", "noise"]


def test_scattered_numbers_are_uniform_and_always_the_same():
    numbers = scattered(torch.arange(50_000))
    assert numbers[:3].tolist() == scattered(torch.arange(3)).tolist()
    assert 0 <= numbers.min() and numbers.max() < 1
    assert (numbers.histc(20, 0, 1) / len(numbers) - 0.05).abs().max() < 0.005
    assert torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].abs() < 0.02


def test_noise_has_mean_0_and_variance_1_and_differs_by_layer():
    first, second = noise_tokens(6, 512, 1), noise_tokens(6, 512, 2)
    assert first.shape == (6, 512)
    for noise in (first, second):
        assert abs(noise.mean()) < 0.05 and abs(noise.var() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_segment_means_are_means_of_equal_stretches(count):
    hidden = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0]]).bool()
    found = segment_means(hidden, visible, count)
    for row, own in zip(found, (hidden[0], hidden[1, visible[1]]), strict=True):
        size = len(own)
        expected = [own[k * size // count : -(-(k + 1) * size // count)].mean(dim=0) for k in range(count)]
        torch.testing.assert_close(row, torch.stack(expected))


def test_random_tokens_are_distinct_and_visible():
    tokens = torch.zeros(3, 40, 2)
    visible = torch.ones(3, 40).bool()
    visible[1, 10:], visible[2, 3:] = False, False
    positions = ScatteredSelection().of_images(tokens, 5, visible)
    assert [len(set(row)) for row in positions.tolist()] == [5, 5, 3]
    assert positions[1].max() < 10 and positions[2].max() < 3
    assert torch.equal(ScatteredSelection().of_images(tokens, 5)[0], positions[0])
    first, last = torch.tensor([1, 1, 4]), torch.tensor([1, 30, 6])
    found = ScatteredSelection().of_texts(first, last, 40, 50)
    assert (found >= first[:, None]).all() and (found <= last[:, None]).all()
    assert [len(set(row)) for row in found.tolist()] == [1, len(set(found[1].tolist())), 3]
    assert len(set(found[1].tolist())) > 15
    message = (
        "41 prompts need 41 tokens to select from, but the input has only 40. Use fewer prompts (num_vision_prompts) "
        "or a larger image."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ScatteredSelection().of_images(tokens, 41)


@pytest.mark.parametrize("source", SOURCES)
def test_sources_have_the_parameters_of_selected_tokens_and_other_outputs(source):
    sizes = {"num_text_prompts": 3, "num_vision_prompts": 4}
    made = {}
    for tokens in ("selected", source):
        torch.manual_seed(0)
        model = get_peft_model(make_clip(), SEPConfig(**sizes, fusion_tokens=tokens))
        perturb(model)
        made[tokens] = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}, outputs(model)
    assert made["selected"][0] == made[source][0]
    assert (made["selected"][1] - made[source][1]).abs().max() > 1e-3


def test_noise_leaves_nothing_of_the_input_in_the_tokens_that_fusions_read():
    """One fusion before the last layer, of scale1 = 1 and scale2 = 1: the prompts are what it reads."""
    config = SEPConfig(num_text_prompts=0, num_vision_prompts=2, vision_layers=[3], fusion_tokens="noise")
    model = get_peft_model(make_clip(), config).eval()
    fusion = model.base_model.towers["vision"].sep_fusion["default"]["3"]
    seen = []
    for scale in (fusion.scale1, fusion.scale2):
        scale.data.fill_(1.0)
    fusion.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.get_image_features(make_images(3))
    torch.testing.assert_close(seen[0], noise_tokens(2, 48, 3).expand(3, -1, -1))


def test_independent_prompts_stand_before_every_layer_and_are_trained():
    model = get_peft_model(
        make_clip(), SEPConfig(num_text_prompts=3, num_vision_prompts=2, fusion="independent", text_layers=[2])
    )
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {re.sub(r".*(text|vision)_model\.sep_(.*?)\.default", r"\1 \2", n): tuple(p.shape) for n, p in found.items()}
    assert own == {
        "text prompts": (3, 32),
        "text fusion.2.prompts": (3, 32),
        "vision prompts": (2, 48),
        **{f"vision fusion.{layer}.prompts": (2, 48) for layer in (1, 2, 3)},
    }
    assert all(0.01 < p.std() < 0.03 for p in found.values())
    model(**TEXTS, pixel_values=IMAGES).logits_per_image.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in found.values())


def test_independent_prompts_of_the_published_setting_leave_what_says_nothing_unset():
    config = SEPConfig.published(fusion="independent", vision_layers=[2])
    assert (config.fusion_rank, config.fusion_hidden_size, config.vision_layers) == (4, 32, [2])
    assert SEPConfig.compact(fusion="independent").share_fusion is False


def test_more_means_than_tokens_are_allowed_and_more_selected_tokens_are_not():
    model = get_peft_model(make_clip(), SEPConfig(num_text_prompts=0, num_vision_prompts=12, fusion_tokens="mean"))
    assert model.get_image_features(IMAGES).pooler_output.isfinite().all()
    message = "num_vision_prompts must be at most 9, the number of tokens of an image to select from, but got 12."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_peft_model(make_clip(), SEPConfig(num_vision_prompts=12, fusion_tokens="random"))


@pytest.mark.parametrize("name", ["independent", *SOURCES])
@torch.no_grad()
def test_exported_graph_gives_the_same(name):
    model = adapted(name, vision_layers=2)  # the time of an export grows with the layers

    class Embed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, pixel_values):
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values
            ).logits_per_image

    inputs = TEXTS["input_ids"], TEXTS["attention_mask"], IMAGES
    program = torch.export.export(Embed().eval(), inputs, strict=False)
    texts, images = make_texts([5, 3, 9, 4], seed=8), make_images(3, seed=9)
    expected = model(**texts, pixel_values=images).logits_per_image
    found = program.module()(texts["input_ids"], texts["attention_mask"], images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_settings_hold_every_source():
    assert {SETTINGS[name]["fusion_tokens"] for name in SOURCES} == set(SOURCES)
    assert isinstance(adapted("independent").base_model.towers["vision"].sep_fusion["default"]["1"], LearnedPrompts)
