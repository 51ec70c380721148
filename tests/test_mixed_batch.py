"""One batch, an adapter for each row: every row as if its adapter ran alone."""

from __future__ import annotations

import threading

import pytest
import torch
from copies import made_once
from families import CASES
from family_models import find_features
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from small_classifier import raises
from small_clip import make_clip, make_images, make_texts, perturb
from small_sep import SETTINGS

from sep_peft import SEPConfig
from sep_peft.tuner import mixed_batch
from sep_peft.tuner.current import chosen_adapters
from sep_peft.tuner.model import find_towers


NAMES = ["one", "__base__", "two", "one", "three"]
TEXTS, IMAGES = make_texts([5, 3, 9, 4, 6]), make_images(5)
#: Adapters that differ in their number of prompts, where these enter, how they are mixed, and whether there are any.
ADAPTERS = {"one": "published", "two": "start alone", "three": "vision only", "four": "shallow"}


@made_once
def make_model(adapters: dict[str, str] = ADAPTERS, **sizes) -> PeftModel:
    model = None
    for seed, (name, settings) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        config = SEPConfig.published(**SETTINGS[settings])
        if model is None:
            model = get_peft_model(make_clip(**sizes), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        perturb(model, name, seed=seed)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """Tests must not change it."""
    return make_model()


def run_alone(model: PeftModel, name: str, call):
    """What `call` returns with one adapter active for everything."""
    before = model.active_adapter
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(before)


def rows_with(name: str, names: list[str] = NAMES) -> list[int]:
    return [row for row, other in enumerate(names) if other == name]


@torch.no_grad()
def test_rows_are_those_of_their_adapter(model):
    inputs = {"text": TEXTS, "vision": {"pixel_values": IMAGES}}
    for kind, tower in find_towers(model).items():
        with chosen_adapters.set(tuple(NAMES)):
            found = tower(**inputs[kind])
        for name in set(NAMES):
            rows = rows_with(name)
            own = {key: value[rows] for key, value in inputs[kind].items()}
            expected = run_alone(model, name, lambda tower=tower, own=own: tower(**own))
            for key in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(found[key][rows], expected[key], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features(model):
    image = model.get_image_features(IMAGES, adapter_names=NAMES).pooler_output
    text = model.get_text_features(**TEXTS, adapter_names=NAMES).pooler_output
    for row, name in enumerate(NAMES):
        alone = run_alone(model, name, lambda row=row: model.get_image_features(IMAGES).pooler_output[row])
        torch.testing.assert_close(image[row], alone, rtol=1e-5, atol=1e-6)
        alone = run_alone(model, name, lambda row=row: model.get_text_features(**TEXTS).pooler_output[row])
        torch.testing.assert_close(text[row], alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_forward(model):
    """Texts and images stand in pairs: row i of either uses the i-th adapter."""
    found = model(**TEXTS, pixel_values=IMAGES, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        alone = run_alone(model, name, lambda: model(**TEXTS, pixel_values=IMAGES))
        for key in ("image_embeds", "text_embeds"):
            torch.testing.assert_close(found[key][row], alone[key][row], rtol=1e-5, atol=1e-6)
        scores, expected = found.logits_per_image[row, row], alone.logits_per_image[row, row]
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert model.active_adapter == "one"


@torch.no_grad()
def test_one_name_for_all_rows_is_that_adapter(model):
    for name in ("__base__", *ADAPTERS):
        expected = run_alone(model, name, lambda: model(**TEXTS, pixel_values=IMAGES).logits_per_image)
        assert torch.equal(model(**TEXTS, pixel_values=IMAGES, adapter_names=[name] * 5).logits_per_image, expected)


@torch.no_grad()
def test_positional_inputs_and_plain_tuples(model):
    expected = model.get_image_features(IMAGES, adapter_names=NAMES).pooler_output
    found = model(TEXTS["input_ids"], IMAGES, TEXTS["attention_mask"], adapter_names=NAMES, return_dict=False)
    torch.testing.assert_close(found[3], torch.nn.functional.normalize(expected, dim=-1))
    tower = find_towers(model)["vision"]
    with chosen_adapters.set(tuple(NAMES)):
        states, pooled = tower(IMAGES, return_dict=False)
    assert states.shape == (5, 10, 48)
    torch.testing.assert_close(model.get_base_model().visual_projection(pooled), expected)


@torch.no_grad()
def test_records_are_joined(model):
    """Hidden states and attention maps, which have the shapes of the tower without prompts."""
    clip, names = model.get_base_model(), ["one", "__base__", "two"]
    clip.set_attn_implementation("eager")
    records = {"output_hidden_states": True, "output_attentions": True}
    try:
        with chosen_adapters.set(tuple(names)):
            found = clip.vision_model(IMAGES[:3], **records)
        for row, name in enumerate(names):
            alone = run_alone(model, name, lambda row=row: clip.vision_model(IMAGES[row : row + 1], **records))
            for key, count in (("hidden_states", 5), ("attentions", 4)):
                assert len(found[key]) == len(alone[key]) == count
                for a, b in zip(found[key], alone[key], strict=True):
                    torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-5)
    finally:
        clip.set_attn_implementation("sdpa")


def test_rows_of_other_shapes():
    with raises("Samples of a mixed batch cannot be joined, because they have the shapes (3,), (4,)."):
        mixed_batch.join([torch.zeros(1, 4), torch.zeros(2, 3)], [0, 1, 2])


@torch.no_grad()
def test_disabled_adapters_stay_disabled(model):
    with model.disable_adapter():
        expected = model(**TEXTS, pixel_values=IMAGES).logits_per_image
        assert torch.equal(model(**TEXTS, pixel_values=IMAGES, adapter_names=NAMES).logits_per_image, expected)
        found = model.get_image_features(IMAGES, adapter_names=NAMES).pooler_output
        assert torch.equal(found, model.get_image_features(IMAGES).pooler_output)


@pytest.mark.parametrize("call", ["forward", "get_image_features", "get_text_features"])
class TestErrors:
    def run(self, model, call, names):
        inputs = {"get_image_features": {}, "get_text_features": TEXTS}.get(call, TEXTS)
        inputs = inputs if call == "get_text_features" else inputs | {"pixel_values": IMAGES}
        return getattr(model, call)(**inputs, adapter_names=names)

    @pytest.mark.parametrize("count", [0, 4, 10])
    def test_another_number_of_rows(self, call, count, model):
        name = "pixel_values" if call == "get_image_features" else "input_ids"
        with raises(f"adapter_names must hold a name for each sample of {name}, which has 5, but it holds {count}."):
            self.run(model, call, ["one"] * count)

    def test_unknown_names(self, call, model):
        has = ", ".join(map(repr, sorted(model.peft_config)))
        with raises(
            f"The model has no SEP adapter 'five', 'six'; it has {has}. Add or load it first, or name one of these, or "
            '"__base__" for the model without an adapter.'
        ):
            self.run(model, call, ["six", "one", "five", "six", "__base__"])

    def test_a_single_name(self, call, model):
        with raises("adapter_names must be a list with a name for each sample, but got 'one'.", TypeError):
            self.run(model, call, "one")

    def test_training_mode(self, call):
        with raises("Cannot pass `adapter_names` when the model is in training mode."):
            self.run(make_model().train(), call, NAMES)

    def test_modules_to_save(self, call):
        model = get_peft_model(make_clip(), SEPConfig.published(modules_to_save=["visual_projection"]), "one").eval()
        message = (
            "An adapter cannot be chosen by name for a single call while one has modules_to_save, as one does: these "
            "modules follow the active adapter. Use set_adapter."
        )
        with raises(message):
            self.run(model, call, ["__base__"] * 5)


def test_adapters_of_other_methods_are_unknown():
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make_clip(), adapter_name="lora")
    with raises(
        "The model has no SEP adapter 'lora'; it has none. Add or load it first, or name one of these, or "
        '"__base__" for the model without an adapter.'
    ):
        mixed_batch.check_adapter_names(["lora"], {"lora": LoraConfig()})
    assert find_towers(model) == {}


@torch.no_grad()
def test_an_error_leaves_the_next_call_alone(model):
    expected = model(**TEXTS, pixel_values=IMAGES).logits_per_image
    with pytest.raises(RuntimeError):
        model(**TEXTS, pixel_values=IMAGES[:, :1], adapter_names=NAMES)
    assert chosen_adapters.get() is None
    assert torch.equal(model(**TEXTS, pixel_values=IMAGES).logits_per_image, expected)


@torch.no_grad()
def test_eight_threads_with_other_names_each(model):
    """While a ninth runs with the active adapter."""
    names = ["__base__", *ADAPTERS]
    jobs = [[names[(i + j * (i + 1)) % len(names)] for j in range(5)] for i in range(8)] + [None]

    def run(job) -> torch.Tensor:
        return model(**TEXTS, pixel_values=IMAGES, adapter_names=job).logits_per_image

    expected = [run(job) for job in jobs]
    found: list[list] = [[] for _ in jobs]
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait(timeout=60)
        for _ in range(5):
            with torch.no_grad():
                found[i].append(run(jobs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for runs, logits in zip(found, expected, strict=True):
        assert len(runs) == 5 and all(torch.equal(run, logits) for run in runs)


@torch.no_grad()
def test_compiled():
    """Other names are another graph, and the active adapter is not mistaken for either.

    Two layers, three adapters of two forms, one tower and the backend that runs what dynamo traced take less time.
    """
    model = make_model({"one": "rank", "two": "rank", "three": "start alone"}, text_layers=2, vision_layers=2)
    compiled = torch.compile(model.get_image_features, backend="eager")
    rows = ["one", "__base__", "two", "one", "three"]
    for names in (rows, None, rows[::-1]):
        expected = model.get_image_features(IMAGES, adapter_names=names).pooler_output
        found = compiled(IMAGES, adapter_names=names).pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


FAMILIES = [
    (name, tower)
    for name, case in CASES.items()
    for tower in ("text", "vision")
    if getattr(case, tower.replace("vision", "image"))
]


@pytest.mark.parametrize(("name", "tower"), FAMILIES)
@torch.no_grad()
def test_every_family(name, tower):
    """Wherever the model returns the embeddings of three inputs, or of the frames of three."""
    case = CASES[name]
    model = get_peft_model(
        case.build(), SEPConfig.published(**({"num_text_prompts": 3, "num_vision_prompts": 2} | case.options))
    )
    other = {"num_text_prompts": 1, "num_vision_prompts": 1, "frozen_weight": 0.0, "start_layer": 1}
    model.add_adapter("other", SEPConfig.published(**(other | case.options)))
    for seed, adapter in enumerate(("default", "other")):
        perturb(model, adapter, seed=seed)
    model.eval()
    names = ["other", "__base__", "default"]
    alone = [run_alone(model, n, lambda: find_features(model, case, tower)) for n in names]
    with chosen_adapters.set(tuple(names)):
        mixed = find_features(model, case, tower)
    assert mixed
    for position, features in enumerate(mixed):
        frames = len(features) // 3
        for row in range(len(features)):
            expected = alone[row // frames][position][row]
            torch.testing.assert_close(features[row], expected, rtol=1e-4, atol=2e-5)
