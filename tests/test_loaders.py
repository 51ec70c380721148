"""PEFT's and transformers' own loaders take an adapter whole or not at all, whatever they are given."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from families import CASES
from family_models import adapt_once
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from small_classifier import make_model, raises
from small_clip import make_clip
from small_sep import outputs, snapshot
from transformers import CLIPModel

from sep_peft import AdapterMismatchError, SEPConfig
from sep_peft.tuner.loading import wrap_loaders


PROMPTS = "base_model.model.text_model.sep_prompts"


@pytest.fixture
def saved(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["clip", "bert and vit"])
@torch.no_grad()
def test_transformers_loads_what_was_saved(name, tmp_path):
    """Also where its renamings of the base model's keys hit keys of SEP, as those of ViT hit `attention.query`."""
    case = CASES[name]
    model = adapt_once(case)
    model.save_pretrained(tmp_path)
    base = case.build()
    report = base.load_adapter(tmp_path)
    assert not report.missing_keys and not report.unexpected_keys
    found, expected = base.eval()(**case.inputs()), model(**case.inputs())
    assert torch.equal(found.logits_per_image, expected.logits_per_image)
    assert list(base.peft_config) == ["default"]


EMBEDDING = "base_model.model.text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize("asked", ["auto", True, False])
def test_embeddings_are_not_saved_with_an_adapter(asked, tmp_path):
    """PEFT would, where the vocabulary was resized or it is told to; what is saved is loaded again."""
    case = CASES["clip text with projection"]
    case.build().save_pretrained(tmp_path / "base")
    base = type(case.build()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
    model = get_peft_model(base, SEPConfig(num_vision_prompts=0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path, save_embedding_layers=asked)
    told = (
        f"The base model's token embeddings ({EMBEDDING}) are not saved with the adapter, because they would change "
        "the model for all its adapters. Save the base model with its own save_pretrained, and the adapter with "
        "save_embedding_layers=False."
    )
    assert [str(w.message) for w in found if "token embeddings" in str(w.message)] == [told] * (asked is not False)
    assert not [key for key in load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME) if "embedding" in key]
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_embeddings_beside_an_adapter_are_refused_with_what_to_do(tmp_path):
    """They would change the base model; other releases saved them where the vocabulary was resized."""
    case = CASES["clip text with projection"]
    adapt_once(case).save_pretrained(tmp_path)
    base = case.build()
    rewrite(tmp_path, lambda state: state | {EMBEDDING: base.get_input_embeddings().weight.detach()})
    before = snapshot(base)
    with raises(
        "the file of adapter 'default' holds weights of the base model, 1 in all, such as "
        "base_model.model.text_model.embeddings.token_embedding.weight. PEFT saves embeddings with an adapter where "
        "save_embedding_layers=True or the vocabulary was resized; loaded, they would change the model for all its "
        "adapters. Save the adapter again with save_embedding_layers=False; a base model that was changed is saved by "
        "itself, with its own save_pretrained."
    ):
        PeftModel.from_pretrained(base, tmp_path)
    assert snapshot(base) == before


def test_transformers_takes_weights_that_are_handed_in(saved):
    state = load_file(saved / SAFETENSORS_WEIGHTS_NAME)
    clip, config = make_clip(), PeftConfig.from_pretrained(saved)
    clip.load_adapter(None, "task", peft_config=config, adapter_state_dict=state)
    assert torch.equal(outputs(clip), outputs(make_model()))
    clip = make_clip()
    before = snapshot(clip), clip.training, sorted(vars(clip))
    del state[PROMPTS]
    with raises(
        f"the file of adapter 'task' does not fit this model and configuration; missing keys: {PROMPTS}",
        AdapterMismatchError,
    ):
        clip.load_adapter(None, "task", peft_config=PeftConfig.from_pretrained(saved), adapter_state_dict=state)
    assert (snapshot(clip), clip.training, sorted(vars(clip))) == before


def test_a_configuration_that_was_handed_in_loads(saved):
    config = SEPConfig.published(num_text_prompts=3, num_vision_prompts=2)
    model = PeftModel.from_pretrained(make_clip(), saved, config=config)
    assert torch.equal(outputs(model), outputs(make_model()))


@pytest.mark.parametrize("further", [False, True])
def test_what_fails_after_the_weights_were_checked_is_taken_back(saved, further, monkeypatch):
    model = make_model() if further else make_clip()
    before = snapshot(model)

    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", fail)
    with raises("no memory", MemoryError):
        model.load_adapter(saved, "new") if further else PeftModel.from_pretrained(model, saved)
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [None, SEPConfig(num_vision_prompts=2)])
def test_no_weights_to_train_on(saved, config):
    """Also where the file's adapter was not frozen, so that its configuration alone could stand for a new one."""
    (saved / SAFETENSORS_WEIGHTS_NAME).unlink()
    file = saved / CONFIG_NAME
    file.write_text(file.read_text().replace('"inference_mode": true', '"inference_mode": false'))
    clip = make_clip()
    before = snapshot(clip)
    with raises(
        f"{saved} holds the configuration of an adapter, but no weights. Copy or download it again; for a new adapter "
        "with these options, set inference_mode to false in it and use get_peft_model."
    ):
        PeftModel.from_pretrained(clip, saved, is_trainable=True, config=config)
    assert snapshot(clip) == before
    assert isinstance(get_peft_model(clip, SEPConfig.from_pretrained(saved)), PeftModel)


def test_older_names_of_keys_are_mapped_before_they_are_compared(saved):
    rewrite(saved, lambda state: {key.replace("text_model", "language"): value for key, value in state.items()})
    model = PeftModel.from_pretrained(make_clip(), saved, key_mapping={"^nothing": "", "^language": "text_model"})
    assert torch.equal(outputs(model), outputs(make_model()))
    model.load_adapter(saved, "second", key_mapping={"^language": "text_model"})
    clip = make_clip()
    before = snapshot(clip)
    with pytest.raises(AdapterMismatchError, match=r"unexpected keys: base_model\.model\.words\.sep_fusion"):
        PeftModel.from_pretrained(clip, saved, key_mapping={"^language": "words"})
    assert snapshot(clip) == before


def test_a_model_that_maps_older_names_itself(saved, monkeypatch):
    rewrite(saved, lambda state: {key.replace("text_model", "language"): value for key, value in state.items()})
    clip = make_clip()
    monkeypatch.setattr(clip, "_checkpoint_conversion_mapping", {"^language": "text_model"}, raising=False)
    assert torch.equal(outputs(PeftModel.from_pretrained(clip, saved)), outputs(make_model()))


@pytest.mark.filterwarnings("ignore:.*is a no-op")
def test_files_are_not_lost_on_meta(saved):
    config = make_clip().config
    with torch.device("meta"):
        clip = CLIPModel(config)
    before = snapshot(clip)
    for load in (lambda: PeftModel.from_pretrained(clip, saved), lambda: clip.load_adapter(saved)):
        with raises(
            "The base model lies on the meta device, where the weights of adapter 'default' would be lost. Load the "
            "base model's weights first, or pass low_cpu_mem_usage=True, which leaves those of the adapter on the CPU."
        ):
            load()
        assert snapshot(clip) == before
    model = PeftModel.from_pretrained(clip, saved, low_cpu_mem_usage=True)
    expected = make_model().state_dict()
    own = {key: value for key, value in model.state_dict().items() if ".sep_" in key}
    assert own and all(torch.equal(value, expected[key]) for key, value in own.items())


def test_other_methods_are_loaded_as_ever(tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(make_clip(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(make_clip(), tmp_path)), outputs(lora))
    clip = make_clip()
    clip.load_adapter(tmp_path)
    assert torch.equal(outputs(clip), outputs(lora))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model_id'"):
        PeftModel.from_pretrained(make_clip())


def test_loaders_are_wrapped_once():
    before = PeftModel.load_adapter, CLIPModel.load_adapter, PeftModel.from_pretrained.__func__
    wrap_loaders()
    assert (PeftModel.load_adapter, CLIPModel.load_adapter, PeftModel.from_pretrained.__func__) == before
