"""A user's own dual encoder, described by a row in the configuration."""

from __future__ import annotations

import json
import re

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
