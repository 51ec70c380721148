"""What decided: integrated gradients against finite differences, in every family, and what they leave as it was."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from bundled import ASSETS, IMAGE_FILES
from families import CASES
from family_models import adapt, adapt_once
from PIL import Image
from small_classifier import CLASSES, make_classifier, make_model, raises, with_prototypes
from transformers import AutoImageProcessor
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from sep_peft import Explanation, SEPClassifier, explain
from sep_peft.classifier import attribution
from sep_peft.classifier.attribution import attribute, integrate_gradients
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.patches import PatchGrid
from sep_peft.classifier.prediction import image_logits
from sep_peft.method.fit_heads import fit_head
from sep_peft.tuner.model import find_towers


IMAGE = IMAGE_FILES[0]
VIDEOS = ("xclip", "videoprism")
#: Families whose image tower is that of another one here.
SAME_TOWER = (
    "bert and clip",
    "bert and siglip",
    "clipseg",
    "metaclip_2",
    "roberta and vit",
    "flava pretraining",
    "owlv2",
)
CLASSIFYING = [name for name, case in CASES.items() if case.text and case.image and name not in (*VIDEOS, *SAME_TOWER)]
PLACES = 4  # on the way from the plain image, at which gradients are compared with two runs a patch


@pytest.fixture(scope="module")
def processor():
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return AutoImageProcessor.from_pretrained(ASSETS / "clip-small", **size)


@pytest.fixture(scope="module")
def inputs(processor):
    return {"pixel_values": processor(Image.open(IMAGE).convert("RGB"), return_tensors="pt")["pixel_values"].double()}


@torch.no_grad()
def log_odds(classifier, inputs: dict, label: int) -> torch.Tensor:
    scores = classifier(**inputs).logits.double().softmax(dim=1)[:, label]
    return scores.log() - (1 - scores).log()


def patch_of(grid: PatchGrid, row: int, column: int, like: torch.Tensor) -> torch.Tensor:
    """1 in one patch of pixel values, 0 elsewhere."""
    mask = torch.zeros_like(like)
    if grid.packed:
        mask[:, row * grid.columns + column] = 1
    else:
        mask[:, :, row * grid.height : (row + 1) * grid.height, column * grid.width : (column + 1) * grid.width] = 1
    return mask


def color_of(grid: PatchGrid, image: torch.Tensor) -> torch.Tensor:
    """The mean color of an image in every pixel of it, written out."""
    plain = image.clone()
    for channel in range(3):
        if grid.packed:  # a row is a patch: channels of its first pixel, of its second, and so on
            plain[0, : grid.count, channel::3] = image[0, : grid.count, channel::3].mean()
        else:
            plain[0, channel] = image[0, channel].mean()
    return plain


def slow(classifier, inputs: dict, grid: PatchGrid, label: int, step: float) -> torch.Tensor:
    """How fast the log odds rise as one patch alone goes on from the plain image, averaged over the way: no gradient
    is taken, each patch at each place is two runs of the classifier."""
    image = inputs["pixel_values"]
    start = color_of(grid, image)
    pairs = []
    for row in range(grid.rows):
        for column in range(grid.columns):
            change = (image - start) * patch_of(grid, row, column, image) * step
            for place in (torch.arange(PLACES) + 0.5) / PLACES:
                point = start + place * (image - start)
                pairs += [point + change, point - change]
    batch = torch.cat(pairs)
    others = {k: v.expand(len(batch), *v.shape[1:]) for k, v in inputs.items() if k != "pixel_values" and v is not None}
    values = log_odds(classifier, {"pixel_values": batch, **others}, label).view(grid.rows, grid.columns, PLACES, 2)
    return ((values[..., 0] - values[..., 1]) / (2 * step)).mean(dim=2)


def fast(classifier, inputs: dict, label: int) -> tuple[torch.Tensor, PatchGrid]:
    tower = find_towers(classifier.model)["vision"]
    grid = PatchGrid.of(tower, inputs)
    return attribute(tower, inputs, grid, classifier.encoder.weights(training=False), label), grid


def check(classifier, inputs: dict, label: int = 1, step: float = 1e-5) -> torch.Tensor:
    classifier.eval().double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribution, "STEPS", PLACES)
        effects, grid = fast(classifier, inputs, label)
    expected = slow(classifier, inputs, grid, label, step)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(effects, expected.float(), rtol=2e-3, atol=1e-5 * expected.abs().max().item() + 1e-7)
    return effects


# against references


def test_of_a_linear_score_each_patch_gets_what_hiding_it_costs():
    generator = torch.Generator().manual_seed(0)
    image, weights = torch.randn(1, 3, 26, 16, generator=generator), torch.randn(1, 3, 26, 16, generator=generator)
    grid = PatchGrid(3, 2, 8, 8)  # two rows of pixels are left over
    plain = color_of(grid, image)
    found = grid.sums(integrate_gradients(lambda x: (x * weights).sum(dim=(1, 2, 3)), plain, image, batch_size=5))
    for row in range(3):
        for column in range(2):
            hidden = torch.where(patch_of(grid, row, column, image) > 0, plain, image)
            torch.testing.assert_close(found[row, column], ((image - hidden) * weights).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_classifier(),
        lambda: with_prototypes(),
        lambda: make_classifier(config={"start_layer": 2}),
        lambda: make_classifier(config={"start_layer": 1, "frozen_weight": 0.0}),
        lambda: make_classifier(config={"frozen_weight": 0.8, "fusion_rank": 2, "share_fusion": True}),
        lambda: make_classifier(config={"fusion": "none"}),
        lambda: make_classifier(config={"num_vision_prompts": 0}),
        lambda: make_classifier().calibrate(Calibration(3.0)),
    ],
    ids=["texts", "prototypes", "start layer", "prompted alone", "shared", "shallow", "text only", "calibrated"],
)
def test_equals_finite_differences(make, inputs):
    check(make(), inputs)


def test_other_heads_count(inputs):
    classifier = make_classifier().eval()
    embeds = F.normalize(torch.randn(8, 24, generator=torch.Generator().manual_seed(3)), dim=-1)
    labels, texts = torch.arange(8) % 4, classifier.encoder.weights(training=False).text_embeds
    head = fit_head("tip-adapter-f", embeds, labels, texts, embeds @ texts.T, 20.0)
    classifier.set_classes(replace(classifier.classes, head=head))
    check(classifier, inputs)


def test_without_an_adapter(inputs):
    classifier = make_classifier()
    with classifier.model.disable_adapter():
        plain = check(classifier, inputs)
    assert not torch.allclose(plain, check(classifier, inputs), rtol=0.1)


@pytest.mark.parametrize("name", [name for name in CLASSIFYING if name != "groupvit"])
def test_families(name):
    case = CASES[name]
    classifier = SEPClassifier(adapt(case), case.text([5, 4, 7]))
    one = {key: value for key, value in case.image(1).items() if value is not None}
    one = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
    # AIMv2 normalizes in fp32, where small differences drown
    check(classifier, one, step=1e-4 if name == "aimv2" else 1e-5)


def test_groups_pass_gradients_on():
    """GroupViT deals patches into groups, with the gradient of a softer deal: there are no differences to compare."""
    case = CASES["groupvit"]
    effects, _ = fast(SEPClassifier(adapt_once(case), case.text([5, 4, 7])).eval(), case.image(1), 1)
    assert effects.shape == (3, 3) and effects.abs().min() > 0


def test_effects_add_up(inputs):
    """To the difference between the image and the plain one, as far as sixteen places tell."""
    classifier = make_classifier(config={"fusion": "none"}).eval().double()  # no selection, so no jumps on the way
    effects, grid = fast(classifier, inputs, 2)
    image = inputs["pixel_values"]
    ends = log_odds(classifier, {"pixel_values": torch.cat([image, color_of(grid, image)])}, 2)
    torch.testing.assert_close(effects.sum().double(), ends[0] - ends[1], rtol=0.05, atol=0.01)


# what an image is answered


def test_explains_the_best_class_or_another(processor):
    classifier = make_classifier(processor=processor)
    best = classifier.predict(IMAGE)
    found = classifier.explain(IMAGE)
    assert (found.label, found.score) == (best[0]["label"], pytest.approx(best[0]["score"], rel=1e-5))
    assert found.effects.shape == found.grid == (3, 3)
    other = classifier.explain(str(IMAGE), label=best[2]["label"])
    assert (other.label, other.score) == (best[2]["label"], pytest.approx(best[2]["score"], rel=1e-5))
    assert not torch.equal(found.effects, other.effects)
    selected = explain(classifier.model, processor, IMAGE)
    assert (selected.label, selected.score, selected.effects) == (None, None, None)
    assert [layer.patches for layer in found.layers] == [layer.patches for layer in selected.layers]


def test_tasks_have_their_own_answer(processor):
    classifier = with_prototypes(processor=processor).eval()
    classifier.model.add_adapter("second", classifier.model.peft_config["default"])
    classifier.add_task("second", classifier.classes).add_task("zero-shot", classifier.classes, adapter="__base__")
    own, second, plain = (classifier.explain(IMAGE, "class 1", task) for task in (None, "second", "zero-shot"))
    assert plain.layers == [] and len(own.layers) == len(second.layers) == 3
    for found, task in ((own, None), (second, "second"), (plain, "zero-shot")):
        scores = {each["label"]: each["score"] for each in classifier.predict(IMAGE, task=task)}
        assert found.score == pytest.approx(scores["class 1"], rel=1e-5)
    assert len({tuple(found.effects.flatten().tolist()) for found in (own, second, plain)}) == 3
    with ThreadPoolExecutor(3) as threads:
        tasks = [None, "second", "zero-shot"] * 3
        found = list(threads.map(lambda task: classifier.explain(IMAGE, "class 1", task), tasks))
    for expected, others in ((own, found[::3]), (second, found[1::3]), (plain, found[2::3])):
        for other in others:
            torch.testing.assert_close(other.effects, expected.effects)


def test_a_single_class(processor):
    """Its score is 1 whatever the image, so its logit is explained."""
    classifier = SEPClassifier(make_model(), {name: value[:1] for name, value in CLASSES.items()}, processor=processor)
    found = classifier.explain(IMAGE)
    assert found.score == 1
    assert found.effects.abs().max() > 0


def test_what_it_leaves_as_it_was(processor):
    classifier = make_classifier(processor=processor)  # which trains
    model = classifier.model
    for layer in classifier.vision_tower.base_layer.encoder.layers:
        layer.self_attn.dropout = 0.5

    def state():
        return (
            [(name, p.requires_grad, p.grad is None, p._version, p.data_ptr()) for name, p in model.named_parameters()],
            [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = state()
    first = classifier.explain(IMAGE)
    assert state() == before
    assert torch.equal(first.effects, classifier.explain(IMAGE).effects)  # without dropout
    with torch.inference_mode():
        assert torch.equal(first.effects, classifier.explain(IMAGE).effects)
    with torch.no_grad():
        assert torch.equal(first.effects, classifier.explain(IMAGE).effects)
    assert not any(tensor.requires_grad for tensor in (first.effects, first.image, first.layers[0].weights))


def test_weights_that_lie_elsewhere_or_are_narrow(processor):
    expected = make_classifier(processor=processor).explain(IMAGE, "class 1").effects
    offloaded = make_classifier(processor=processor)
    cpu_offload(offloaded.model.get_base_model())
    torch.testing.assert_close(offloaded.explain(IMAGE, "class 1").effects, expected)
    narrow = make_classifier(processor=processor).to(torch.bfloat16)
    torch.testing.assert_close(narrow.explain(IMAGE, "class 1").effects, expected, rtol=0.1, atol=0.02)


def test_coupled_images_are_not_coupled_with_each_other(inputs):
    classifier = make_classifier(config={"batch_coupled": True}).eval()
    one = {"pixel_values": inputs["pixel_values"].float()}
    effects, grid = fast(classifier, one, 1)
    start = color_of(grid, one["pixel_values"])
    tower, weights = classifier.vision_tower, classifier.encoder.weights(training=False)

    def alone(images):
        rows = [image_logits(tower, {"pixel_values": row[None]}, weights, through_frozen=True) for row in images]
        return attribution.log_odds(torch.cat(rows), 1)

    expected = grid.sums(integrate_gradients(alone, start, one["pixel_values"], 16))
    torch.testing.assert_close(effects, expected, rtol=1e-3, atol=1e-5)


def test_images_of_any_shape():
    """SigLIP 2 gets patches; the image is put together again from them."""
    case = CASES["siglip2"]
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=11)
    classifier = SEPClassifier(adapt(case), case.text([5, 4, 7]), processor=processor)
    image = Image.open(IMAGE).convert("RGB").resize((40, 16))
    found = classifier.explain(image)
    assert found.grid == tuple(processor(image, return_tensors="pt")["spatial_shapes"][0].tolist())
    rows, columns = found.grid
    seen = image.resize((8 * columns, 8 * rows), Image.Resampling.BILINEAR)
    expected = torch.tensor(list(seen.get_flattened_data())).view(8 * rows, 8 * columns, 3) / 255
    torch.testing.assert_close(found.image, expected, rtol=0, atol=0.02)
    for layer in found.layers:
        assert all(patch[0] < rows and patch[1] < columns for patch in layer.patches)


@pytest.mark.parametrize(
    ("name", "first"), [("bert and dinov2 with registers", 3), ("bert and dinov3", 3), ("bert and deit", 2)]
)
def test_tokens_before_the_patches_are_none(name, first):
    tower = adapt_once(CASES[name]).base_model.towers["vision"]
    grid = PatchGrid.of(tower, CASES[name].image(1))
    places = [grid.place(position, grid.count + first, tower) for position in range(grid.count + first)]
    assert places == [None] * first + [(row, column) for row in range(3) for column in range(3)]


def test_groups_of_patches_are_none():
    tower = adapt_once(CASES["groupvit"]).base_model.towers["vision"]
    grid = PatchGrid.of(tower, CASES["groupvit"].image(1))
    assert [grid.place(position, 13, tower) for position in (0, 8, 9)] == [(0, 0), (2, 2), None]
    assert [grid.place(position, 7, tower) for position in (0, 6)] == [None, None]


# errors


def test_unknown_label(processor):
    names = "'class 0', 'class 1', 'class 2', 'class 3'"
    with raises(f"label must be one of the classes, {names}, but got 'cat'."):
        make_classifier(processor=processor).explain(IMAGE, label="cat")


def test_unknown_task(processor):
    with raises("There is no task 'birds'; the tasks are []."):
        make_classifier(processor=processor).explain(IMAGE, task="birds")


@pytest.mark.parametrize("size", [None, [8, 8, 8]])
def test_a_tower_without_a_grid(size, processor):
    classifier = make_classifier(processor=processor)
    classifier.vision_tower.base_layer.config.patch_size = size
    message = "The image tower of CLIPModel has no grid of patches to explain: patch_size of its configuration is {}."
    for ask in (lambda: classifier.explain(IMAGE), lambda: explain(classifier.model, processor, IMAGE)):
        with raises(message.format(repr(size))):
            ask()


def test_videos():
    tower = adapt_once(CASES["xclip"]).base_model.towers["vision"]
    with raises(
        "The tower of XCLIPModel that SEP prompts sees videos or reads pixel_values. Only what a tower makes of single "
        "images can be explained."
    ):
        PatchGrid.of(tower, CASES["xclip"].image(1))


def test_numbers_that_are_not_finite(processor):
    classifier = make_classifier(processor=processor)
    classifier.vision_tower.sep_prompts["default"].data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"^The logits are not finite\."):
        classifier.explain(IMAGE)


# what notebooks show


def drawn(found: Explanation) -> Image.Image:
    return Image.open(BytesIO(found._repr_png_()))


def test_notebooks_show_a_drawing_and_a_line(processor, monkeypatch):
    found = make_classifier(processor=processor).explain(IMAGE)
    assert drawn(found).format == "PNG"
    assert (
        repr(found)
        == f"Explanation('{found.label}' {found.score:.1%}, 3 x 3 patches, selected before layers [1, 2, 3])"
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert found._repr_png_() is None  # so the line is shown


def test_titles_say_what_is_what(processor):
    classifier = make_classifier(processor=processor)
    found = classifier.explain(IMAGE)
    figure = found.plot()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["input", f"{found.label} {found.score:.0%}: decided", "selected before layer 1"]
    assert figure.get_suptitle().replace("\n", " ") == (
        f"Decided: red patches speak for {found.label}, blue ones against it. Selected: SEP made its prompts from the "
        "bright patches; numbers are the attention that each of them got."
    )
    effects = figure.axes[1].images[1].get_array()
    torch.testing.assert_close(torch.tensor(effects), found.effects)
    classifier.add_task("zero-shot", classifier.classes, adapter="__base__")
    assert "Selected" not in classifier.explain(IMAGE, task="zero-shot").plot().get_suptitle()
    assert "Decided" not in explain(classifier.model, processor, IMAGE).plot().get_suptitle()


def test_labels_of_strangers(processor):
    names = ("$\\frac{", "a\nb\x1b[2J", "long " * 40, "d")
    classifier = make_classifier(processor=processor)
    classifier.set_classes(replace(classifier.classes, names=names))
    for name in names:
        found = replace(classifier.explain(IMAGE, name), layers=[])
        title = found.plot().axes[1].get_title()
        assert "\n" not in title and "\x1b" not in title and len(title) < 50
        assert not re.search(r"[\n\x1b]", repr(found))
        if "$" in name:
            assert drawn(found).width > 100  # matplotlib reads no formula
