"""`SEPClassifier.save_pretrained` and `from_pretrained`, and what goes wrong with files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from bundled import ASSETS, IMAGE_FILES, NAMES
from peft import PeftModel, inject_adapter_in_model
from safetensors import safe_open
from small_classifier import (
    CLASSES,
    IMAGES,
    LABELS,
    OTHER_TEMPLATES,
    SMALL,
    TEMPLATES,
    contents,
    logits_of,
    make_classifier,
    make_model,
    raises,
    with_prototypes,
)
from small_clip import make_clip, make_texts
from transformers import CLIPModel

from sep_peft import SEPClassifier, SEPConfig, TaskClasses


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "sep_classes.json"]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    """Tests must not change it."""
    folder = tmp_path_factory.mktemp("saved")
    make_classifier().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    return shutil.copytree(saved_once, tmp_path / "saved")


def test_whoever_may_read_one_file_may_read_all(tmp_path):
    with_prototypes().save_pretrained(tmp_path / "saved")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert "sep_prototypes.safetensors" in modes and len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_saved(kind, adapter, tmp_path):
    """Only safetensors, JSON and the model card; of one adapter, without prototypes."""
    classifier = make_classifier(config={"adapter": adapter})
    classifier.model.add_adapter("unused", SEPConfig.published(**SMALL))
    classifier.save_pretrained(kind(tmp_path / "a" / "b"))
    assert sorted(contents(tmp_path / "a")) == ["b", *(f"b/{name}" for name in FILES)]
    with safe_open(tmp_path / "a/b/adapter_model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    expected = {
        f"{name.removeprefix('model.')}".replace(f".{adapter}", ""): tuple(p.shape)
        for name, p in classifier.named_parameters()
        if ".sep_" in name and f".{adapter}" in name
    }
    assert shapes == expected


@pytest.mark.parametrize(("adapter", "target"), [("default", "other"), ("mine", "default")])
@pytest.mark.parametrize("second", [False, True], ids=["fresh", "second"])
@pytest.mark.parametrize("config", [{}, {"batch_coupled": True}, {"fusion_rank": 2, "start_layer": 1}], ids=str)
def test_round_trip(config, second, target, adapter, tmp_path):
    """Bit for bit, into a fresh model, or as a second adapter into a model that has another one."""
    classifier = make_classifier(template_inputs=[TEMPLATES, OTHER_TEMPLATES], config={"adapter": adapter} | config)
    expected = logits_of(classifier)
    classifier.save_pretrained(tmp_path)
    model = make_model("first", seed=9, num_text_prompts=2) if second else make_clip()
    loaded = SEPClassifier.from_pretrained(tmp_path, model=model, adapter_name=target)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(IMAGES).logits, expected)
    assert torch.equal(logits_of(classifier), expected)
    assert loaded.model.active_adapter == target
    assert (loaded.model is model) == second
    assert loaded.class_names == classifier.class_names


def test_a_second_adapter_leaves_the_first_one_as_it_was(saved):
    model = make_model("first", seed=9)
    first = SEPClassifier(model, CLASSES, TEMPLATES)
    expected = logits_of(first)
    second = SEPClassifier.from_pretrained(saved, model=model, adapter_name="second")
    assert torch.equal(logits_of(second), logits_of(make_classifier()))
    model.set_adapter("first")
    assert torch.equal(logits_of(first), expected)


@pytest.mark.parametrize("second", [False, True], ids=["fresh", "second"])
def test_loaded_for_use_everything_is_frozen(second, saved):
    model = make_model("first", seed=9) if second else make_clip()
    loaded = SEPClassifier.from_pretrained(saved, model=model)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.prototypes is None


@pytest.mark.parametrize("second", [False, True], ids=["fresh", "second"])
def test_loaded_to_train_on(second, saved):
    model = make_model("first", seed=9) if second else make_clip()
    loaded = SEPClassifier.from_pretrained(saved, model=model, adapter_name="again", is_trainable=True)
    assert all(module.training for module in loaded.modules())
    loaded(IMAGES, LABELS).loss.backward()
    with_gradient = {name for name, p in loaded.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in loaded.named_parameters() if p.requires_grad}
    adapter = {name for name, _ in loaded.named_parameters() if ".sep_" in name and ".again" in name}
    assert with_gradient == adapter | {"prototypes"}


def test_options_reach_the_loaded_classifier(saved):
    options = {"text_weight": 1.0, "prototype_weight": 2.0, "chunk_size": 3}
    loaded = SEPClassifier.from_pretrained(saved, model=make_clip(), options=options)
    weights = {"classification_weight": 1.0, "text_weight": 1.0, "vision_weight": 0.0, "prototype_weight": 2.0}
    assert loaded.loss_weights == weights
    assert loaded.encoder.chunk_size == 3
    assert loaded.prototypes is not None


def test_load_from_a_subfolder(saved):
    loaded = SEPClassifier.from_pretrained(saved.parent, model=make_clip(), subfolder=saved.name)
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))


def test_names_and_templates_survive(imaged, processor, tmp_path):
    """What is loaded predicts and swaps classes as what was saved."""
    names = ["café", *NAMES[1:]]
    imaged.set_classes(names, template=["a {}.", "the {}."]).save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(ASSETS / "clip-small")
    loaded = SEPClassifier.from_pretrained(tmp_path, model=model, processor=processor)
    assert loaded.class_names == names
    assert loaded.predict(IMAGE_FILES) == imaged.predict(IMAGE_FILES)
    assert loaded.set_classes(["cup"]).classes.templates == ("a {}.", "the {}.")


def test_saving_again_replaces_the_files(saved):
    other = make_classifier(make_texts([4, 3]), None, config={"seed": 6, "num_text_prompts": 1})
    other.save_pretrained(saved)
    assert sorted(contents(saved)) == FILES
    loaded = SEPClassifier.from_pretrained(saved, model=make_clip())
    assert torch.equal(logits_of(loaded), logits_of(other))


def test_saving_again_keeps_what_the_user_wrote_into_the_model_card(saved):
    """As PEFT's own `save_pretrained` does; other files in the folder are nobody's business."""
    card = (saved / "README.md").read_text()
    (saved / "README.md").write_text(card + "\nTrained on my own images.\n")
    (saved / "notes.txt").write_text("mine")
    make_classifier().save_pretrained(saved)
    assert "Trained on my own images." in (saved / "README.md").read_text()
    assert (saved / "notes.txt").read_text() == "mine"


class DiskFull(OSError):
    """What the broken functions below raise."""


def break_write_json(monkeypatch, folder: Path) -> None:
    def dump(*args, **kwargs):
        raise DiskFull

    monkeypatch.setattr("sep_peft.classifier.files.write_json", dump)


def break_peft(monkeypatch, folder: Path) -> None:
    def save_pretrained(self, path, **kwargs):
        (Path(path) / "adapter_model.safetensors").write_bytes(b"half of")
        raise DiskFull

    monkeypatch.setattr(PeftModel, "save_pretrained", save_pretrained)


def break_replace(name: str):
    """Fail once, when the file of this name is to take its place."""

    def breaks(monkeypatch, folder: Path) -> None:
        replace, failed = os.replace, []

        def broken(source, target, **kwargs):
            if Path(target) == folder / name and not failed:
                failed.append(name)
                raise DiskFull
            return replace(source, target, **kwargs)

        monkeypatch.setattr(os, "replace", broken)

    breaks.__name__ = f"replace {name}"
    return breaks


BREAKS = [break_write_json, break_peft, *map(break_replace, FILES)]


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda item: item.__name__)
@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_failure_while_saving_leaves_what_was_there(adapter, breaks, saved, monkeypatch):
    before = contents(saved)
    other = make_classifier(make_texts([4, 3]), None, config={"adapter": adapter, "seed": 6, "num_text_prompts": 1})
    with monkeypatch.context() as patch:
        breaks(patch, saved)
        with pytest.raises(DiskFull):
            other.save_pretrained(saved)
    assert contents(saved) == before  # and no temporary folder
    loaded = SEPClassifier.from_pretrained(saved, model=make_clip())
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))
    other.save_pretrained(saved)
    assert torch.equal(logits_of(SEPClassifier.from_pretrained(saved, model=make_clip())), logits_of(other))


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda item: item.__name__)
def test_a_failure_while_saving_for_the_first_time_leaves_nothing(breaks, tmp_path, monkeypatch):
    breaks(monkeypatch, tmp_path)
    with pytest.raises(DiskFull):
        make_classifier().save_pretrained(tmp_path)
    assert contents(tmp_path) == {}


def test_saving_into_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with raises(f"{path} is a file; a folder is needed to save into.", NotADirectoryError):
        make_classifier().save_pretrained(path)
    assert path.read_text() == "mine"


def test_saving_needs_a_peft_model(tmp_path):
    model = inject_adapter_in_model(SEPConfig.published(**SMALL), make_clip())
    classifier = SEPClassifier(model, CLASSES, TEMPLATES)
    assert classifier(IMAGES, LABELS).loss.isfinite()
    message = (
        "Saving needs a PeftModel, but the model is a CLIPModel. Wrap it with peft.get_peft_model, or save its adapter "
        "with its own save_pretrained."
    )
    with raises(message, TypeError):
        classifier.save_pretrained(tmp_path / "folder")
    assert contents(tmp_path) == {}


VERSION = "{{file}} has format version {}, but this version of sep_peft reads 1 to 4. Upgrade sep_peft."
NO_JSON = "{file} is no valid JSON ("


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{file} does not exist, so there are no classes to load. Save with SEPClassifier.save_pretrained, or "),
        (b"", NO_JSON),
        (b'{"format_version": 1, "names": ["a", ', NO_JSON),
        (b"\xff\xfe\x00", NO_JSON),
        (b'{"format_version": 5}', VERSION.format(5)),
        (b'{"names": ["a"]}', VERSION.format(None)),
        (b"[]", "{file} must hold a JSON object, but holds []."),
        (
            b'{"format_version": 1, "sep_save_id": "ID", "names": ["a"], "templates": []}',
            "{file}: The class list lacks class_inputs, template_inputs.",
        ),
    ],
    ids=["missing", "empty", "cut short", "binary", "newer", "no version", "a list", "entries missing"],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_broken_class_file(adapted, content, message, saved):
    """Found out before the model is touched."""
    file = saved / "sep_classes.json"
    save_id = json.loads(file.read_text())["sep_save_id"]
    file.unlink()
    if content is not None:
        file.write_bytes(content.replace(b"ID", save_id.encode()))
    model = make_model("first") if adapted else make_clip()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(file=file))}"):
        SEPClassifier.from_pretrained(saved, model=model, adapter_name="other")
    assert [(name, type(module)) for name, module in model.named_modules()] == before


VOCABULARY = (
    "Token id 63 is outside of the text tower's vocabulary of 63 ids. Tokenize with the processor of this base model."
)


@pytest.mark.parametrize("inputs", ["class_inputs", "template_inputs"])
def test_ids_outside_of_the_vocabulary_are_refused_by_whatever_reads_them(inputs, saved):
    file = saved / "sep_classes.json"
    data = json.loads(file.read_text())
    (data[inputs] if inputs == "class_inputs" else data[inputs][0])["input_ids"][2][1] = 63
    file.write_text(json.dumps(data))
    with raises(VOCABULARY):
        SEPClassifier.from_pretrained(saved, model=make_clip())
    classifier, classes = make_classifier(), TaskClasses.from_json(data)
    with raises(VOCABULARY):
        classifier.load_task(saved, "new")
    with raises(VOCABULARY):
        classifier.set_classes(classes)
    with raises(VOCABULARY):
        classifier.add_task("new", classes, adapter="default")
    assert logits_of(classifier).isfinite().all()


# the order of arguments


OLD_ORDER = (
    "SEPClassifier.from_pretrained(model, path) is deprecated. Call SEPClassifier.from_pretrained(path, model=model)."
)
NO_PATH = (
    "SEPClassifier.from_pretrained needs the folder or repository of an adapter, a str or a path, but got {}. Call "
    "SEPClassifier.from_pretrained(path), or SEPClassifier.from_pretrained(path, model=model) where the base model is "
    "loaded."
)
TWICE = (
    "SEPClassifier.from_pretrained got a model or a path twice. Call SEPClassifier.from_pretrained(path, model=model)."
)


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: SEPClassifier.from_pretrained(model, path, adapter_name="mine"),
        lambda model, path: SEPClassifier.from_pretrained(model, path=path, adapter_name="mine"),
    ],
    ids=["by position", "path by name"],
)
def test_the_older_order_of_arguments(load, saved):
    with pytest.warns(DeprecationWarning, match=f"^{re.escape(OLD_ORDER)}$") as caught:
        loaded = load(make_clip(), saved)
    assert [warning.filename for warning in caught if warning.category is DeprecationWarning] == [__file__]
    assert loaded.model.active_adapter == "mine"
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_all_by_name(saved):
    loaded = SEPClassifier.from_pretrained(model=make_clip(), path=saved)
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, path: SEPClassifier.from_pretrained(), NO_PATH.format("NoneType")),
        (lambda model, path: SEPClassifier.from_pretrained(model=model), NO_PATH.format("NoneType")),
        (lambda model, path: SEPClassifier.from_pretrained(model), NO_PATH.format("CLIPModel")),
        (lambda model, path: SEPClassifier.from_pretrained(path, model), NO_PATH.format("CLIPModel")),
        (lambda model, path: SEPClassifier.from_pretrained(model, path, model=model), TWICE),
        (lambda model, path: SEPClassifier.from_pretrained(model, path, path=path), TWICE),
        (
            lambda model, path: SEPClassifier.from_pretrained(model, path, None),
            "SEPClassifier.from_pretrained takes one argument by position, the path, but got 3.",
        ),
    ],
    ids=["nothing", "no path", "model alone", "wrong way round", "two models", "two paths", "three"],
)
@pytest.mark.filterwarnings("ignore:SEPClassifier.from_pretrained:DeprecationWarning")
def test_arguments_that_are_missing_or_too_many(call, message, saved):
    with raises(message, TypeError):
        call(make_clip(), saved)
