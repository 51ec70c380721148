"""Adapters of one form go through a tower together: one frozen pass, one prompted pass, and every row as if alone."""

from __future__ import annotations

import random

import pytest
import torch
from bundled import ASSETS, IMAGE_FILES
from families import CASES
from family_models import find_features
from peft import LoraConfig, PeftModel, get_peft_model
from small_classifier import raises
from small_clip import make_clip, make_images, make_texts, perturb
from test_mixed_batch import run_alone
from transformers import AutoImageProcessor

from sep_peft import ImageEmbedder, SEPClassifier, SEPConfig, TaskClasses
from sep_peft.method.fusion import TokenFusion
from sep_peft.method.stacked import FusionOfInputs
from sep_peft.tuner.current import chosen_adapters
from sep_peft.tuner.model import find_towers


LOW = {"num_text_prompts": 2, "num_vision_prompts": 3, "fusion_hidden_size": 6}
LATE = LOW | {"start_layer": 1}
FULL = LOW | {"fusion_rank": None}
#: Adapter -> its options; those of one form are neighbours.
ADAPTERS = {
    **{f"low {i}": LOW | {"frozen_weight": weight} for i, weight in enumerate((0.5, 0.2, 0.0))},
    "other rank": LOW | {"fusion_rank": 2},
    "full 0": FULL,
    "full 1": FULL,
    "late 0": LATE,
    "late 1": LATE | {"frozen_weight": 0.0},
    "shared 0": LOW | {"share_fusion": True},
    "shared 1": LOW | {"share_fusion": True},
    "mean 0": LOW | {"fusion_tokens": "mean"},
    "mean 1": LOW | {"fusion_tokens": "mean"},
    "free 0": {"num_text_prompts": 2, "num_vision_prompts": 3, "fusion": "independent"},
    "free 1": {"num_text_prompts": 2, "num_vision_prompts": 3, "fusion": "independent"},
    "coupled 0": LOW | {"batch_coupled": True},
    "coupled 1": LOW | {"batch_coupled": True},
    "vision": LOW | {"num_text_prompts": 0},
}
COUNT = 6
TEXTS, IMAGES = make_texts([5, 3, 9, 4, 6, 7]), make_images(COUNT)
INPUTS = {"text": TEXTS, "vision": {"pixel_values": IMAGES}}


def make_model(names: list[str], clip: torch.nn.Module | None = None) -> PeftModel:
    model = None
    for name in names:
        seed = list(ADAPTERS).index(name)
        torch.manual_seed(seed)
        if model is None:
            model = get_peft_model(clip or make_clip(), SEPConfig(**ADAPTERS[name]), adapter_name=name)
        else:
            model.add_adapter(name, SEPConfig(**ADAPTERS[name]))
        perturb(model, name, seed=seed)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """With all adapters; tests must not change it."""
    return make_model(list(ADAPTERS))


def draw(seed: int, names: list[str]) -> list[str]:
    """A name for each row, of few adapters, so that most have several rows, in any order."""
    rng = random.Random(seed)
    return rng.choices(rng.sample(names, 4), k=COUNT)


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_rows_are_those_of_their_adapter(model, seed):
    names = draw(seed, [*ADAPTERS, "__base__"])
    for modality, tower in find_towers(model).items():
        with chosen_adapters.set(tuple(names)):
            output, branches = tower(**INPUTS[modality]), tower.embed(**INPUTS[modality])
            prompted = tower.embed_prompted(**INPUTS[modality])
        for name in set(names):
            rows = [row for row, other in enumerate(names) if other == name]
            own = {key: value[rows] for key, value in INPUTS[modality].items()}
            alone = run_alone(model, name, lambda tower=tower, own=own: (tower(**own), tower.embed(**own)))
            for key in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(output[key][rows], alone[0][key], rtol=1e-5, atol=1e-5)
            for found, expected in zip(branches, alone[1], strict=True):
                torch.testing.assert_close(found[rows], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(prompted[rows], alone[1].prompted, rtol=1e-5, atol=1e-5)


def batches_of(tower, call) -> list[int]:
    """Sizes of the batches that the tower sees while something is called."""
    seen: list[int] = []
    with tower.base_layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(next(iter(kwargs.values())))), with_kwargs=True
    ):
        call()
    return seen


@pytest.mark.parametrize(
    ("names", "batches"),
    [
        (["low 0", "low 1", "low 2", "other rank", "low 0", "__base__"], [6, 5]),
        (["late 0", "__base__", "late 1", "low 0", "low 1", "late 0"], [6, 3, 2]),
        (["coupled 0", "coupled 1", "coupled 0", "full 0", "full 1", "full 1"], [6, 2, 1, 3]),
        (["__base__"] * 6, [6]),
        (["low 2", "late 1"] * 3, [3, 3]),
    ],
)
@torch.no_grad()
def test_one_frozen_pass_and_one_prompted_pass_a_form(model, names, batches):
    tower = find_towers(model)["vision"]
    with chosen_adapters.set(tuple(names)):
        assert batches_of(tower, lambda: tower(pixel_values=IMAGES)) == batches
        whole = batches if batches[0] == 6 else [6, *batches]  # embeddings of both branches are asked for
        assert batches_of(tower, lambda: tower.embed(pixel_values=IMAGES)) == whole


@pytest.mark.parametrize("kind", ["low", "full", "free"])
@torch.no_grad()
def test_texts_side_by_side_share_their_adapter(model, kind):
    """Two texts for each name, as the models take texts (B, 2, L)."""
    names, tower = (f"{kind} 1", f"{kind} 0", f"{kind} 1"), find_towers(model)["text"]
    texts = {"input_ids": TEXTS["input_ids"].unflatten(0, (3, 2))}  # (6, L) -> (3, 2, L)
    with chosen_adapters.set(names):
        found, embeds = tower(**texts).pooler_output, tower.embed(**texts).prompted  # both (6, ...)
    for row, name in enumerate(names):
        with chosen_adapters.set(name):
            alone, own = tower(**texts).pooler_output, tower.embed(**texts).prompted
        rows = slice(2 * row, 2 * row + 2)
        torch.testing.assert_close(found[rows], alone[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(embeds[rows], own[rows], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frames_of_a_video_share_its_adapter():
    """The tower is handed videos, and its layers see their frames."""
    case = CASES["videoprism vision alone"]
    model = get_peft_model(case.build(), SEPConfig(num_vision_prompts=2, **case.options), adapter_name="one")
    model.add_adapter("two", SEPConfig(num_vision_prompts=2, frozen_weight=0.2, **case.options))
    for seed, name in enumerate(("one", "two")):
        perturb(model, name, seed=seed)
    names = ("two", "one", "two")
    with chosen_adapters.set(names):
        (found,) = find_features(model.eval(), case, "vision")
    for row, name in enumerate(names):
        (alone,) = run_alone(model, name, lambda: find_features(model, case, "vision"))
        frames = len(found) // 3
        rows = slice(row * frames, (row + 1) * frames)
        torch.testing.assert_close(found[rows], alone[rows], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_embeddings_of_several_adapters_share_the_frozen_branch(model):
    """Of the same images, whatever the form of each adapter."""
    names, embedder = ["low 0", "late 0", "__base__", "low 1", "coupled 0"], ImageEmbedder(model)
    found: list[torch.Tensor] = []
    seen = batches_of(find_towers(model)["vision"], lambda: found.extend(embedder.by_adapters(IMAGES, names)))
    assert seen == [COUNT] * 5  # the frozen pass, and four prompted ones
    for name, embeds in zip(names, found, strict=True):
        torch.testing.assert_close(embeds, run_alone(model, name, lambda: embedder(IMAGES)), rtol=1e-5, atol=1e-5)
    has = ", ".join(map(repr, sorted(model.peft_config)))
    with raises(
        f"The model has no SEP adapter 'other'; it has {has}. Add or load it first, or name one of these, or "
        '"__base__" for the model without an adapter.'
    ):
        embedder.by_adapters(IMAGES, ["low 0", "other"])


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("kind", ["low", "full", "free"])
def test_gradients(model, kind):
    """Those of a row go to its adapter alone."""
    names, tower = [f"{kind} 0", f"{kind} 1", f"{kind} 0", "__base__"], find_towers(model)["vision"]
    for name in set(names) - {"__base__"}:
        model.base_model.set_requires_grad(name)
    with chosen_adapters.set(tuple(names)):
        found = gradients(model, tower(pixel_values=IMAGES[:4]).pooler_output.square().sum())
    expected: dict[str, torch.Tensor] = {}
    for row, name in enumerate(names[:3]):
        with chosen_adapters.set(name):
            loss = tower(pixel_values=IMAGES[row : row + 1]).pooler_output.square().sum()
        for key, gradient in gradients(model, loss).items():
            expected[key] = expected.get(key, 0) + gradient
    assert set(found) == set(expected) and any(f"{kind} 1" in key for key in found)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_of_images_go_through_rows_without_an_adapter(model):
    images, tower = IMAGES[:2].clone().requires_grad_(), find_towers(model)["vision"]
    with chosen_adapters.set(("low 0", "__base__")):
        (found,) = torch.autograd.grad(tower(pixel_values=images).pooler_output[1].sum(), images)
    with chosen_adapters.set("__base__"):
        (expected,) = torch.autograd.grad(tower(pixel_values=images).pooler_output[1].sum(), images)
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@torch.no_grad()
def test_lora_below(use_dora):
    config = LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False, use_dora=use_dora)
    lora = get_peft_model(make_clip(vision_layers=2), config, adapter_name="style").eval()
    model = make_model(["low 0", "low 1"], lora.get_base_model())
    names = ["low 1", "__base__", "low 0"]
    found = model.get_image_features(IMAGES[:3], adapter_names=names).pooler_output
    for row, name in enumerate(names):
        alone = run_alone(model, name, lambda: model.get_image_features(IMAGES[:3]).pooler_output[row])  # noqa: B023
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


class OtherLinear(torch.nn.Linear):
    """What stands in the place of a layer, as quantized ones do."""


@torch.no_grad()
def test_layers_in_the_place_of_those_of_a_fusion_are_called():
    model = make_model(["low 0", "low 1"], make_clip(vision_layers=2))
    tower = find_towers(model)["vision"]
    before = tower.sep_fusion["low 1"]["1"].fc1
    other = OtherLinear(before.in_features, before.out_features, bias=False)
    tower.sep_fusion["low 1"]["1"].fc1 = other
    calls: list = []
    other.register_forward_hook(lambda *args: calls.append(args))
    found = model.get_image_features(IMAGES[:2], adapter_names=["low 1", "low 0"]).pooler_output
    assert len(calls) == 1
    for row, name in enumerate(["low 1", "low 0"]):
        alone = run_alone(model, name, lambda: model.get_image_features(IMAGES[:2]).pooler_output[row])  # noqa: B023
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_adapters_of_another_dtype_are_another_form():
    model = make_model(["low 0", "low 1", "low 2"], make_clip(vision_layers=2))
    tower = find_towers(model)["vision"]
    for parameter in tower.adapter_parameters("low 1"):
        parameter.data = parameter.data.to(torch.bfloat16)
    names = ["low 1", "low 0", "low 2"]
    found = model.get_image_features(IMAGES[:3], adapter_names=names).pooler_output
    for row, name in enumerate(names):
        alone = run_alone(model, name, lambda: model.get_image_features(IMAGES[:3]).pooler_output[row])  # noqa: B023
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


def test_what_belongs_to_one_adapter_is_refused(model):
    tower = find_towers(model)["vision"]
    with chosen_adapters.set(("low 0", "low 1")):
        with raises("A trace is that of one adapter, but a mixed batch has several. Choose one adapter."):
            tower.embed(pixel_values=IMAGES[:2], trace={})
        with chosen_adapters.set("late 0"):
            trunk = tower.trunk(pixel_values=IMAGES[:2])
        with raises("A trunk is that of one adapter, but a mixed batch has several. Choose one adapter."):
            tower.embed_prompted(pixel_values=IMAGES[:2], trunk=trunk)


def test_predictions_of_many_tasks():
    """Rows of other tasks, adapters and class lists, in any order, with an adapter that two tasks share."""
    model = make_model(["low 0", "low 1", "low 2", "late 0"], make_clip(text_layers=2, vision_layers=2))
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = AutoImageProcessor.from_pretrained(ASSETS / "clip-small", **sizes)

    def classes(count: int) -> TaskClasses:
        lengths = [3 + i % 4 for i in range(count)]
        names = tuple(f"{count}-{i}" for i in range(count))
        return TaskClasses(make_texts(lengths, seed=count), (make_texts(lengths, seed=count + 1),), names)

    classifier = SEPClassifier(model, classes(3), processor=processor).eval()
    for count, adapter in enumerate(("low 0", "low 1", "low 2", "late 0", "low 1", "__base__"), start=2):
        classifier.tasks.add(f"task {count}", classes(count), adapter, 64)
    rng = random.Random(0)
    for _ in range(3):
        tasks = rng.choices(list(classifier.tasks), k=5)
        files = rng.choices(IMAGE_FILES, k=5)
        for file, task, found in zip(files, tasks, classifier.predict(files, task=tasks), strict=True):
            expected = classifier.predict(file, task=task)
            assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
            for a, b in zip(found, expected, strict=True):
                assert a["score"] == pytest.approx(b["score"], abs=1e-5)


@pytest.mark.parametrize("rank", [2, 60, None])
def test_fusions_of_inputs(rank):
    """On channels of low rank stacked, of a rank above the size of a head or full width one after another."""
    torch.manual_seed(0)
    fusions = [TokenFusion(96, mlp_size=5, rank=rank, dtype=torch.float64) for _ in range(3)]
    for parameter in (p for fusion in fusions for p in fusion.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    prompts, tokens = torch.randn(2, 5, 4, 96, dtype=torch.float64).unbind()
    of_inputs = [fusions[i] for i in (2, 0, 1, 0, 2)]
    found = FusionOfInputs(of_inputs)(prompts, tokens)
    for row, fusion in enumerate(of_inputs):
        torch.testing.assert_close(found[row : row + 1], fusion(prompts[row : row + 1], tokens[row : row + 1]))
