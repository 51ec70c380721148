"""The wrapped forward is the method: against the oracle, and its properties."""

from __future__ import annotations

import copy
import functools
import threading

import oracle
import pytest
import torch
import torch.nn.functional as F
from copies import made_once
from peft import get_peft_model
from small_clip import TEXT_POSITIONS, make_clip, make_images, make_texts, perturb
from small_sep import SETTINGS

from sep_peft import SEPConfig
from sep_peft.method import reference


LENGTHS = [5, 3, 9, 4]


@made_once
def make_model(settings: dict, attention: str = "sdpa", **changes):
    model = get_peft_model(make_clip(attention), SEPConfig.published(**(settings | changes)))
    perturb(model)
    return model.eval()


def oracle_inputs() -> dict[str, list]:
    """Token ids of texts without padding, and two images."""
    texts = make_texts(LENGTHS)
    rows = zip(texts["input_ids"], texts["attention_mask"], strict=True)
    return {"text": [ids[mask.bool()].tolist() for ids, mask in rows], "vision": list(make_images(2))}


ENCODE = {"text": oracle.text_features, "vision": oracle.image_features}


@functools.cache
def frozen_features(modality: str) -> list[torch.Tensor]:
    """Of the tiny CLIP by the oracle, which takes seconds."""
    clip = make_clip()
    return [ENCODE[modality](clip, item) for item in oracle_inputs()[modality]]


@functools.cache
def oracle_features(name: str) -> dict[str, torch.Tensor]:
    """SEP's text and image embeddings of unit length from the oracle, for any attention."""
    model = make_model(SETTINGS[name])
    clip = copy.deepcopy(model).unload()
    found = {}
    for modality, tower in model.base_model.towers.items():
        settings, frozen = tower.active_settings, frozen_features(modality)
        if settings is None:
            found[modality] = torch.stack([x / x.norm() for x in frozen])
            continue
        fusions = {}
        for layer in settings.fusion_layers:
            fusions[layer] = tower.sep_fusion["default"]["shared" if settings.share_fusion else str(layer)]
        prompts = tower.sep_prompts["default"]
        options = {"start": settings.start_layer, "fusion_tokens": settings.fusion_tokens}
        items = oracle_inputs()[modality]
        prompted = [ENCODE[modality](clip, item, prompts, fusions, **options) for item in items]
        mixed = zip(prompted, frozen, strict=True)
        found[modality] = torch.stack([reference.mix(a, b, settings.frozen_weight) for a, b in mixed])
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_forward_is_the_method(name, attention):
    model = make_model(SETTINGS[name], attention)
    texts, images = make_texts(LENGTHS), make_images(2)
    text, image = (oracle_features(name)[modality] for modality in ("text", "vision"))
    scale = model.get_base_model().logit_scale.exp()
    output = model(**texts, pixel_values=images)
    torch.testing.assert_close(output.text_embeds, text, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(output.image_embeds, image, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(output.logits_per_image, scale * image @ text.T, rtol=1e-4, atol=2e-5)
    text_features = model.get_text_features(**texts).pooler_output
    image_features = model.get_image_features(images).pooler_output
    torch.testing.assert_close(F.normalize(text_features, dim=-1), output.text_embeds)
    torch.testing.assert_close(F.normalize(image_features, dim=-1), output.image_embeds)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["published", "layers", "start", "shallow", "independent", "random", "mean", "noise"])
@torch.no_grad()
def test_padding_changes_nothing(name, attention):
    model = make_model(SETTINGS[name], attention)
    lengths = [5, 3, 9, 4]
    expected = torch.cat([model.get_text_features(**make_texts([n], seed=7)).pooler_output for n in lengths])
    rows = [make_texts([n], seed=7)["input_ids"][0] for n in lengths]
    for total in (9, 12, TEXT_POSITIONS):
        for pad in (0, 62):  # some other id, and EOS as CLIP's tokenizers pad
            input_ids = torch.stack([F.pad(row, (0, total - len(row)), value=pad) for row in rows])
            mask = torch.stack([F.pad(torch.ones_like(row), (0, total - len(row))) for row in rows])
            for attention_mask in (None, mask, torch.ones_like(mask)):
                found = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_results_do_not_depend_on_the_batch(name, texts, images):
    model = make_model(SETTINGS[name])
    together = model(**texts, pixel_values=images)
    for i in range(len(images)):
        alone = model.get_image_features(images[i : i + 1]).pooler_output
        torch.testing.assert_close(F.normalize(alone, dim=-1)[0], together.image_embeds[i], rtol=1e-4, atol=1e-6)
    for i in range(len(texts["input_ids"])):
        alone = model.get_text_features(**{key: value[i : i + 1] for key, value in texts.items()}).pooler_output
        torch.testing.assert_close(F.normalize(alone, dim=-1)[0], together.text_embeds[i], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_batch_coupled_depends_on_the_batch(images):
    """The control of the test above: with `batch_coupled` it would fail."""
    model = make_model(SETTINGS["published"], batch_coupled=True)
    together = model.get_image_features(images).pooler_output
    alone = model.get_image_features(images[:1]).pooler_output
    assert (together[0] - alone[0]).abs().max() > 1e-3


def test_text_that_does_not_fit_says_how_many_tokens_are_left():
    model = make_model(SETTINGS["published"])
    fits = make_texts([TEXT_POSITIONS - 3])
    assert model.get_text_features(**fits).pooler_output.isfinite().all()
    message = (
        r"A text of 18 tokens does not fit: the text tower has 20 positions and 3 are taken by prompts, so 17 tokens "
        r"are left \(BOS and EOS included\). Shorten the text or use fewer prompts \(num_text_prompts\)."
    )
    with pytest.raises(ValueError, match=message):
        model.get_text_features(**make_texts([TEXT_POSITIONS - 2]))
    with pytest.raises(ValueError, match=message):
        model.get_text_features(input_ids=make_texts([TEXT_POSITIONS - 2], total=TEXT_POSITIONS)["input_ids"])


@pytest.mark.parametrize("name", ["start", "start alone"])
def test_trunk_below_start_layer_runs_once(name, images, texts):
    model = make_model(SETTINGS[name])
    calls = []
    for tower in model.base_model.towers.values():
        for layer in tower.base_layer.encoder.layers:
            layer.base_layer.register_forward_hook(lambda *_, key=(tower.modality, layer.index): calls.append(key))
    model(**texts, pixel_values=images)
    twice = 1 if SETTINGS[name].get("frozen_weight") == 0 else 2
    assert calls.count(("text", 0)) == calls.count(("vision", 0)) == 1
    assert calls.count(("text", 1)) == calls.count(("vision", 3)) == twice


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_reach_every_adapter_parameter_and_nothing_else(name, images, texts):
    model = make_model(SETTINGS[name]).train()
    model(**texts, pixel_values=images).logits_per_image.pow(2).mean().backward()
    for key, parameter in model.named_parameters():
        if ".sep_" in key:
            assert parameter.grad is not None, key
            # The bias of keys shifts all scores of a query alike, and over a single token every weight is 1.
            idle = ".key." in key or (name == "one prompt" and ".query." in key)
            assert idle or parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None and not parameter.requires_grad, key


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["published", "start"])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant, images, texts):
    def gradients(model):
        model.train()
        model(**texts, pixel_values=images).logits_per_image.pow(2).mean().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients(make_model(SETTINGS[name]))
    clip = make_clip()
    clip.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = get_peft_model(clip, SEPConfig.published(**SETTINGS[name]))
    perturb(model)
    found = gradients(model)
    assert found.keys() == plain.keys()
    for key in plain:
        torch.testing.assert_close(found[key], plain[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_adapters_in_fp32(dtype, images, texts):
    model = get_peft_model(make_clip().to(dtype), SEPConfig.published(**SETTINGS["published"])).train()
    perturb(model)
    output = model(**texts, pixel_values=images.to(dtype))
    output.logits_per_image.float().pow(2).mean().backward()
    assert output.logits_per_image.dtype == dtype and output.logits_per_image.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".sep_" in key else dtype), key
        if ".sep_" in key:
            assert parameter.grad.isfinite().all(), key
    wide = make_model(SETTINGS["published"])(**texts, pixel_values=images)
    torch.testing.assert_close(output.image_embeds.float(), wide.image_embeds, rtol=0, atol=0.05)


def test_autocast(images, texts):
    model = make_model(SETTINGS["published"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**texts, pixel_values=images)
    output.logits_per_image.float().pow(2).mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    wide = make_model(SETTINGS["published"])(**texts, pixel_values=images)
    torch.testing.assert_close(output.image_embeds.float(), wide.image_embeds, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["published", "start", "shallow"])
@torch.no_grad()
def test_compiles_without_graph_breaks(name, images):
    """By the backend that runs what dynamo traced, of two layers: the compiler's time grows with them."""
    clip = make_clip(text_layers=2, vision_layers=2)
    model = get_peft_model(clip, SEPConfig.published(**SETTINGS[name]))
    perturb(model)
    model.eval()
    cases = [
        (model.get_text_features, make_texts([5, 3, 9, 4], total=TEXT_POSITIONS)),
        (model.get_image_features, {"pixel_values": images}),
    ]
    if name == "published":  # texts that leave room after the longest are one graph more
        cases.append((model.get_text_features, make_texts([5, 3, 9, 4])))
    for encode, inputs in cases:
        compiled = torch.compile(encode, fullgraph=True, backend="eager", dynamic=False)
        found, expected = compiled(**inputs).pooler_output, encode(**inputs).pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_threads_do_not_disturb_each_other():
    model = make_model(SETTINGS["start"])
    jobs = [(make_texts([3 + i, 4], seed=i), make_images(1 + i % 3, seed=i)) for i in range(8)]

    @torch.no_grad()
    def run(job):
        texts, images = job
        return model(**texts, pixel_values=images).logits_per_image

    expected = [run(job) for job in jobs]
    found: list = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(i):
        start.wait()
        for _ in range(5):
            found[i] = run(jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["published", "start"])
@torch.no_grad()
def test_hidden_states_have_the_length_and_count_of_the_base_model(name, attention, images, texts):
    model = make_model(SETTINGS[name], attention)
    with model.disable_adapter():
        plain = model.get_base_model().vision_model(images, output_hidden_states=True)
        plain_text = model.get_base_model().text_model(**texts, output_hidden_states=True)
    found = model.get_base_model().vision_model(images, output_hidden_states=True)
    found_text = model.get_base_model().text_model(**texts, output_hidden_states=True)
    assert [x.shape for x in found.hidden_states] == [x.shape for x in plain.hidden_states]
    assert [x.shape for x in found_text.hidden_states] == [x.shape for x in plain_text.hidden_states]
    torch.testing.assert_close(found.hidden_states[0], plain.hidden_states[0])
    torch.testing.assert_close(found.hidden_states[-1], found.last_hidden_state)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(images, texts):
    model = make_model(SETTINGS["published"])
    tower = model.get_base_model().vision_model
    last, pooled = tower(images, return_dict=False)
    output = tower(images)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)
    assert torch.equal(
        model(**texts, pixel_values=images, return_dict=False)[0], model(**texts, pixel_values=images).logits_per_image
    )


def test_frozen_pass_runs_without_gradients(images):
    model = make_model(SETTINGS["published"]).train()
    prompted, frozen = model.base_model.towers["vision"].embed(pixel_values=images)
    assert prompted.requires_grad and not frozen.requires_grad
