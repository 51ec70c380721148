"""A user's own dual encoder, described by a row in the configuration."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import images, text_size, vision_size, words
from peft import PeftModel, get_peft_model
from small_clip import perturb
from torch import nn

from sep_peft import Architecture, SEPClassifier, SEPConfig, TowerSpec
from sep_peft.method.mix import mix_embeddings


class Duo(nn.Module):
    """BERT and ViT of transformers under names of one's own, with biased heads and a fixed temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.reader = hf.BertModel(hf.BertConfig(**text_size()))
        self.eye = hf.ViTModel(hf.ViTConfig(**vision_size()))
        self.heads = nn.ModuleDict({"text": nn.Linear(32, 20), "image": nn.Linear(32, 20)})
        self.temperature = nn.Parameter(torch.tensor(0.1))

    def forward(self, input_ids, pixel_values, attention_mask=None):
        text = F.normalize(self.heads["text"](self.reader(input_ids, attention_mask).pooler_output), dim=-1)
        image = F.normalize(self.heads["image"](self.eye(pixel_values).pooler_output), dim=-1)
        return image @ text.T / self.temperature


ROW = Architecture(
    text=TowerSpec(
        path="reader",
        layers="encoder.layer",
        inputs="input_ids",
        projection="heads.text",
        insert_at=1,
        positions="embeddings.position_embeddings",
        entry_embedding="embeddings.token_type_embeddings",
        entry_norm="embeddings.LayerNorm",
    ),
    vision=TowerSpec(path="eye", layers="layers", inputs="pixel_values", projection="heads.image", leading_tokens=1),
    logit_scale="temperature",
    scale="divide",
)
TEXTS, IMAGES = words(bos=2, eos=3, pad=0)([5, 4, 7]), images()(2)


def make(row=ROW) -> PeftModel:
    model = get_peft_model(
        Duo().eval(), SEPConfig.published(architecture=row, num_text_prompts=3, num_vision_prompts=2)
    )
    perturb(model)
    return model.eval()


@torch.no_grad()
def test_it_is_adapted_mixed_saved_and_loaded(tmp_path):
    model = make()
    towers = model.base_model.towers
    text = mix_embeddings(*towers["text"].embed(**TEXTS), 0.5)
    image = mix_embeddings(*towers["vision"].embed(**IMAGES), 0.5)
    logits = model(**TEXTS, **IMAGES)
    torch.testing.assert_close(logits, image @ text.T / 0.1, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["architecture"]["text"]["path"] == "reader"
    fresh = PeftModel.from_pretrained(Duo().eval(), tmp_path)  # the row travels with the adapter
    assert torch.equal(fresh(**TEXTS, **IMAGES), logits)
    with model.disable_adapter():
        assert torch.equal(model(**TEXTS, **IMAGES), Duo().eval()(**TEXTS, **IMAGES))


def test_classifier_scales_its_logits_as_the_row_says():
    model = make(ROW.to_dict())
    classifier = SEPClassifier(model, TEXTS).eval()
    with torch.no_grad():
        torch.testing.assert_close(classifier(**IMAGES).logits, model(**TEXTS, **IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["text"].update(layer="x"), "text has no field layer; it knows path, layers, inputs, "),
        (lambda row: row["vision"].pop("layers"), "vision lacks a field: "),
        (lambda row: row.update(tower=1), "architecture has no field tower; it knows text, vision, logit_scale, "),
    ],
)
def test_mistakes_in_a_row_are_named(change, message):
    row = ROW.to_dict()
    change(row)
    with pytest.raises(ValueError, match=re.escape(message)):
        SEPConfig.published(architecture=row)


def test_paths_that_do_not_exist_are_named_before_the_model_changes():
    row = ROW.to_dict()
    row["text"]["layers"] = "encoder.blocks"
    duo = Duo()
    keys = list(duo.state_dict())
    message = "The spec of the text tower names encoder.blocks as layers, but BertModel has no such module."
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(duo, SEPConfig.published(architecture=row))
    assert list(duo.state_dict()) == keys


def test_a_model_without_a_row_says_how_to_describe_it():
    message = "Describe your own with SEPConfig(architecture=sep_peft.Architecture(...))."
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(Duo(), SEPConfig.published())


ALLOWED_PATH = "a dotted path of module names without leading underscores"
#: Field of a tower's spec, a value that is refused, and what the message says is allowed.
WRONG_FIELDS = [
    ("path", "__class__", f"'' or {ALLOWED_PATH}"),
    ("path", None, f"'' or {ALLOWED_PATH}"),
    ("layers", "encoder..layer", f'{ALLOWED_PATH}, "*" for stages'),
    ("layers", "*.layers", f'{ALLOWED_PATH}, "*" for stages'),
    ("inputs", "audio", "one of 'input_ids', 'pixel_values'"),
    ("projection", "heads.__dict__", f"None or {ALLOWED_PATH}"),
    ("projection", "heads.text()", f"None or {ALLOWED_PATH}"),
    ("pooling", "nope", "one of 'pooler_output', 'first_token', 'mean_tokens'"),
    ("pooling", ["first_token"], "one of 'pooler_output', 'first_token', 'mean_tokens'"),
    ("insert_at", -1, "None or an integer of at least 0"),
    ("insert_at", True, "None or an integer of at least 0"),
    ("insert_at", 1.0, "None or an integer of at least 0"),
    ("causal", "yes", "True or False"),
    ("positions", "_modules.x", f"None or {ALLOWED_PATH}"),
    ("entry_embedding", 3, f"None or {ALLOWED_PATH}"),
    ("entry_norm", "", f"None or {ALLOWED_PATH}"),
    ("leading_tokens", None, "an integer of at least 0"),
    ("layer_tokens", -2, "an integer of at least 0"),
    ("text_end", "last", "None or one of 'eos', 'first_eos', 'highest'"),
    ("max_length_padding", 1, "True or False"),
    ("renamed_inputs", ["a"], "a dict of names of inputs"),
    ("renamed_inputs", {"a": 1}, "a dict of names of inputs"),
    ("hidden_size", "__init__", "a name without leading underscore"),
    ("refused", "", "None or a reason"),
    ("refused_options", {"__a": "b"}, "a dict of option names and reasons"),
    ("needed_options", {"a": None}, "a dict of option names and reasons"),
    ("mixes_after_projection", None, "True or False"),
    ("pooler_repeats", 0, "True or False"),
    ("videos", "yes", "True or False"),
    ("mask_input", "", "a name without leading underscore"),
    ("rotary", "a b", f"None or {ALLOWED_PATH}"),
    ("projected", "__dict__", "None or a name without leading underscore"),
    ("unit_option", 1, "None or a name without leading underscore"),
    ("mlp_norm", "n\n", f"None or {ALLOWED_PATH}"),
    ("reader", ".", f"None or {ALLOWED_PATH}"),
    ("queries", "q._grad", f"None or {ALLOWED_PATH}"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG_FIELDS)
def test_every_field_of_a_tower_is_checked_when_the_spec_is_made(field, value, allowed):
    message = f"TowerSpec.{field} must be {allowed}, but got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(ROW.text, **{field: value})
    row = ROW.to_dict()
    row["text"][field] = value
    with pytest.raises(ValueError, match=f"^{re.escape('text: ' + message)}$"):
        SEPConfig(architecture=row)


def test_no_field_of_a_tower_is_left_unchecked():
    assert {field for field, *_ in WRONG_FIELDS} == {field.name for field in fields(TowerSpec)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "log"}, "Architecture.scale must be one of 'exp', 'divide', 'multiply', but got 'log'."),
        ({"logit_scale": 1}, f"Architecture.logit_scale must be None or {ALLOWED_PATH}, but got 1."),
        ({"logit_bias": "a.__b__"}, f"Architecture.logit_bias must be None or {ALLOWED_PATH}, but got 'a.__b__'."),
        (
            {"max_scale": "a.b"},
            "Architecture.max_scale must be None or a name without leading underscore, but got 'a.b'.",
        ),
        ({"text": "clip"}, "Architecture.text must be None or a TowerSpec, but got 'clip'."),
        (
            {"variants": {"A": 1}},
            "Architecture.variants must be a dict of class names and Architectures, but got {'A': 1}.",
        ),
        ({"text": None, "vision": None}, "Architecture needs a tower: text and vision must not both be None."),
    ],
)
def test_every_field_of_an_architecture_is_checked(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(ROW, **change)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("clip", "architecture must be an Architecture or a dict, but got 'clip'."),
        ({"text": "clip"}, "text must be a TowerSpec or a dict, but got 'clip'."),
        ({}, "architecture: Architecture needs a tower: text and vision must not both be None."),
    ],
)
def test_what_is_no_row_is_refused(row, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SEPConfig(architecture=row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ""}, "TowerSpec.layers must be the path of the encoder layers, but got ''."),
        ({"reader": "a"}, "TowerSpec.reader and TowerSpec.queries must be set together, but got 'a' and None."),
        (
            {"mixes_after_projection": True, "projection": None},
            "TowerSpec.projection must be a path where mixes_after_projection is set, but got None.",
        ),
    ],
)
def test_fields_that_need_each_other(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(ROW.text, **change)


@pytest.mark.parametrize(
    ("tower", "change", "message"),
    [
        # properties and methods that every model of transformers has
        ("text", {"path": "reader.base_model"}, "names reader.base_model as path, but Duo has no such module."),
        ("text", {"projection": "forward"}, "names forward as projection, but Duo has no such module."),
        ("text", {"entry_norm": "config"}, "names config as entry_norm, but BertModel has no such module."),
        ("text", {"rotary": "base_model"}, "names base_model as rotary, but BertModel has no such module."),
        ("text", {"mlp_norm": "norm9"}, "names norm9 as mlp_norm, but BertLayer has no such module."),
        ("text", {"positions": "pooler"}, "names pooler as positions, but BertPooler is no embedding."),
        ("text", {"entry_embedding": "pooler"}, "names pooler as entry_embedding, but BertPooler is no embedding."),
        (
            "text",
            {"layers": "encoder"},
            "names encoder as layers, but there is BertEncoder in the place of a list of layers.",
        ),
        ("text", {"insert_at": 24}, "has insert_at=24, but the tower has at most 24 tokens."),
        ("text", {"layer_tokens": 24}, "has layer_tokens=24, but the tower has at most 24 tokens."),
        (
            "text",
            {"positions": None, "leading_tokens": 24},
            "has leading_tokens=24, but the tower has at most 24 tokens.",
        ),
        ("vision", {"insert_at": 99}, "has insert_at=99, but the tower has at most 11 tokens."),
        ("vision", {"leading_tokens": 11}, "has leading_tokens=11, but the tower has at most 11 tokens."),
        ("vision", {"layer_tokens": 10**9}, "has layer_tokens=1000000000, but the tower has at most 11 tokens."),
        (
            "text",
            {"reader": "eye", "queries": "temperature"},
            "names temperature as queries, but its shape is (), not (1, Q, D).",
        ),
        (
            "text",
            {"reader": "eye", "queries": "reader.device"},
            "names reader.device as queries, but Duo has no such parameter.",
        ),
        (
            "text",
            {"hidden_size": "hidden_act"},
            "names hidden_act as hidden_size, but the configuration of BertModel has 'gelu' there, not a width.",
        ),
        (
            "text",
            {"unit_option": "to_dict"},
            "names to_dict as unit_option, but the configuration of BertModel has no such option that is True or "
            "False.",
        ),
        (None, {"logit_scale": "training"}, "names training as logit_scale, but Duo has no such parameter."),
        (
            None,
            {"logit_bias": "heads.text.bias"},
            "names heads.text.bias as logit_bias, but it holds 20 numbers, not 1.",
        ),
        (
            None,
            {"max_scale": "forward"},
            "names forward as max_scale, but Duo has no such attribute that is a number.",
        ),
    ],
)
def test_a_path_leads_to_modules_and_parameters_alone(tower, change, message):
    row = replace(ROW, **change) if tower is None else replace(ROW, **{tower: replace(getattr(ROW, tower), **change)})
    duo = Duo()
    before = dict(duo.named_modules()), list(duo.state_dict())
    who = "The architecture" if tower is None else f"The spec of the {tower} tower"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{who} {message}')}$"):
        get_peft_model(duo, SEPConfig(architecture=row))
    assert (dict(duo.named_modules()), list(duo.state_dict())) == before


def test_leading_tokens_where_images_may_have_any_size():
    """A number that no tower has is refused beforehand, any other where an image has too few tokens."""

    def adapted(leading_tokens: int) -> PeftModel:
        duo = Duo().eval()
        duo.eye.config.image_size = [24, 24]  # one number would be the size of all images
        vision = replace(ROW.vision, pooling="mean_tokens", leading_tokens=leading_tokens)
        return get_peft_model(duo, SEPConfig(architecture=replace(ROW, vision=vision), num_vision_prompts=2))

    message = "The spec of the vision tower has leading_tokens=1000000, but no tower has 1000000 tokens."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapted(10**6)
    message = (
        "The tower has 10 tokens for this input, of which leading_tokens=10 in its spec leave none to take the mean "
        "of. Correct the spec."
    )
    tower = adapted(10).base_model.towers["vision"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tower.embed(**IMAGES)


def test_looking_a_path_up_runs_nothing():
    class Trap(Duo):
        @property
        def trap(self):
            raise AssertionError("a path has run a property")

    message = "The spec of the text tower names trap.text as projection, but Trap has no such module."
    row = replace(ROW, text=replace(ROW.text, projection="trap.text"))
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(Trap(), SEPConfig(architecture=row))
