"""`SEPConfig`: every option's check, storing, and what is found out about a model before it is changed."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from small_clip import make_clip, make_images, make_texts
from transformers import BertConfig, BertModel

from sep_peft import SEPConfig


AT_LEAST_0 = "an integer of at least 0"
AT_LEAST_1 = "an integer of at least 1"
RANK = "None or an integer of at least 1"
SOURCES = '"selected", "random", "mean" or "noise"'
START = 'an integer of at least 0, or one for each tower as in {"text": 9, "vision": 18}'
SHARE = "a number of at least 0 and below 1"
LAYERS = "None or a list of layer indices of at least 0"
NAMES = "None or a list of module names"
SMALL = {"num_text_prompts": 2, "num_vision_prompts": 2}

#: option, value, what it must be
BAD_VALUES = [
    *(
        (name, value, AT_LEAST_0)
        for name in ("num_text_prompts", "num_vision_prompts")
        for value in (-1, True, False, 2.0, math.nan, "2", None, [2])
    ),
    *(("start_layer", value, START) for value in (-1, True, 2.0, math.nan, "2", None, [2])),
    *(
        ("fusion", value, '"attention", "independent" or "none"')
        for value in ("Attention", "", None, True, 0, ["attention"])
    ),
    *(("fusion_tokens", value, SOURCES) for value in ("Mean", "", None, True, 0, ["mean"])),
    *(("fusion_rank", value, RANK) for value in (0, -1, True, 4.0, "4")),
    *(("fusion_hidden_size", value, AT_LEAST_1) for value in (0, -1, True, 64.0, "64", None)),
    *(
        (name, value, "True or False")
        for name in ("share_fusion", "batch_coupled", "inference_mode")
        for value in (1, 0, None, "True")
    ),
    *(("frozen_weight", value, SHARE) for value in (-0.1, 1, 1.0, math.nan, math.inf, "0.5", None, True)),
    *(
        (name, value, LAYERS)
        for name in ("text_layers", "vision_layers")
        for value in ([1, -1], [1, True], [1.0], ["1"], [None], [[1]], "12", 3, {1, 2}, {1: 2})
    ),
    *(
        (name, value, NAMES)
        for name in ("target_modules", "modules_to_save")
        for value in ("text_model", ["text_model", 3], [None], 3, True)
    ),
]


@pytest.mark.parametrize(("name", "value", "needed"), BAD_VALUES, ids=lambda item: repr(item)[:30])
def test_bad_value(name, value, needed):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} must be {needed}, but got {value!r}.')}$"):
        SEPConfig(**{name: value})


#: options, the whole message
BAD_COMBINATIONS = [
    (
        {"num_text_prompts": 0, "num_vision_prompts": 0},
        "num_text_prompts and num_vision_prompts must not both be 0: nothing would be adapted.",
    ),
    ({"text_layers": [2, 1, 2]}, "text_layers must name each layer once, but got [2, 1, 2]."),
    ({"vision_layers": (3, 3)}, "vision_layers must name each layer once, but got [3, 3]."),
    (
        {"text_layers": [1, 0]},
        "text_layers must be indices above start_layer=0, where the prompts enter, but got [1, 0].",
    ),
    (
        {"vision_layers": [4, 2], "start_layer": 2},
        "vision_layers must be indices above start_layer=2, where the prompts enter, but got [4, 2].",
    ),
    (
        {"vision_layers": [3, 1], "text_layers": [3, 1], "start_layer": {"vision": 1}},
        "vision_layers must be indices above start_layer=1, where the prompts enter, but got [3, 1].",
    ),
    *(
        ({"start_layer": value}, f'start_layer must name the towers "text" and "vision", but got {value!r}.')
        for value in ({}, {"image": 2}, {"text": 1, 2: 3}, {None: 1})
    ),
    *(
        (
            {"start_layer": {"text": 1, "vision": value}},
            f"start_layer must be an integer of at least 0 for the vision tower, but got {value!r}.",
        )
        for value in (-1, True, 2.0, "2", None, [2], {})
    ),
    *(
        (
            {"task_type": value},
            f"task_type must be None, but got {value!r}: SEP adapts both towers of a dual encoder, while PEFT's task "
            "types wrap models of another call signature. Leave task_type out.",
        )
        for value in ("FEATURE_EXTRACTION", "CAUSAL_LM")
    ),
    *(
        (
            {"fusion": "none", name: value},
            f'{name} must be left at {unset!r} with fusion="none", but got {value!r}.',
        )
        for name, value, unset in (
            ("text_layers", [1], None),
            ("text_layers", [], None),
            ("vision_layers", [2, 3], None),
            ("fusion_rank", None, 4),
            ("fusion_hidden_size", 256, 32),
            ("share_fusion", True, False),
            ("batch_coupled", True, False),
            ("fusion_tokens", "mean", "selected"),
        )
    ),
    *(
        (
            {"fusion": "independent", name: value},
            f'{name} must be left at {unset!r} with fusion="independent", but got {value!r}.',
        )
        for name, value, unset in (
            ("fusion_tokens", "noise", "selected"),
            ("fusion_rank", None, 4),
            ("fusion_hidden_size", 256, 32),
            ("share_fusion", True, False),
            ("batch_coupled", True, False),
        )
    ),
    (
        {"batch_coupled": True, "fusion_tokens": "random"},
        "fusion_tokens must be \"selected\" with batch_coupled=True, as the released code has it, but got 'random'.",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_COMBINATIONS, ids=lambda item: str(item)[:40])
def test_bad_combination(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SEPConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_text_prompts": 0},
        {"num_vision_prompts": 0},
        {"frozen_weight": 0},
        {"frozen_weight": 0.999},
        {"fusion_rank": 1, "fusion_hidden_size": 1},
        {"text_layers": [], "vision_layers": []},
        {"fusion": "none", "fusion_hidden_size": 32, "start_layer": 3},
        {"start_layer": {"text": 0, "vision": 3}},
        {"fusion": "independent", "text_layers": [2], "vision_layers": []},
    ],
    ids=str,
)
def test_values_at_the_edge_are_allowed(options):
    config = SEPConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_layers_and_names_become_sorted_lists_that_json_knows():
    config = SEPConfig(text_layers=range(3, 0, -1), vision_layers=(5, 2), target_modules={"b", "a"})
    assert (config.text_layers, config.vision_layers, config.target_modules) == ([1, 2, 3], [2, 5], ["a", "b"])
    assert SEPConfig(modules_to_save=("b", "a")).modules_to_save == ["b", "a"]


def test_accessors_of_a_tower():
    config = SEPConfig(num_text_prompts=3, num_vision_prompts=5, text_layers=[1], vision_layers=None)
    assert [config.prompts_of(tower) for tower in ("text", "vision")] == [3, 5]
    assert [config.layers_of(tower) for tower in ("text", "vision")] == [[1], None]


@pytest.mark.parametrize(
    ("value", "kept", "text", "vision"),
    [
        (9, 9, 9, 9),
        ({"text": 9, "vision": 9}, 9, 9, 9),
        ({"vision": 18, "text": 9}, {"text": 9, "vision": 18}, 9, 18),
        ({"vision": 18}, {"text": 0, "vision": 18}, 0, 18),
        ({"text": 0}, 0, 0, 0),
    ],
)
def test_start_layers_of_the_towers(value, kept, text, vision):
    config = SEPConfig(start_layer=value)
    assert config.start_layer == kept
    assert (config.start_layer_of("text"), config.start_layer_of("vision")) == (text, vision)


# storing

STORED = [
    {},
    {"text_layers": (2, 1), "vision_layers": [3], "fusion_rank": 4, "fusion_hidden_size": 32, "share_fusion": True},
    {"start_layer": {"vision": 1}},
    {"num_text_prompts": 0, "start_layer": 2, "fusion": "none", "frozen_weight": 0.0, "modules_to_save": ["x"]},
    {"batch_coupled": True, "target_modules": ["vision_model"], "base_architecture": {"text": {"num_layers": 3}}},
]


@pytest.mark.parametrize("options", STORED, ids=str)
def test_json_round_trip(options, tmp_path):
    config = SEPConfig(base_model_name_or_path="somewhere", **options)
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SEP"
    for loader in (SEPConfig, PeftConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is SEPConfig
        assert loaded == config
        assert loaded.peft_type is PeftType.SEP


def test_json_round_trip_in_a_subfolder(tmp_path):
    config = SEPConfig(**SMALL)
    config.save_pretrained(tmp_path / "below")
    assert SEPConfig.from_pretrained(str(tmp_path), subfolder="below") == config


@pytest.mark.parametrize("options", STORED, ids=str)
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal(options, clone):
    config = SEPConfig(**options)
    cloned = clone(config)
    assert type(cloned) is SEPConfig
    assert cloned == config
    assert cloned.peft_type is config.peft_type


# against a model

#: options, what is wrong with them for the tiny CLIP of 3 text and 4 vision layers, 20 positions and 9 patches
MISFITS = [
    ({"text_layers": [1, 3]}, "text_layers must be below 3, the number of layers of the text tower, but got 3."),
    ({"vision_layers": [4]}, "vision_layers must be below 4, the number of layers of the vision tower, but got 4."),
    ({"start_layer": 3}, "start_layer must be below 3, the number of layers of the text tower, but got 3."),
    (
        {"start_layer": 4, "num_text_prompts": 0},
        "start_layer must be below 4, the number of layers of the vision tower, but got 4.",
    ),
    (
        {"start_layer": {"text": 2, "vision": 4}},
        "start_layer must be below 4, the number of layers of the vision tower, but got 4.",
    ),
    (
        {"start_layer": {"text": 3, "vision": 3}},
        "start_layer must be below 3, the number of layers of the text tower, but got 3.",
    ),
    (
        {"num_text_prompts": 19},
        "num_text_prompts must be at most 18, because the text tower has 20 positions and needs two for BOS and EOS, "
        "but got 19.",
    ),
    (
        {"num_vision_prompts": 10},
        "num_vision_prompts must be at most 9, the number of tokens of an image to select from, but got 10.",
    ),
    (
        {"target_modules": ["text_model", "vision_model.encoder"]},
        "target_modules must be among ['text_model', 'vision_model'] for this model, but got 'vision_model.encoder'.",
    ),
    (
        {"target_modules": []},
        "No prompts are left for target_modules=[]: num_text_prompts=2, num_vision_prompts=2.",
    ),
    (
        {"target_modules": ["vision_model"], "num_vision_prompts": 0},
        "No prompts are left for target_modules=['vision_model']: num_text_prompts=2, num_vision_prompts=0.",
    ),
    (
        {"base_architecture": {"model_type": "clip"}},
        "This adapter was made for another architecture: it needs {'model_type': 'clip'}, but the model has "
        "{'model_type': 'clip', 'text': {'hidden_size': 32, 'num_layers': 3}, 'vision': {'hidden_size': 48, "
        "'num_layers': 4}}.",
    ),
]

PREFIX_NAME = "The adapter name {!r} is a part of SEP's prefix 'sep_', so keys could not be told apart. Choose another "
MODULE_NAME = "The adapter name {!r} is also the name of a module inside the model, so keys could not be told apart. "
ATTRIBUTE_NAME = "The adapter name {!r} is also an attribute of the dictionary that holds adapters by name. Choose "
DOTTED_NAME = "An adapter name must not be empty nor contain a dot, but got {!r}."

#: name, the start of the message; the message goes on with "name." or ends
BAD_NAMES = [
    *((name, PREFIX_NAME.format(name) + "name.") for name in ("sep", "e", "sep_")),
    *((name, MODULE_NAME.format(name) + "Choose another name.") for name in ("text_model", "3", "attention", "shared")),
    *((name, ATTRIBUTE_NAME.format(name) + "another name.") for name in ("train", "float", "update", "keys", "copy")),
    *((name, DOTTED_NAME.format(name)) for name in ("a.b", "")),
]


class Untouched:
    """Context manager: the model must look the same after the block as before it."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def look(self) -> tuple:
        return (
            {key: (value.data_ptr(), value.shape) for key, value in self.model.state_dict().items()},
            [(name, type(module)) for name, module in self.model.named_modules()],
            {name: parameter.requires_grad for name, parameter in self.model.named_parameters()},
            {name for name in vars(self.model) if not name.startswith("_")},
            list(getattr(self.model, "peft_config", {})),
            self.model.training,
        )

    def __enter__(self) -> None:
        self.before = self.look()

    def __exit__(self, *exception) -> None:
        assert self.look() == self.before


@pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`:UserWarning")
@pytest.mark.parametrize(
    ("options", "name", "message"),
    [(SMALL | options, "default", message) for options, message in MISFITS]
    + [(SMALL, name, message) for name, message in BAD_NAMES],
    ids=lambda item: str(item)[:40],
)
@pytest.mark.parametrize("adapters", [0, 1], ids=["plain", "adapted"])
def test_misfits_leave_the_model_alone(options, name, message, adapters):
    """As the first adapter of a plain model, and as a further one of an adapted model."""
    model = make_clip()
    if adapters:
        model = get_peft_model(model, SEPConfig(**SMALL), "first")
        logits = model(pixel_values=make_images(1), **make_texts([4])).logits_per_image
    with Untouched(model), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        if adapters:
            model.add_adapter(name, SEPConfig(**options))
        else:
            get_peft_model(model, SEPConfig(**options), name)
    if adapters:
        assert list(model.base_model.peft_config) == ["first"]
        assert torch.equal(model(pixel_values=make_images(1), **make_texts([4])).logits_per_image, logits)
    else:
        assert not hasattr(model, "peft_config")
        get_peft_model(model, SEPConfig(**SMALL))  # a right configuration still goes in


def test_unknown_model_type_leaves_the_model_alone():
    model = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    )
    message = "SEP does not know the towers of BertModel (model type 'bert'); it knows "
    with Untouched(model), pytest.raises(ValueError, match=f"^{re.escape(message)}(.*, )?clip(,.*)?\\.$"):
        get_peft_model(model, SEPConfig())
    assert not hasattr(model, "peft_config")


def test_limits_of_the_model_are_allowed():
    config = SEPConfig(num_text_prompts=18, num_vision_prompts=9, start_layer=0, text_layers=[2], vision_layers=[1, 3])
    model = get_peft_model(make_clip(), config)
    logits = model(pixel_values=make_images(2), **make_texts([2])).logits_per_image
    assert logits.shape == (2, 1)
    assert logits.isfinite().all()


def test_one_configuration_serves_several_models():
    """Of other architectures too; each model keeps what was found out about itself."""
    config = SEPConfig(**SMALL)
    models = [
        get_peft_model(make_clip(), config),
        get_peft_model(make_clip(text_layers=2, vision_layers=2), config),
        get_peft_model(make_clip(), config),
    ]
    models[1].add_adapter("other", config)
    found = [entry.base_architecture for model in models for entry in model.peft_config.values()]
    assert [(entry["text"]["num_layers"], entry["vision"]["num_layers"]) for entry in found] == [
        (3, 4),
        (2, 2),
        (2, 2),
        (3, 4),
    ]
    for model in models:
        assert model(pixel_values=make_images(2), **make_texts([3, 4])).logits_per_image.isfinite().all()


def test_a_stored_configuration_fits_only_its_architecture(tmp_path):
    config = SEPConfig(**SMALL)
    get_peft_model(make_clip(), config)
    config.save_pretrained(tmp_path)
    loaded = SEPConfig.from_pretrained(tmp_path)
    get_peft_model(make_clip(), loaded)
    with pytest.raises(ValueError, match=r"^This adapter was made for another architecture: it needs "):
        get_peft_model(make_clip(vision_layers=2), loaded)


def test_a_further_adapter_must_be_of_the_same_name_only_once():
    model = get_peft_model(make_clip(), SEPConfig(**SMALL))
    with Untouched(model), pytest.raises(ValueError, match=r"^Adapter with name 'default' already exists\.$"):
        model.add_adapter("default", SEPConfig(**SMALL))


def test_loading_into_another_architecture_leaves_the_model_alone(tmp_path):
    get_peft_model(make_clip(), SEPConfig(**SMALL)).save_pretrained(tmp_path)
    model = make_clip(vision_layers=2)
    message = (
        "This adapter was made for another architecture: it needs {'model_type': 'clip', 'text': {'hidden_size': 32, "
        "'num_layers': 3}, 'vision': {'hidden_size': 48, 'num_layers': 4}}, but the model has {'model_type': 'clip', "
        "'text': {'hidden_size': 32, 'num_layers': 3}, 'vision': {'hidden_size': 48, 'num_layers': 2}}."
    )
    with Untouched(model), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not hasattr(model, "peft_config")


def test_published_options():
    config = SEPConfig.published()
    assert (config.fusion_rank, config.fusion_hidden_size, config.share_fusion) == (None, 256, False)
    assert (config.num_text_prompts, config.num_vision_prompts, config.frozen_weight) == (6, 4, 0.5)


def test_published_options_can_be_replaced():
    assert SEPConfig.published(fusion_rank=2).fusion_rank == 2
    assert SEPConfig.published(fusion="none") == SEPConfig(fusion="none", num_vision_prompts=4)
    with pytest.raises(ValueError, match=r"^share_fusion must be left at False"):
        SEPConfig.published(fusion="none", share_fusion=True)


def test_compact_options():
    config = SEPConfig.compact(start_layer=2)
    assert (config.fusion_rank, config.fusion_hidden_size, config.share_fusion) == (4, 16, True)
    assert (config.num_text_prompts, config.num_vision_prompts, config.start_layer) == (6, 4, 2)
    assert SEPConfig.compact(fusion_rank=2).fusion_rank == 2
    assert SEPConfig.compact(fusion="none") == SEPConfig(fusion="none", num_vision_prompts=4)


def test_a_file_without_fusions_may_come_from_other_defaults(tmp_path):
    get_peft_model(make_clip(), SEPConfig(fusion="none")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"share_fusion": True, "fusion_hidden_size": 16}))
    assert SEPConfig.from_pretrained(tmp_path).share_fusion is False
    loaded = PeftModel.from_pretrained(make_clip(), tmp_path).peft_config["default"]
    assert loaded.fusion_hidden_size == SEPConfig().fusion_hidden_size
