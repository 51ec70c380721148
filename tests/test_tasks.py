"""Many tasks over one model: each with its adapter and classes, in any thread, in one batch."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from bundled import ASSETS, IMAGE_FILES, NO_PROCESSOR
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from small_classifier import EncoderCalls, raises
from small_clip import make_clip, make_texts, perturb
from transformers import AutoImageProcessor

from sep_peft import AdapterMismatchError, SEPClassifier, SEPConfig, TaskClasses
from sep_peft.classifier.text_chunks import TextChunks


SMALL = {
    "num_text_prompts": 2,
    "num_vision_prompts": 2,
    "fusion_rank": 1,
    "share_fusion": True,
    "fusion_hidden_size": 4,
}


def make_classes(count: int, seed: int) -> TaskClasses:
    lengths = [3 + (seed + i) % 5 for i in range(count)]
    names = tuple(f"{seed}-{i}" for i in range(count))
    return TaskClasses(make_texts(lengths, seed=seed), (make_texts([n + 2 for n in lengths], seed=seed + 1),), names)


CLASSES = {"pets": make_classes(4, 1), "clothing": make_classes(3, 2), "plain": make_classes(5, 3)}
ADAPTERS = {"pets": "default", "clothing": "clothing", "plain": "__base__"}
OWN = make_classes(2, 9)


def add_adapter(model: PeftModel, name: str, seed: int, **config) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, SEPConfig.published(**(SMALL | config)))
    perturb(model, name, seed=seed)


def make_model() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(make_clip(), SEPConfig.published(**SMALL))
    perturb(model)
    add_adapter(model, "clothing", 5, num_vision_prompts=3, frozen_weight=0.2)
    return model


@pytest.fixture(scope="module")
def processor():
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return AutoImageProcessor.from_pretrained(ASSETS / "clip-small", **sizes)


@pytest.fixture
def served(processor) -> SEPClassifier:
    classifier = SEPClassifier(make_model(), OWN, processor=processor).eval()
    for name, adapter in ADAPTERS.items():
        classifier.add_task(name, CLASSES[name], adapter=adapter)
    return classifier


def alone(name: str, processor, images) -> list:
    """Predictions of a classifier that knows this task only."""
    model = make_model()
    classifier = SEPClassifier(model, CLASSES[name], processor=processor).eval()
    if ADAPTERS[name] == "__base__":
        with model.disable_adapter():
            return classifier.predict(images)
    model.set_adapter(ADAPTERS[name])
    return classifier.predict(images)


def assert_close(found: list, expected: list) -> None:
    """The same labels for every image, with the same probabilities but for rounding."""
    for prediction, other in zip(found, expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in prediction}
        assert scores == pytest.approx({entry["label"]: entry["score"] for entry in other}, abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


@pytest.mark.parametrize("name", CLASSES)
def test_a_task_is_a_classifier_of_its_own(name, served, processor):
    own = served.predict(IMAGE_FILES)
    assert served.predict(IMAGE_FILES, task=name) == alone(name, processor, IMAGE_FILES)
    assert served.predict(IMAGE_FILES[0], task=name, top_k=1) == alone(name, processor, IMAGE_FILES[0])[:1]
    assert served.model.active_adapter == "default"
    assert served.predict(IMAGE_FILES) == own


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_task_for_each_image(batch_size, served, processor):
    tasks = ["plain", "pets", "clothing", "pets"]
    found = served.predict(IMAGE_FILES, task=tasks, batch_size=batch_size)
    expected = [alone(task, processor, IMAGE_FILES)[i] for i, task in enumerate(tasks)]
    assert_close(found, expected)
    for prediction, image, task in zip(found, IMAGE_FILES, tasks, strict=True):
        assert_close([prediction], [served.predict(image, task=[task])])
    assert served.predict([], task=[]) == []


def test_tasks_are_told_apart(served):
    """So that equal predictions mean something."""
    scores = {name: [p[0]["score"] for p in served.predict(IMAGE_FILES, task=name)] for name in CLASSES}
    served.add_task("pets without an adapter", CLASSES["pets"], adapter="__base__")
    plain = served.predict(IMAGE_FILES, task="pets without an adapter")
    assert max(abs(p[0]["score"] - score) for p, score in zip(plain, scores["pets"], strict=True)) > 0.01


def test_texts_are_encoded_once_a_task_until_its_adapter_changes(served):
    calls = EncoderCalls(served)
    for name, count in (("pets", 2), ("clothing", 2), ("plain", 1), ("pets", 0), ("clothing", 0), ("plain", 0)):
        served.predict(IMAGE_FILES[:2], task=name)
        assert calls.take() == count, name
    served.predict(IMAGE_FILES[:3], task=["pets", "clothing", "plain"])
    assert calls.take() == 0
    before = served.predict(IMAGE_FILES[0], task="clothing"), served.predict(IMAGE_FILES[0], task="pets")
    perturb(served.model, "clothing", seed=7)  # moves the data of its parameters
    with torch.no_grad():
        for name, parameter in served.model.named_parameters():
            if ".clothing" in name:
                parameter.mul_(1.1)
    assert served.predict(IMAGE_FILES[0], task="clothing") != before[0]
    assert calls.take() == 1
    assert served.predict(IMAGE_FILES[0], task="pets") == before[1]
    assert calls.take() == 0


def test_prediction_keeps_the_mode(served):
    expected = served.predict(IMAGE_FILES, task="clothing")
    served.train()
    assert served.predict(IMAGE_FILES, task="clothing") == expected
    assert all(module.training for module in served.modules())


def test_disabled_adapters_are_disabled_for_tasks(served):
    served.add_task("pets without an adapter", CLASSES["pets"], adapter="__base__")
    expected = served.predict(IMAGE_FILES, task="pets without an adapter")
    with served.model.disable_adapter():
        assert served.predict(IMAGE_FILES, task="pets") == expected
    assert served.predict(IMAGE_FILES, task="pets") != expected


def test_tasks_over_a_model_without_peft_model(processor):
    """As transformers' `add_adapter` makes it."""
    torch.manual_seed(0)
    model = inject_adapter_in_model(SEPConfig.published(**SMALL), make_clip())
    perturb(model)
    classifier = SEPClassifier(model, OWN, processor=processor).eval()
    classifier.add_task("pets", CLASSES["pets"], adapter="default")
    assert classifier.predict(IMAGE_FILES, task="pets") == alone("pets", processor, IMAGE_FILES)
    with raises("Loading a task needs a PeftModel, but the model is a CLIPModel.", TypeError):
        classifier.tasks.load("clothing", "folder", CLASSES["clothing"], 128)


def test_looking_at_tasks(served):
    assert list(served.tasks) == ["pets", "clothing", "plain"] and len(served.tasks) == 3
    assert "pets" in served.tasks and "birds" not in served.tasks
    assert served.tasks["clothing"].adapter == "clothing"
    assert served.tasks["clothing"].classes is CLASSES["clothing"]
    served.tasks.remove("pets")
    assert list(served.tasks) == ["clothing", "plain"] and "default" in served.model.peft_config
    with raises("There is no task 'pets'; the tasks are ['clothing', 'plain']."):
        served.predict(IMAGE_FILES[0], task="pets")
    served.add_task("pets", CLASSES["pets"], adapter="default")


def test_tasks_follow_the_model(served):
    """To another device or dtype, and into copies."""
    served.double()
    chunks = [module for module in served.to("meta").tasks.modules() if isinstance(module, TextChunks)]
    assert {tensor.device.type for module in chunks for tensor in module.following.values()} == {"meta"}


NO_BIRDS = "There is no task 'birds'; the tasks are ['pets', 'clothing', 'plain']."
NO_ADAPTER = (
    "The model has no SEP adapter '{}'; it has {}. Add or load it first, or name one of these, or \"__base__\" for the "
    "model without an adapter."
)
TOO_LONG = (
    "A text of 19 tokens does not fit: the text tower has 20 positions and 2 are taken by prompts, so 18 tokens are "
    "left (BOS and EOS included). Shorten the text or use fewer prompts (num_text_prompts)."
)
ERRORS = [
    (lambda c: c.predict(IMAGE_FILES, task="birds"), NO_BIRDS),
    (lambda c: c.predict(IMAGE_FILES[:2], task=["pets", "birds"]), NO_BIRDS),
    (
        lambda c: c.predict(IMAGE_FILES[:2], task=["pets"]),
        "task must be one name or one for each of 2 images, but got 1.",
    ),
    (
        lambda c: c.predict(IMAGE_FILES[:2], task=["pets", "clothing"], top_k=4),
        "top_k must be between 1 and 3, the number of classes, but got 4.",
    ),
    (lambda c: c.add_task("pets", OWN), "There is a task 'pets' already. Remove it first, or choose another name."),
    (lambda c: c.add_task(" ", OWN), "A task's name must be a text that is not blank, but got ' '."),
    (lambda c: c.add_task("birds", OWN), NO_ADAPTER.format("birds", "'clothing', 'default'")),
    (lambda c: c.add_task("birds", OWN, adapter="b\x1b"), NO_ADAPTER.format("b\\x1b", "'clothing', 'default'")),
    (lambda c: c.add_task("birds", ["crow"], adapter="default"), NO_PROCESSOR.format("to read class names")),
    (lambda c: c.add_task("birds", TaskClasses(make_texts([3, 19])), adapter="default"), TOO_LONG),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors_leave_everything_as_it_was(call, message, served):
    before = served.predict(IMAGE_FILES, task="pets")
    with raises(message):
        call(served)
    assert list(served.tasks) == ["pets", "clothing", "plain"]
    assert served.predict(IMAGE_FILES, task="pets") == before


def test_the_longest_text_is_that_of_the_tasks_adapter(served):
    """Without prompts there is room for more."""
    served.add_task("long", TaskClasses(make_texts([3, 20])), adapter="__base__")
    assert len(served.predict(IMAGE_FILES[0], task="long")) == 2


def test_a_deleted_adapter(served):
    served.model.delete_adapter("clothing")
    with raises(NO_ADAPTER.format("clothing", "'default'")):
        served.predict(IMAGE_FILES[:2], task=["pets", "clothing"])


# loading


@pytest.fixture
def saved(tmp_path) -> Path:
    """The task "clothing", saved."""
    model = make_model()
    model.set_adapter("clothing")
    SEPClassifier(model, CLASSES["clothing"]).save_pretrained(tmp_path / "clothing")
    return tmp_path / "clothing"


def snapshot(classifier: SEPClassifier) -> tuple:
    modules = [(name, type(module), module.training) for name, module in classifier.named_modules()]
    parameters = [(name, p.requires_grad, p.data_ptr()) for name, p in classifier.named_parameters()]
    return modules, parameters, list(classifier.model.peft_config), list(classifier.tasks)


def make_empty(processor) -> SEPClassifier:
    model = get_peft_model(make_clip(), SEPConfig.published(**SMALL))
    return SEPClassifier(model, OWN, processor=processor)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [str, Path])
def test_loading_a_task(kind, training, saved, processor):
    classifier = make_empty(processor).train(training)
    before = snapshot(classifier)
    assert classifier.load_task(kind(saved), "worn") is classifier
    assert classifier.model.active_adapter == "default"
    assert {module.training for module in classifier.modules()} == {training}
    assert [item for item in snapshot(classifier)[1] if ".worn" not in item[0]] == before[1]
    assert not any(p.requires_grad for name, p in classifier.named_parameters() if ".worn" in name)
    assert classifier.predict(IMAGE_FILES, task="worn") == alone("clothing", processor, IMAGE_FILES)
    classifier.load_task(saved.parent, "again", subfolder=saved.name)
    assert classifier.predict(IMAGE_FILES, task="again") == alone("clothing", processor, IMAGE_FILES)


def lose_classes(folder: Path) -> None:
    (folder / "sep_classes.json").unlink()


def lose_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    state.popitem()
    save_file(state, file, metadata={"format": "pt"})


def lengthen_texts(folder: Path) -> None:
    data = json.loads((folder / "sep_classes.json").read_text())
    data |= TaskClasses(make_texts([19] * 3), names=tuple(data["names"])).to_json()
    (folder / "sep_classes.json").write_text(json.dumps(data | {"format_version": 1}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lose_classes, ValueError, r".*sep_classes\.json does not exist, so there are no classes to load\."),
        (lose_weights, AdapterMismatchError, "the file of adapter 'worn' does not fit this model and configuration; "),
        (lengthen_texts, ValueError, "A text of 19 tokens does not fit"),
    ],
    ids=["classes", "weights", "texts"],
)
def test_a_task_that_cannot_be_loaded_leaves_nothing(damage, error, message, saved, processor):
    classifier = make_empty(processor)
    before = snapshot(classifier)
    damage(saved)
    with pytest.raises(error, match=message):
        classifier.load_task(saved, "worn")
    assert snapshot(classifier) == before


@pytest.mark.parametrize("name", ["pets", "clothing"])
def test_loading_under_a_name_that_is_taken(name, saved, processor):
    classifier = SEPClassifier(make_model(), OWN, processor=processor)
    classifier.add_task("pets", CLASSES["pets"], adapter="default")
    before = snapshot(classifier)
    message = {
        "pets": "There is a task 'pets' already. Remove it first, or choose another name.",
        "clothing": "There is an adapter 'clothing' already. Choose another name, or use add_task.",
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message[name])}$"):
        classifier.load_task(saved, name)
    assert snapshot(classifier) == before


# many


def test_a_hundred_adapters_and_eight_threads(processor):
    """Every thread predicts for other tasks, alone and mixed; nobody gets what another one asked for."""
    model = get_peft_model(make_clip(text_layers=2, vision_layers=2), SEPConfig.published(**SMALL), "task0")
    perturb(model, "task0", seed=0)
    for i in range(1, 100):
        add_adapter(model, f"task{i}", seed=i)
    classifier = SEPClassifier(model, OWN, processor=processor).eval()
    for i in range(100):
        classifier.add_task(f"task{i}", make_classes(2 + i % 3, seed=i))
    expected = {i: classifier.predict(IMAGE_FILES, task=f"task{i}") for i in range(0, 100, 7)}
    classifier.train().eval()  # drops the texts, so that threads encode them at the same time
    wanted = sorted(expected)
    problems: list[str] = []
    done: list[int] = []
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait(timeout=60)
        for step in range(3):
            tasks = [wanted[(thread * (step + 1) + i) % len(wanted)] for i in range(4)]
            mixed = classifier.predict(IMAGE_FILES, task=[f"task{i}" for i in tasks])
            try:
                assert_close(mixed, [expected[task][row] for row, task in enumerate(tasks)])
                assert_close(classifier.predict(IMAGE_FILES, task=f"task{tasks[0]}"), expected[tasks[0]])
            except AssertionError as error:
                problems.append(str(error))
        done.append(thread)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert problems == [] and sorted(done) == list(range(8))
    assert model.active_adapter == "task0"
