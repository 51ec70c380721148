"""`explain`: the chosen tokens and the attention paid to them, against a computation by hand, and the drawing."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from bundled import ASSETS
from copies import made_once
from peft import get_peft_model
from PIL import Image
from small_clip import make_clip, perturb
from transformers import AutoImageProcessor, AutoProcessor

from sep_peft import Explanation, SEPClassifier, SEPConfig, TaskClasses, explain
from sep_peft.classifier.explanation import LayerExplanation
from sep_peft.method.select import largest_tokens
from sep_peft.tuner.model import find_towers


IMAGE = sorted((ASSETS / "caltech101/test/sunflower").iterdir())[0]
PROMPTS, PATCHES, GRID = 4, 9, (3, 3)


@made_once
def make_model(**config):
    torch.manual_seed(0)
    model = get_peft_model(
        make_clip(), SEPConfig.published(**({"num_text_prompts": 2, "num_vision_prompts": PROMPTS} | config))
    )
    perturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return AutoImageProcessor.from_pretrained(ASSETS / "clip-small", **size)


def hidden_before(model, layer: int, processor) -> torch.Tensor:
    """Hidden states (tokens, D) of `IMAGE` before a layer of the prompted pass, without the prompts at their end."""
    tower, seen = find_towers(model)["vision"], []
    # under the wrapper of the layer before: what it returns is what the next one fuses
    hooked = tower.base_layer.encoder.layers[layer - 1].base_layer
    handle = hooked.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        tower.embed(**processor(Image.open(IMAGE).convert("RGB"), return_tensors="pt"))
    handle.remove()
    frozen, prompted = sorted(seen, key=lambda states: states.shape[1])
    assert (frozen.shape[1], prompted.shape[1]) == (1 + PATCHES, 1 + PATCHES + len(tower.sep_prompts["default"]))
    return prompted[0, : 1 + PATCHES]


def strongest(hidden: torch.Tensor, count: int) -> list[tuple[int, int] | None]:
    """Places of the tokens with the largest mean square, by a plain sort; token 0 is CLS."""
    energies = [sum(x * x for x in token) / len(token) for token in hidden.tolist()]
    order = sorted(range(len(energies)), key=lambda index: -energies[index])[:count]
    return [None if index == 0 else ((index - 1) // GRID[1], (index - 1) % GRID[1]) for index in order]


@pytest.mark.parametrize("count", [1, PROMPTS, PATCHES])
@pytest.mark.parametrize("layer", [1, 3])
def test_chosen_patches_by_hand(layer, count, processor):
    model = make_model(num_vision_prompts=count)
    explained = {entry.layer: entry for entry in explain(model, processor, IMAGE).layers}
    assert list(explained) == [1, 2, 3]
    assert explained[layer].patches == strongest(hidden_before(model, layer, processor), count)


def test_cls_is_shown_as_none(processor):
    model = make_model(num_vision_prompts=PATCHES)  # 9 of 10 tokens
    for entry in explain(model, processor, IMAGE).layers:
        others = [patch for patch in entry.patches if patch is not None]
        assert len(set(others)) == len(others)
        assert all(0 <= row < GRID[0] and 0 <= column < GRID[1] for row, column in others)
        assert len(others) == PATCHES - (None in entry.patches)
    chosen = [None in entry.patches for entry in explain(model, processor, IMAGE).layers]
    by_hand = [0 in largest_tokens(hidden_before(model, i, processor)[None], PATCHES)[0] for i in (1, 2, 3)]
    assert chosen == by_hand
    assert any(chosen)


def test_attention_by_hand(processor):
    """Rows sum to 1, and the first layer's weights are the softmax of the scaled products."""
    model = make_model()
    tower, explained = find_towers(model)["vision"], explain(model, processor, IMAGE)
    for entry in explained.layers:
        assert entry.weights.shape == (1, PROMPTS, PROMPTS)  # 48 channels make one head
        torch.testing.assert_close(entry.weights.sum(dim=-1), torch.ones(1, PROMPTS))
        assert (entry.weights >= 0).all()
    hidden = hidden_before(model, 1, processor)
    places = strongest(hidden, PROMPTS)
    chosen = hidden[[0 if place is None else 1 + place[0] * GRID[1] + place[1] for place in places]]

    seen = []
    fusion = tower.sep_fusion["default"]["1"]
    handle = fusion.register_forward_hook(lambda module, args, output: seen.append(args))
    with torch.no_grad():
        tower.embed(**processor(Image.open(IMAGE).convert("RGB"), return_tensors="pt"))
        handle.remove()
        prompts, tokens = (values[0] for values in seen[0])
        torch.testing.assert_close(tokens, chosen)
        query = fusion.attention.query(fusion.norm1(prompts))
        key = fusion.attention.key(fusion.norm1(chosen))
        expected = (query @ key.T / 48**0.5).softmax(dim=-1)
    torch.testing.assert_close(explained.layers[0].weights[0], expected)


def test_only_layers_with_fusion_appear(processor):
    explained = explain(make_model(vision_layers=[1, 3], share_fusion=True), processor, IMAGE)
    assert [entry.layer for entry in explained.layers] == [1, 3]


def test_explaining_changes_nothing(processor):
    model = make_model()
    pixel_values = processor(Image.open(IMAGE).convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        before = find_towers(model)["vision"].embed(pixel_values)
        explain(model, processor, IMAGE)
        after = find_towers(model)["vision"].embed(pixel_values)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("image", [IMAGE, str(IMAGE), Image.open(IMAGE)], ids=["Path", "str", "PIL"])
def test_what_an_image_may_be(image, processor):
    explained = explain(make_model(), processor, image)
    expected = explain(make_model(), processor, IMAGE)
    assert torch.equal(explained.image, expected.image)
    assert [entry.patches for entry in explained.layers] == [entry.patches for entry in expected.layers]


def test_image_is_what_the_model_saw(processor):
    """Cropped and resized, with the normalization undone."""
    explained = explain(make_model(), processor, IMAGE)
    plain = processor(Image.open(IMAGE).convert("RGB"), do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert explained.grid == GRID
    torch.testing.assert_close(explained.image, plain.permute(1, 2, 0).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_whole_processor_and_a_whole_classifier_serve_as_well(processor):
    classifier = SEPClassifier(make_model(), TaskClasses({"input_ids": torch.tensor([[61, 5, 62]])}))
    whole = AutoProcessor.from_pretrained(ASSETS / "clip-small")
    whole.image_processor = processor
    for model in (classifier, classifier.model, classifier.model.get_base_model()):
        assert [entry.layer for entry in explain(model, whole, IMAGE).layers] == [1, 2, 3]


NOTHING = "There is nothing to explain: no active SEP adapter selects tokens in the image tower."


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"fusion": "none"},
        {"fusion": "independent"},
        {"fusion_tokens": "mean"},
        {"fusion_tokens": "noise"},
        {"num_vision_prompts": 0},
        {"target_modules": ["text_model"]},
        {"vision_layers": []},
        {"start_layer": 3, "num_text_prompts": 0},
    ],
    ids=str,
)
def test_no_fusion(config, processor):
    model = make_clip() if config is None else make_model(**config)
    with pytest.raises(ValueError, match=f"^{re.escape(NOTHING)}$"):
        explain(model, processor, IMAGE)


def test_disabled_adapter(processor):
    model = make_model()
    with model.disable_adapter(), pytest.raises(ValueError, match=f"^{re.escape(NOTHING)}$"):
        explain(model, processor, IMAGE)


def test_unreadable_image(processor, tmp_path):
    path = tmp_path / "missing.jpg"
    with pytest.raises(ValueError, match=f"^{re.escape(f'The image {str(path)!r} cannot be read: ')}"):
        explain(make_model(), processor, path)


# counting and drawing


def make_explanation(*patches: list, size: int = 24) -> Explanation:
    weights = torch.full((2, 3, 2), 0.5)
    layers = [LayerExplanation(1 + index, chosen, weights) for index, chosen in enumerate(patches)]
    return Explanation(torch.rand(size, size, 3, generator=torch.Generator().manual_seed(0)), GRID, layers)


def test_counts():
    counts = make_explanation([(0, 0), (2, 1)], [None, (2, 1)], [None, (1, 2)]).counts()
    assert counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 2, 0]]
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("name", ["drawing.png", "drawing.pdf"])
def test_plot_writes_a_file(name, processor, tmp_path):
    path = tmp_path / name
    figure = explain(make_model(), processor, IMAGE).plot(path)
    titles = [axis.get_title().removesuffix(" + CLS") for axis in figure.axes if axis.get_title()]
    assert titles == ["input", *(f"selected before layer {layer}" for layer in (1, 2, 3))]
    if name.endswith(".png"):
        with Image.open(path) as drawing:
            assert drawing.format == "PNG"
            assert len(set(drawing.convert("RGB").resize((32, 32)).get_flattened_data())) > 10  # not blank
    else:
        assert path.read_bytes().startswith(b"%PDF")


def test_plot_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_explanation([(0, 0), (1, 1)]).plot()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("panels", "columns"), [(1, 4), (3, 4), (4, 4), (5, 2)])
def test_what_is_drawn(panels, columns):
    """One panel for the image and one a layer; CLS is in the title, since it is no patch."""
    explanation = make_explanation(*[[None, (0, 1)], [(2, 2), (1, 0)], [(0, 0), (0, 1)], [None, (1, 1)]][: panels - 1])
    axes = explanation.plot(columns=columns).axes
    columns = min(columns, panels)
    assert len(axes) == -(-panels // columns) * columns
    titles = [axis.get_title() for axis in axes]
    expected = [f"selected before layer {layer}" for layer in ("1 + CLS", "2", "3", "4 + CLS")]
    assert titles == ["input", *expected[: panels - 1], *[""] * (len(axes) - panels)]
    for axis, layer in zip(axes[1:], explanation.layers, strict=False):
        drawn = torch.tensor(axis.images[0].get_array())
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                area = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                shade = 1.0 if (row, column) in layer.patches else 0.3
                torch.testing.assert_close(drawn[area], explanation.image[area] * shade)
        assert [text.get_text() for text in axis.texts] == ["0.50"] * sum(patch is not None for patch in layer.patches)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^Drawing needs matplotlib: pip install sep_peft\[plot\]$"):
        make_explanation([(0, 0), (1, 1)]).plot()
