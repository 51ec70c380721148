"""Adapters from strangers: hostile files are refused with a clear message, and the model stays as it was."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_classifier import CLASSES, IMAGES, TEMPLATES, make_model, raises
from small_clip import make_clip
from small_sep import outputs, snapshot
from transformers import AutoProcessor, CLIPModel

from sep_peft import AdapterMismatchError, SEPClassifier, SEPConfig, TaskClasses, hotswap_adapter
from sep_peft.classifier.files import CLASSES_FILE, PROTOTYPES_FILE, load_base
from sep_peft.classifier.prediction import Task, predict_batch
from sep_peft.cli.info import info
from sep_peft.cli.session import AdapterSource, Session
from sep_peft.tuner.messages import acts
from sep_peft.tuner.tower import SEPTower


PROMPTS = "base_model.model.text_model.sep_prompts"
FC1 = "base_model.model.vision_model.sep_fusion.1.fc1.weight"
MISFIT = "the file of adapter 'new' does not fit this model and configuration; "
NUMBERS = (
    "the file of adapter 'new' holds numbers that are not finite or larger than 65504 in {}. Train with a lower "
    "learning rate, or take an earlier save."
)
OF_BASE = (
    "the file of adapter 'new' holds weights of the base model, {} in all, such as {}. PEFT saves embeddings with an "
    "adapter where save_embedding_layers=True or the vocabulary was resized; loaded, they would change the model for "
    "all its adapters. Save the adapter again with save_embedding_layers=False; a base model that was changed is saved "
    "by itself, with its own save_pretrained."
)
OUTSIDE = (
    "modules_to_save must name modules outside of the towers that take prompts, but {} is one, in one or around one."
)


def state(model) -> tuple:
    """All by which a load could have changed a model."""
    active = getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None
    return (
        snapshot(model),
        sorted(getattr(model, "peft_config", {})),
        active,
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
    )


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A good adapter with its classes."""
    folder = tmp_path_factory.mktemp("good")
    SEPClassifier(make_model(), CLASSES, TEMPLATES).save_pretrained(folder)
    return folder


class Files:
    """A copy of the good adapter to damage."""

    def __init__(self, source: Path, folder: Path):
        self.folder = folder
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    def config(self, **options) -> None:
        file = self.folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | options))

    def weights(self, change: Callable[[dict], None]) -> None:
        file = self.folder / SAFETENSORS_WEIGHTS_NAME
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})


@pytest.fixture
def files(saved, tmp_path) -> Files:
    return Files(saved, tmp_path)


# where an adapter enters


def by_from_pretrained(folder: Path, model) -> None:
    PeftModel.from_pretrained(model, folder, "new")


def by_from_pretrained_to_train(folder: Path, model) -> None:
    PeftModel.from_pretrained(model, folder, "new", is_trainable=True, low_cpu_mem_usage=True)


def by_from_pretrained_with_a_config(folder: Path, model) -> None:
    config = SEPConfig.from_pretrained(folder)
    config.weights_origin = None  # as if it had been made elsewhere
    PeftModel.from_pretrained(model, folder, "new", config=config)


def by_transformers(folder: Path, model) -> None:
    model.load_adapter(folder, "new")


def by_transformers_from_a_state_dict(folder: Path, model) -> None:
    state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    model.load_adapter(None, "new", peft_config=PeftConfig.from_pretrained(folder), adapter_state_dict=state)


def by_load_adapter(folder: Path, model) -> None:
    model.load_adapter(folder, "new")


def by_classifier(folder: Path, model) -> None:
    SEPClassifier.from_pretrained(folder, model=model, adapter_name="new")


def by_task(folder: Path, model) -> None:
    SEPClassifier(model, CLASSES, TEMPLATES, prototype_weight=0).load_task(folder, "new")


#: Loader, and whether it takes a model that has an adapter already.
LOADERS = [
    (by_from_pretrained, False),
    (by_from_pretrained_to_train, False),
    (by_from_pretrained_with_a_config, False),
    (by_transformers, False),
    (by_load_adapter, True),
    (by_classifier, False),
    (by_classifier, True),
    (by_task, True),
]
#: Those of them that read classes.
OF_CLASSES = [(by_classifier, False), (by_classifier, True), (by_task, True)]


def name_of(value: object) -> object:
    """The name of a loader: what a function is printed as differs from process to process."""
    return getattr(value, "__name__", value)


class Case(NamedTuple):
    damage: Callable[[Files], object]
    message: str
    error: type[Exception] = ValueError


def config(message: str, **options) -> Case:
    return Case(lambda files: files.config(**options), message)


def weights(change: Callable[[dict], object], message: str, error: type[Exception] = AdapterMismatchError) -> Case:
    return Case(lambda files: files.weights(change), message, error)


def number(value: float, dtype: torch.dtype = torch.float32) -> Case:
    def change(state: dict) -> None:
        state[FC1] = state[FC1].to(dtype)
        state[FC1][1, 2] = value

    return weights(change, NUMBERS.format(FC1), ValueError)


CASES = {
    "modules_to_save: an empty name": config(
        "{folder}/adapter_config.json: modules_to_save must name modules, but got an empty name in [''].",
        modules_to_save=[""],
    ),
    "modules_to_save: a part of the fusions": config(
        OUTSIDE.format("text_model.encoder.layers.0.mlp.fc1"), modules_to_save=["fc1"]
    ),
    "modules_to_save: a part of a tower": config(
        OUTSIDE.format("vision_model.post_layernorm"), modules_to_save=["post_layernorm"]
    ),
    "modules_to_save: both embeddings": config(OUTSIDE.format("text_model.embeddings"), modules_to_save=["embeddings"]),
    "modules_to_save: a tower": config(OUTSIDE.format("text_model"), modules_to_save=["text_model"]),
    "modules_to_save: nowhere": config(
        "modules_to_save must name modules of CLIPModel, but it has no 'nowhere'.", modules_to_save=["nowhere"]
    ),
    "modules_to_save: not in the file": config(
        MISFIT + "missing keys: base_model.model.text_projection.weight", modules_to_save=["text_projection"]
    ),
    "a wide fusion": config(
        "fusion_hidden_size must be at most 1024 for the text tower, which is 32 wide, but got 200000.",
        fusion_hidden_size=200_000,
    ),
    "a high rank": config(
        "fusion_rank must be at most 32, the width of the text tower, but got 100000. None stands for full width.",
        fusion_rank=100_000,
    ),
    "many prompts": config(
        "num_vision_prompts must be at most 9, the number of tokens of an image to select from, but got 2000000.",
        num_vision_prompts=2_000_000,
    ),
    "many prompts that nothing else limits": config(
        "num_text_prompts must be at most 4096, because prompts join the tokens of every layer, but got 2000000.",
        num_text_prompts=2_000_000,
        start_layer=1,
        fusion_rank=None,
    ),
    "another number of prompts": config(
        MISFIT + f"other shapes: {PROMPTS} is (3, 32), needed is (4, 32)", num_text_prompts=4
    ),
    "another model": config(
        "This adapter was made for another architecture: it needs {'model_type': 'siglip'}, but the model has "
        "{'model_type': 'clip', 'text': {'hidden_size': 32, 'num_layers': 3}, 'vision': {'hidden_size': 48, "
        "'num_layers': 4}}.",
        base_architecture={"model_type": "siglip"},
    ),
    "a missing key": weights(lambda state: state.pop(PROMPTS), MISFIT + f"missing keys: {PROMPTS}"),
    "a key too many": weights(
        lambda state: state.update({PROMPTS + "_2": torch.zeros(2)}), MISFIT + f"unexpected keys: {PROMPTS}_2"
    ),
    "a key that acts": weights(
        lambda state: state.update({"\x1b[2J" + "x" * 400: torch.zeros(2)}),
        MISFIT + "unexpected keys: base_model.model.\\x1b[2J" + "x" * 279,
    ),
    "a weight of the base model": weights(
        lambda state: state.update({"base_model.model.logit_scale": torch.zeros(())}),
        OF_BASE.format(1, "base_model.model.logit_scale"),
    ),
    "a weight of another adapter": weights(
        lambda state: state.update({"base_model.model.text_model.sep_prompts.default": torch.zeros(3, 32)}),
        MISFIT + "unexpected keys: base_model.model.text_model.sep_prompts.default",
    ),
    "another shape": weights(
        lambda state: state.update({PROMPTS: torch.zeros(3, 33)}),
        MISFIT + f"other shapes: {PROMPTS} is (3, 33), needed is (3, 32)",
    ),
    "no entries": weights(lambda state: [state.pop(key) for key in list(state)], MISFIT + "missing keys: "),
    "NaN": number(float("nan")),
    "infinity": number(float("inf")),
    "minus infinity in half precision": number(float("-inf"), torch.float16),
    "a number that overflows when squared": number(1e38),
    "a number that overflows in fp32": number(-1e300, torch.float64),
    "no weights": Case(
        lambda files: (files.folder / SAFETENSORS_WEIGHTS_NAME).unlink(),
        "{folder} holds the configuration of an adapter, but no weights. Copy or download it again; for a new adapter "
        "with these options, set inference_mode to false in it and use get_peft_model.",
    ),
    "weights cut short": Case(
        lambda files: (file := files.folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(file.read_bytes()[:-1]),
        "{folder}/adapter_model.safetensors cannot be read (",
        SafetensorError,
    ),
}


@functools.cache
def expected_outputs(has_adapter: bool) -> torch.Tensor:
    return outputs(make_model() if has_adapter else make_clip())


def assert_refused(load, folder: Path, has_adapter: bool, error: type[Exception], message: str) -> None:
    """With the message, and with everything as before."""
    model = make_model() if has_adapter else make_clip()
    model.train()
    list(model.modules())[-1].eval()  # a mode that switching all of them would not bring back
    next(model.parameters()).requires_grad_(True)
    before = state(model)
    with pytest.raises(error) as raised:
        load(folder, model)
    shown = str(raised.value)
    assert shown == message or (message.endswith((": ", "(")) and shown.startswith(message)), shown
    assert state(model) == before
    assert torch.equal(outputs(model), expected_outputs(has_adapter))


@pytest.mark.parametrize(("load", "has_adapter"), LOADERS, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_refused_before_the_model_changes(files, name, load, has_adapter):
    case = CASES[name]
    case.damage(files)
    message = case.message
    if load is by_transformers:  # reads the options by a class of PEFT, which does not pass on from which file
        message = message.removeprefix("{folder}/adapter_config.json: ")
    assert_refused(load, files.folder, has_adapter, case.error, message.replace("{folder}", str(files.folder)))


# what only the classes beside an adapter show, once it is in the model


@pytest.mark.parametrize(("load", "has_adapter"), OF_CLASSES, ids=name_of)
def test_classes_of_another_vocabulary_are_refused_and_the_adapter_taken_back(files, load, has_adapter):
    file = files.folder / "sep_classes.json"
    data = json.loads(file.read_text())
    data["class_inputs"]["input_ids"][0][1] = 4000
    file.write_text(json.dumps(data))
    message = (
        "Token id 4000 is outside of the text tower's vocabulary of 63 ids. Tokenize with the processor of this base "
        "model."
    )
    assert_refused(load, files.folder, has_adapter, ValueError, message)


@pytest.mark.parametrize(("load", "has_adapter"), OF_CLASSES, ids=name_of)
def test_prototypes_of_another_width_are_refused_and_the_adapter_taken_back(files, load, has_adapter):
    file = files.folder / "sep_classes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prototype_logit_weight": 1.0}))
    save_file({"prototypes": torch.ones(4, 30)}, files.folder / "sep_prototypes.safetensors")
    message = (
        "The prototypes of the classes have 30 entries, but the model's embeddings 24: they were made with another "
        "base model."
    )
    assert_refused(load, files.folder, has_adapter, ValueError, message)


# files that this package reads before PEFT does


def text(name: str, change: Callable[[str], str]) -> Callable[[Files], object]:
    """The text of a file is changed."""
    return lambda files: (file := files.folder / name).write_text(change(file.read_text()))


def classes(**entries) -> Callable[[Files], object]:
    return text(CLASSES_FILE, lambda old: json.dumps(json.loads(old) | entries))


def class_inputs(**entries) -> Callable[[Files], object]:
    """Of the class texts."""

    def change(old: str) -> str:
        data = json.loads(old)
        data["class_inputs"] |= entries
        return json.dumps(data)

    return text(CLASSES_FILE, change)


def prototypes(change: Callable[[dict], object] = lambda state: None, names: int = 4) -> Callable[[Files], object]:
    """Prototypes lie beside the adapter, with a weight in the class file."""

    def damage(files: Files) -> None:
        classes(prototype_logit_weight=1.5)(files)
        state = {"prototypes": torch.ones(names, 24)}
        change(state)
        save_file(state, files.folder / PROTOTYPES_FILE)

    return damage


def pickled(make: Callable[[dict], object]) -> Callable[[Files], object]:
    """The weights lie in a file of torch.save."""

    def damage(files: Files) -> None:
        weights = files.folder / SAFETENSORS_WEIGHTS_NAME
        torch.save(make(load_file(weights)), files.folder / WEIGHTS_NAME)
        weights.unlink()

    return damage


def compressed(files: Files) -> None:
    pickled(dict)(files)
    file = files.folder / WEIGHTS_NAME
    source = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(10**6) if entry.filename.endswith("/data/0") else old.read(entry))


def other_dtype(name: bytes) -> Callable[[Files], object]:
    """The header names another type of numbers, of as many letters."""

    def damage(files: Files) -> None:
        file = files.folder / SAFETENSORS_WEIGHTS_NAME
        file.write_bytes(file.read_bytes().replace(b'"F32"', b'"' + name + b'"', 1))

    return damage


CONFIG_FILE, CLASS_FILE = "{folder}/adapter_config.json", "{folder}/sep_classes.json"
UNKNOWN = "{folder} holds an adapter of a method that PEFT does not know, but SEP is needed."
NO_JSON = " is no valid JSON ({}). Copy or download it again."
NO_PICKLE = (
    "{folder}/adapter_model.bin cannot be read: it is cut short or damaged, or holds more than tensors. Copy or "
)
PROTOTYPES_ALONE = (
    "{{folder}}/sep_prototypes.safetensors must hold prototypes alone, one for each name in sep_classes.json, but "
    "holds {}. Copy or download it again."
)
EMPTY_NAME = CLASS_FILE + ": A class name must be a text that is not blank, but got {}."
OWN_CASES = {
    "config: no method": Case(text(CONFIG_NAME, lambda old: old.replace('"peft_type"', '"x"')), UNKNOWN),
    "config: a method that is none": config(UNKNOWN, peft_type="\x1b[2J"),
    "config: a method that is a list": config(UNKNOWN, peft_type=["SEP"]),
    "config: another method": config(
        "{folder} holds an adapter of the method LORA, but SEP is needed.", peft_type="LORA"
    ),
    "config: an argument of PEFT": config(CONFIG_FILE + " must not have the key 'cls': no option is called so.", cls=1),
    "config: NaN": config(CONFIG_FILE + NO_JSON.format("NaN is no number of JSON"), frozen_weight=float("nan")),
    "config: a number beyond all": Case(
        text(CONFIG_NAME, lambda old: old.replace('"frozen_weight": 0.5', '"frozen_weight": 1e999')),
        CONFIG_FILE + ": frozen_weight must be a number of at least 0 and below 1, but got inf.",
    ),
    "config: a number of too many digits": Case(
        text(CONFIG_NAME, lambda old: old.replace('"start_layer": 0', f'"start_layer": {"9" * 5000}')),
        CONFIG_FILE + " is no valid JSON (",
    ),
    "config: a key twice": Case(
        text(CONFIG_NAME, lambda old: old.replace("{", '{"fusion": "none",', 1)),
        CONFIG_FILE + NO_JSON.format("the key 'fusion' stands there twice"),
    ),
    "config: lists in lists": Case(
        text(CONFIG_NAME, lambda old: old.replace('"revision": null', f'"revision": {"[" * 900}{"]" * 900}')),
        CONFIG_FILE + NO_JSON.format("it is nested more than 20 deep"),
    ),
    "config: more lists in lists": Case(
        text(CONFIG_NAME, lambda old: "[" * 100_000), CONFIG_FILE + NO_JSON.format("it is nested more than 20 deep")
    ),
    "config: a list": Case(
        text(CONFIG_NAME, lambda old: f"[{old}]"), CONFIG_FILE + " must hold a JSON object, but holds [{'arch"
    ),
    "config: nothing": Case(
        text(CONFIG_NAME, lambda old: "null"), CONFIG_FILE + " must hold a JSON object, but holds None."
    ),
    "config: bytes": Case(
        lambda files: (files.folder / CONFIG_NAME).write_bytes(b"\xff\xfe{"), CONFIG_FILE + " is no valid JSON ("
    ),
    "config: too large": Case(text(CONFIG_NAME, lambda old: old + " " * 2**20), CONFIG_FILE + " has 1049"),
    "config: towers that are a text": config(
        CONFIG_FILE + ": base_architecture must be None or a dict, but got 'clip'.", base_architecture="clip"
    ),
    "config: a long text": config(
        CONFIG_FILE + f': fusion must be "attention", "independent" or "none", but got \'{"x" * 97}...{"x" * 98}\'.',
        fusion="x" * 100_000,
    ),
    "config: a task type that acts": config(
        CONFIG_FILE
        + ": task_type must be None, but got '\\x1b[2J': SEP adapts both towers of a dual encoder, while PEFT's "
        "task types wrap models of another call signature. Leave task_type out.",
        task_type="\x1b[2J",
    ),
    "config: a field of a spec that acts": config(
        CONFIG_FILE + ": architecture has no field '\\x1b[2J'; it knows text, vision, logit_scale, scale, logit_bias, "
        "variants, max_scale.",
        architecture={"\x1b[2J": 1},
    ),
    "classes: a key that acts": Case(
        class_inputs(**{"\x1b[2J": 5}),
        CLASS_FILE + ": \\x1b[2J in class_inputs of the class list must hold lists of integers, but got 5.",
    ),
    "classes: an input that no tower reads": Case(
        class_inputs(pixel_values=[[0]] * 4),
        CLASS_FILE + ": Tokenized texts may hold input_ids, attention_mask, token_type_ids, position_ids, but got "
        "'pixel_values'.",
    ),
    "classes: half a character": Case(
        classes(names=["a", "b", "c", "d\ud800"]),
        CLASS_FILE + ": A class name must be a text that UTF-8 can hold, but got 'd\\ud800'. Rename it.",
    ),
    "classes: a long name": Case(
        classes(names=["a", "b", "c", "d" * 10_001]),
        CLASS_FILE + f": A class name must have at most 10000 characters, but got 10001: '{'d' * 97}...{'d' * 98}'.",
    ),
    "classes: a long template": Case(
        classes(templates=["{}" + "d" * 10_000]),
        CLASS_FILE + f": A template must have at most 10000 characters, but got 10002: '{{}}{'d' * 95}...{'d' * 98}'.",
    ),
    "classes: a name that is a number": Case(classes(names=["a", "b", "c", 5]), EMPTY_NAME.replace("{}", "5")),
    "classes: names that act": Case(
        classes(names=["a\x1b", "b", "c", "a\x1b"]),
        CLASS_FILE + ": Class names must differ, but these occur more than once: 'a\\x1b'.",
    ),
    "classes: a weight that is a text": Case(
        classes(prototype_logit_weight=""),
        CLASS_FILE + ": prototype_logit_weight of the class list must be a number, but got ''.",
    ),
    "classes: a temperature beyond all": Case(
        classes(calibration={"temperature": 10**400}),
        CLASS_FILE + ": temperature of the calibration must be a number from 0.01 to 1000, but got 1000000",
    ),
    "classes: a version that is long": Case(
        classes(format_version="1" * 10_000),
        CLASS_FILE
        + f" has format version '{'1' * 97}...{'1' * 98}', but this version of sep_peft reads 1 to 4. Upgrade "
        "sep_peft.",
    ),
    "classes: a key twice": Case(
        text(CLASSES_FILE, lambda old: old.replace("{", '{"names": [],', 1)),
        CLASS_FILE + NO_JSON.format("the key 'names' stands there twice"),
    ),
    "prototypes: missing": Case(
        classes(prototype_logit_weight=1.5),
        "{folder}/sep_prototypes.safetensors does not exist, but sep_classes.json says that it should. Copy or "
        "download it again.",
    ),
    "prototypes: of another class list": Case(prototypes(names=5), PROTOTYPES_ALONE.format("{'prototypes': (5, 24)}")),
    "prototypes: wider than any": Case(
        prototypes(lambda state: state.update(prototypes=torch.ones(4, 2**16 + 1))),
        PROTOTYPES_ALONE.format("{'prototypes': (4, 65537)}"),
    ),
    "prototypes: something beside them": Case(
        prototypes(lambda state: state.update(other=torch.ones(1))),
        PROTOTYPES_ALONE.format("{'other': (1,), 'prototypes': (4, 24)}"),
    ),
    "prototypes: integers": Case(
        prototypes(lambda state: state.update(prototypes=torch.ones(4, 24, dtype=torch.long))),
        CLASS_FILE + ": prototypes must be floats, but got torch.int64.",
    ),
    "pickle: cut short": Case(
        lambda files: (pickled(dict)(files), (file := files.folder / WEIGHTS_NAME).write_bytes(file.read_bytes()[:-9])),
        NO_PICKLE + "download it again.",
    ),
    "pickle: code": Case(pickled(lambda state: {"x": print}), NO_PICKLE + "download it again."),
    "pickle: compressed": Case(compressed, NO_PICKLE + "download it again."),
    "pickle: a key that is no text": Case(
        pickled(lambda state: state | {5: torch.zeros(1)}),
        "{folder}/adapter_model.bin holds more than tensors by name, so it is no file of an adapter's weights.",
    ),
    "header: a type that acts": Case(
        other_dtype(b"\\n\\u001b"), "{folder}/adapter_model.safetensors cannot be read (", SafetensorError
    ),
    "header: too large": Case(
        lambda files: files.weights(lambda state: state.update({"x" * (2**22): torch.zeros(1)})),
        "{folder}/adapter_model.safetensors has a header of 42",
        SafetensorError,
    ),
}


def by_info(folder: Path, model) -> None:
    info(AdapterSource(str(folder)), Session())


def by_hotswap(folder: Path, model) -> None:
    hotswap_adapter(model, folder, "default")


@pytest.mark.parametrize("name", OWN_CASES)
def test_files_are_read_before_peft_reads_them(files, name):
    """By each way in, refused with the same message, that acts on no terminal."""
    case = OWN_CASES[name]
    case.damage(files)
    message = case.message.replace("{folder}", str(files.folder))
    ways = [by_classifier, by_task, by_info]
    ways += [] if name.startswith(("classes", "prototypes")) else [by_hotswap]
    model = make_model()
    before = state(model)
    for way in ways:
        with pytest.raises(case.error) as raised:
            way(files.folder, model)
        shown = str(raised.value)
        assert shown == message or (not message.endswith(".") and shown.startswith(message)), shown
        assert not any(map(acts, shown))
        assert state(model) == before
    assert torch.equal(outputs(model), outputs(make_model()))


# names


TAKEN = (
    "The adapter name {!r} is also the name of a part of every SEP adapter, so keys could not be told apart. Choose "
    "another name."
)
NO_FOLDER = "An adapter name must not contain any of {}, because PEFT saves it as a folder of this name, but got {!r}."
LONG = "\u00e9" * 101
BAD_NAMES = {
    "/tmp/folder": NO_FOLDER.format(["/"], "/tmp/folder"),
    "a\\b": NO_FOLDER.format(["\\"], "a\\b"),
    "C:x": NO_FOLDER.format([":"], "C:x"),
    "a\0b": NO_FOLDER.format(["\0"], "a\0b"),
    "a\nb\x1b": NO_FOLDER.format(["\n", "\x1b"], "a\nb\x1b"),
    "lone \ud800": NO_FOLDER.format(["\ud800"], "lone \ud800"),
    "..": "An adapter name must not be empty nor contain a dot, but got '..'.",
    "": "An adapter name must not be empty nor contain a dot, but got ''.",
    LONG: "An adapter name must be at most 200 bytes long, because PEFT saves it as a folder of this name, but got "
    f"202: {LONG[:40]!r}...",
    "sep_prompts": TAKEN.format("sep_prompts"),
    "sep_fusion": TAKEN.format("sep_fusion"),
    "sep_settings": TAKEN.format("sep_settings"),
}


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.parametrize("further", [False, True])
def test_names_that_are_no_folder(name, further):
    model = make_model() if further else make_clip()
    before = state(model)
    with raises(BAD_NAMES[name]):
        model.add_adapter(name, SEPConfig()) if further else get_peft_model(model, SEPConfig(), name)
    assert state(model) == before


@pytest.mark.parametrize("name", ["\u00e9" * 100, "two words", "a-b_c"])
def test_names_that_are_a_folder(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(make_clip(), tmp_path / name)), outputs(model))


# a step that fails after the checks


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_failure_half_way_is_taken_back(files, has_adapter, monkeypatch):
    """Memory that runs out at the second tower, say."""
    made = []

    def update_layer(tower, *args):
        made.append(tower)
        if len(made) == 2:
            raise MemoryError("no memory")
        return original(tower, *args)

    model = make_model() if has_adapter else make_clip()
    original = SEPTower.update_layer
    monkeypatch.setattr(SEPTower, "update_layer", update_layer)
    before = state(model)
    with pytest.raises(MemoryError):
        by_load_adapter(files.folder, model) if has_adapter else by_from_pretrained(files.folder, model)
    assert len(made) == 2 and state(model) == before
    monkeypatch.undo()
    by_load_adapter(files.folder, model) if has_adapter else by_from_pretrained(files.folder, model)


def test_options_of_a_file_make_a_new_adapter(files):
    """Once one of them is another, the weights beside them are no business of the new adapter."""
    config = SEPConfig.from_pretrained(files.folder)
    config.num_text_prompts = 5
    assert get_peft_model(make_clip(), config).base_model.towers["text"].sep_prompts["default"].shape == (5, 32)


def test_the_weights_beside_an_adapter_are_asked_for_once(files):
    """A soup of a loaded adapter does not depend on what has become of its file."""
    model = PeftModel.from_pretrained(make_clip(), files.folder)
    files.weights(lambda state: state.pop(PROMPTS))
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "soup")
    assert "soup" in model.peft_config


# hot swaps


@pytest.mark.parametrize("name", ["NaN", "a number that overflows when squared", "a missing key", "no entries"])
def test_hot_swaps_swap_all_or_nothing(files, name):
    CASES[name].damage(files)
    model = make_model("new", seed=9)
    before, weights_before = state(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CASES[name].error) as raised:
        hotswap_adapter(model, files.folder, "new")
    assert str(raised.value).startswith(CASES[name].message)
    assert state(model) == before
    assert all(torch.equal(value, weights_before[key]) for key, value in model.state_dict().items())


# the base model that an adapter names


def test_a_path_that_an_adapter_of_the_hub_names_is_refused(files, monkeypatch):
    files.config(base_model_name_or_path=str(files.folder))
    read = SEPConfig.of_adapter(files.folder)
    monkeypatch.setattr(SEPConfig, "of_adapter", lambda *args, **kwargs: read)
    with raises(
        f"The adapter user/name on the Hub names {str(files.folder)!r} as its base model, which is a path on this "
        "machine or no name on the Hub. Load the model you trust and hand it in: "
        "SEPClassifier.from_pretrained(path, model=model, processor=processor)."
    ):
        load_base("user/name", None, {})


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_the_base_model_runs_only_for_the_caller(files, monkeypatch, caplog, trust):
    files.config(base_model_name_or_path=str(files.folder))
    asked = []
    for loader in (CLIPModel, AutoProcessor):
        monkeypatch.setattr(loader, "from_pretrained", lambda name, **options: asked.append((name, options)))
    load_base(str(files.folder), None, {}, **({"trust_remote_code": True} if trust else {}))
    assert asked == [(str(files.folder), {"revision": "main", "trust_remote_code": trust})] * 2
    path = files.folder
    assert caplog.messages == [
        f"The adapter {path} names its base model by a path on this machine: {str(path)!r} is loaded."
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"auto_mapping": "CLIPModel"},
        {"auto_mapping": {"base_model_class": 5}},
        {"auto_mapping": {"base_model_class": "AutoModel"}},
        {"auto_mapping": {"base_model_class": "CLIPModel"}, "base_model_name_or_path": 5},
    ],
)
def test_no_base_model_of_transformers(files, options):
    (files.folder / SAFETENSORS_WEIGHTS_NAME).unlink()  # which have the id of their save
    files.config(**options)
    with raises(
        f"The adapter {files.folder} does not name a base model of transformers. Load the model and hand it in: "
        "SEPClassifier.from_pretrained(path, model=model, processor=processor)."
    ):
        load_base(str(files.folder), None, {})


# numbers that no file has


@torch.no_grad()
def test_logits_that_are_not_finite_are_no_prediction():
    model = make_model()
    tower = model.base_model.towers["vision"]
    classifier = SEPClassifier(model, CLASSES, TEMPLATES).eval()
    tower.sep_prompts["default"].fill_(float("nan"))
    with raises(
        "The logits are not finite. A weight of the model or its adapter is not, or one overflows in torch.float32; "
        "run the model in torch.float32 or load its files again.",
        FloatingPointError,
    ):
        predict_batch(tower, {"pixel_values": IMAGES}, [Task(None, classifier.encoder)] * len(IMAGES), None)


@pytest.mark.parametrize("weight", [1e308, 1001])
def test_a_weight_of_prototypes_that_overflows(weight):
    with raises(f"prototype_logit_weight must be at most 1000, but got {weight!r}."):
        TaskClasses(CLASSES, prototypes=torch.ones(4, 24), prototype_logit_weight=weight)
