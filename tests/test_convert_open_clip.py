"""`examples/convert_open_clip.py`: open_clip's own outputs from a CLIPModel, and models that are refused."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from open_clip_reference import DATA, MODELS
from safetensors.torch import load_file, save_file
from small_classifier import raises
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoProcessor, CLIPModel, PreTrainedTokenizerFast

from sep_peft.tuner.files import load_pickled


SCRIPT = Path(__file__).parents[1] / "examples" / "convert_open_clip.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Of 63 tokens, of which the last one ends texts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{index}": index for index in range(63)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w62", bos_token="w61", pad_token="w62"
    ).save_pretrained(folder)
    return folder


def convert(monkeypatch, *arguments) -> object:
    """Runs the script; what it exits with."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as error:
        return error.code
    return None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trained", [False, True], ids=["weights", "of a training"])
def test_it_answers_as_open_clip_does(name, trained, tokenizer, tmp_path, monkeypatch, capsys):
    checkpoint, out = DATA / f"{name}.safetensors", tmp_path / "converted"
    if trained:
        state = {f"module.{key}": value for key, value in load_file(checkpoint).items()}
        checkpoint = tmp_path / "epoch_1.pt"
        torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, checkpoint)
    arguments = [checkpoint, "--config", DATA / f"{name}.json", "--output", out, "--tokenizer", tokenizer]
    assert convert(monkeypatch, *arguments) is None
    assert capsys.readouterr().out.startswith(f"wrote {out}: ")
    model, processor = CLIPModel.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    expected = load_file(DATA / f"{name}.expected.safetensors")
    pixels = processor(images=expected["image"].permute(2, 0, 1), return_tensors="pt")["pixel_values"]
    # a level of 255, divided by std; resizing rounds to levels in one of them
    torch.testing.assert_close(pixels, expected["pixels"], atol=2 / 255 / 0.2, rtol=0)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=expected["pixels"]).pooler_output
        texts = model.get_text_features(input_ids=expected["texts"]).pooler_output
    torch.testing.assert_close(images, expected["image_embeds"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(texts, expected["text_embeds"], atol=2e-6, rtol=1e-5)
    scale = load_file(DATA / f"{name}.safetensors")["logit_scale"]
    assert torch.equal(model.logit_scale, scale)
    assert convert(monkeypatch, *arguments) == 2  # nothing is written over it
    assert f"{out} is there already" in capsys.readouterr().err


CONFIG = MODELS["gelu"]
HUB = "Look for this model in transformers' format on the Hub; SigLIP, for one, is there as SiglipModel."


def changed(**options) -> dict:
    """The configuration with other options; `vision__key` is one of vision_cfg."""
    made = {**CONFIG, "vision_cfg": dict(CONFIG["vision_cfg"]), "text_cfg": dict(CONFIG["text_cfg"])}
    for key, value in options.items():
        place, _, inner = key.partition("__")
        (made[f"{place}_cfg"] if inner else made)[inner or place] = value
    return made


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (changed(vision__timm_model_name="vit_siglip"), "vision_cfg.timm_model_name 'vit_siglip'"),
        (changed(text__hf_model_name="roberta-base"), "text_cfg.hf_model_name 'roberta-base'"),
        (changed(text__pool_type="last"), "text_cfg.pool_type 'last'"),
        (changed(vision__no_ln_pre=True), "vision_cfg.no_ln_pre True"),
        (changed(multimodal_cfg={"layers": 2}), "multimodal_cfg {'layers': 2}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_models_are_refused(config, problem, script):
    with raises(f"The configuration has {problem}, which transformers' CLIPModel does not have. {HUB}"):
        script["clip_config"](config)


def test_configurations_that_are_none(script):
    with raises("The configuration needs embed_dim, a whole number, but has None."):
        script["clip_config"]({"preprocess_cfg": {}})
    with raises("The configuration has layers [3, 4, 6, 3], which CLIPModel does not take."):
        script["clip_config"](changed(vision__layers=[3, 4, 6, 3]))
    with raises("vision_cfg has a width that is no multiple of its head_width."):
        script["clip_config"](changed(vision__head_width=7))
    with raises("preprocess_cfg has resize_mode 'longest', but shortest, squash are known."):
        script["image_processor"]({"resize_mode": "longest"}, 24)


def test_checkpoints_that_do_not_fit(tokenizer, tmp_path, monkeypatch):
    state = load_file(DATA / "gelu.safetensors")
    other = state["token_embedding.weight"][:5].clone()
    config, arguments = DATA / "gelu.json", ["--output", tmp_path / "out", "--tokenizer", tokenizer]
    fit = "error: The checkpoint does not fit the configuration: "
    for name, changed_state, message in [
        ("a", {**state, "logit_bias": torch.zeros(1)}, "error: The checkpoint has 'logit_bias', which transformers' "
         "CLIPModel does not have."),
        ("b", {key: value for key, value in state.items() if key != "visual.proj"},
         f"{fit}visual_projection.weight is missing."),
        ("c", {**state, "token_embedding.weight": other},
         f"{fit}text_model.embeddings.token_embedding.weight is (5, 16), needed is (63, 16)."),
    ]:  # fmt: skip
        save_file(changed_state, tmp_path / f"{name}.safetensors")
        assert convert(monkeypatch, tmp_path / f"{name}.safetensors", "--config", config, *arguments) == message
    torch.save({"state_dict": [1]}, tmp_path / "d.pt")
    message = convert(monkeypatch, tmp_path / "d.pt", "--config", config, *arguments)
    assert message == f"error: {tmp_path / 'd.pt'} holds no weights by name."
    assert load_pickled(tmp_path / "d.pt") == {"state_dict": [1]}
    message = convert(monkeypatch, tmp_path / "none.pt", "--config", config, *arguments)
    assert message == f"error: There is no file {tmp_path / 'none.pt'}."
    smaller = {**json.loads(config.read_text())["model_cfg"], "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 62}}
    (tmp_path / "e.json").write_text(json.dumps(smaller))
    save_file(
        {**state, "token_embedding.weight": state["token_embedding.weight"][:62].clone()}, tmp_path / "e.safetensors"
    )
    message = convert(monkeypatch, tmp_path / "e.safetensors", "--config", tmp_path / "e.json", *arguments)
    assert message == (
        "error: The model ends texts with the id 61, but the tokenizer with 62. Pass the --tokenizer that it was "
        "trained with."
    )
    assert not (tmp_path / "out").exists()
