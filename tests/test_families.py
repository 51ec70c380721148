"""What must hold for every family of `families.CASES`, tower by tower."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import CASES, LAYERS, Case, patches
from family_models import (
    FIRST,
    PROMPTS,
    READING,
    TOWERS,
    adapt,
    adapt_once,
    find_features,
    one_input,
    tower_inputs,
    tower_of,
)
from packaging.version import Version
from peft import PeftModel, get_peft_model

from sep_peft import SEPConfig
from sep_peft.classifier.logits import ClassWeights, class_logits
from sep_peft.method.mix import mix_embeddings
from sep_peft.method.sequence import extend_mask
from sep_peft.tuner import passes
from sep_peft.tuner.current import current_pass


def run(model: PeftModel, tower: str, inputs: dict) -> torch.Tensor:
    """The tower's projected embeddings of the prompted pass."""
    return tower_of(model, tower).embed_prompted(**inputs)


def base_features(case: Case, attention: str, tower: str, inputs: dict) -> torch.Tensor:
    """The unmodified model's projected embeddings."""
    return tower_of(adapt_once(case, attention), tower).embed_frozen(**inputs)


def variants_of_inputs(case: Case, tower: str) -> list[dict]:
    """No mask, an all-ones mask, a padded mask."""
    words = case.words(tower)
    if words is None:
        return [make(2) for make in (case.image, *case.more_images)]
    inputs = [words([6, 6], mask=False), words([6, 6]), words([6, 4])]
    return [*inputs, words([6, 4], left=True)] if case.left else inputs


@pytest.mark.parametrize(("name", "tower", "attention"), TOWERS)
@torch.no_grad()
def test_hidden_prompts_change_nothing(name, tower, attention, monkeypatch):
    """Prompts that no token may see leave every token as it was, with the mask that arrives extended."""
    case = CASES[name]
    model = adapt_once(case, attention, start_layer=1)
    spec = tower_of(model, tower).spec
    extend = extend_mask

    def hide(mask, count, position, causal):
        mask = extend(mask, count, position, causal)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        if mask.ndim == 4:  # in older transformers one row for all tokens
            mask = mask.expand(-1, -1, mask.shape[-1], -1)
        mask = mask.clone()
        mask[..., position : position + count] = hidden
        if mask.ndim == 4:  # prompts see at least themselves, so that no row is empty
            own = range(position, position + count)
            mask[..., list(own), list(own)] = True if mask.dtype == torch.bool else 0.0
        return mask

    run_layer = passes.PromptedPass.run_layer

    def with_mask(self, wrapper, hidden, args, kwargs):
        """Where no mask arrives, make the one that says the same."""
        kwargs = wrapper.bind(args, kwargs)
        if kwargs.get("attention_mask") is None:
            length = hidden.shape[1] - (self.prompts.shape[0] if self.has_prompts_before(wrapper.index) else 0)
            length += case.messages if tower == "vision" else 0
            visible = torch.ones(length, length, dtype=torch.bool)
            causal = spec.causal and case.causal_without_mask
            mask = (visible.tril() if causal else visible).expand(len(hidden), 1, -1, -1)
            lowest = torch.finfo(torch.float32).min
            kwargs["attention_mask"] = torch.where(mask, 0.0, lowest) if attention == "eager" else mask
        return run_layer(self, wrapper, hidden, (), kwargs)

    first_layer = tower_of(model, tower)._inner[0]
    if "attention_mask" not in first_layer.argument_names:
        assert name in MASKLESS or Version(hf.__version__) < Version(LATE_MASKS[name])
        pytest.skip("its layers take no mask; copies of all tokens test it")
    monkeypatch.setattr(passes.PromptedPass, "run_layer", with_mask)
    monkeypatch.setattr(passes, "extend_mask", hide)
    for inputs in variants_of_inputs(case, tower):
        expected = base_features(case, attention, tower, inputs)
        torch.testing.assert_close(run(model, tower, inputs), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "tower", "attention"), TOWERS)
def test_the_last_mlp_runs_for_what_is_pooled(name, tower, attention):
    """For that token alone where the embedding is all that is wanted, with the same embeddings and gradients."""
    case = CASES[name]
    model = adapt(case, attention)
    layer = tower_of(model, tower)
    if layer.spec.mlp_norm is None:
        pytest.skip("no MLP of its layers can run for some tokens alone")
    lengths = []
    norm = layer._layer_lists()[-1][-1].get_submodule(layer.spec.mlp_norm)
    norm.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    for inputs in variants_of_inputs(case, tower):
        results = []
        for pooled in (True, False):
            lengths.clear()
            if not pooled:
                layer._read_token = lambda inputs: None
            branches = layer.embed(**inputs)
            assert (lengths == [1, 1]) is pooled
            alone = layer.embed_prompted(**inputs), layer.embed_frozen(**inputs)
            model.zero_grad()
            branches.prompted.square().mean().backward()
            gradients = [p.grad for p in layer.adapter_parameters("default") if p.grad is not None]
            results.append((*branches, *alone, *gradients))
            vars(layer).pop("_read_token", None)
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
        lengths.clear()
        layer(**layer._bind((), inputs))
        assert min(lengths) > 1  # whoever calls the tower gets all of its tokens


#: Families whose vision layers take one in newer releases of transformers -> from which one on they do.
LATE_MASKS = {
    **dict.fromkeys(("bert and vit", "bert and deit", "bert and beit", "roberta and vit"), "5.17"),
    **dict.fromkeys(("bert and dinov2", "bert and dinov2 with registers", "tipsv2", "tipsv2 vision alone"), "5.23"),
}
#: Families whose image layers take no mask, so that prompts cannot be hidden; copies of all tokens test them instead.
MASKLESS = {
    "blip",
    "blip retrieval",
    "blip vision alone",
    "blip_2 retrieval",
    "blip_2 vision with projection",
    "blip_2 vision",
}


@pytest.mark.parametrize(("name", "tower", "attention"), TOWERS)
@torch.no_grad()
def test_copies_of_all_tokens_change_nothing(name, tower, attention):
    """Attention over every token twice is attention over every token, where it looks both ways."""
    case = CASES[name]
    start = case.copied_at if tower == "vision" else 1
    other = {"text": "num_vision_prompts", "vision": "num_text_prompts"}[tower]
    model = adapt(case, attention, start_layer=start, fusion="none", frozen_weight=0.0, **{other: 0})
    layer = tower_of(model, tower)
    if layer.spec.causal:
        pytest.skip("causal; longer native texts test it")
    if tower == "vision" and (name in ROTATED or case.messages):
        pytest.skip("rotated patches, or a message that is not among the tokens that are copied")
    inputs = one_input(case, tower)
    frozen_pass = passes.FrozenPass({start})
    with current_pass.set(frozen_pass):
        layer._call_base(**layer._bind((), inputs), return_dict=True)
    tokens = frozen_pass.trunk(start).hidden[0]
    if inputs.get(layer.spec.mask_input) is not None:
        tokens = tokens[inputs[layer.spec.mask_input][0].bool()]
    layer.sep_prompts["default"] = torch.nn.Parameter(tokens.clone())
    layer.sep_settings["default"] = dataclasses.replace(layer.sep_settings["default"], num_prompts=len(tokens))
    expected = base_features(case, attention, tower, inputs)
    torch.testing.assert_close(run(model, tower, inputs), expected, rtol=1e-4, atol=2e-5)


#: Families whose image layers rotate patches but not prompts, so that copies differ; registers test them instead.
ROTATED = {"bert and dinov3"}


@pytest.mark.parametrize("name", ["bert and dinov3", "bert and dinov2 with registers"])
@torch.no_grad()
def test_visible_prompts_equal_registers(name):
    """Prompts are what registers are: further tokens without a position."""
    case = CASES[name]
    model = adapt(case, fusion="none", frozen_weight=0.0)
    layer = tower_of(model, "vision")
    registers = layer.base_layer.embeddings.register_tokens
    assert layer.spec.leading_tokens == 1 + registers.shape[1]
    prompted = run(model, "vision", case.image(2))
    registers.data = torch.cat([layer.sep_prompts["default"][None], registers], dim=1)
    layer.base_layer.embeddings.config.num_register_tokens = registers.shape[1]
    torch.testing.assert_close(layer.embed_frozen(**case.image(2)), prompted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.image])
@torch.no_grad()
def test_image_prompts_enter_as_patches_do(name):
    """Copies of all tokens as the embeddings leave them meet the same norm, if any, on the way to the first layer."""
    case = CASES[name]
    model = adapt(case, fusion="none", frozen_weight=0.0)
    if name in ROTATED or case.messages:
        pytest.skip("copies differ, see test_copies_of_all_tokens_change_nothing")
    layer = tower_of(model, "vision")
    if layer.spec.in_stages:
        pytest.skip("group tokens join after the embeddings, and copies of these would be missing")
    inputs, seen = one_input(case, "vision"), []
    embeddings = layer.base_layer.get_submodule(case.embeddings)
    with embeddings.register_forward_hook(lambda module, args, output: seen.append(output)):
        expected = layer.embed_frozen(**inputs)
    tokens = seen[0][0]
    if inputs.get(layer.spec.mask_input) is not None:
        tokens = tokens[inputs[layer.spec.mask_input][0].bool()]
    layer.sep_prompts["default"] = torch.nn.Parameter(tokens.clone())
    layer.sep_settings["default"] = dataclasses.replace(layer.sep_settings["default"], num_prompts=len(tokens))
    torch.testing.assert_close(run(model, "vision", inputs), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "tower"), READING)
@torch.no_grad()
def test_masked_padding_changes_nothing(name, tower):
    """Texts padded to the full length, where moved positions end at the last one, are the texts themselves."""
    case = CASES[name]
    layer, words = tower_of(adapt_once(case), tower), case.words(tower)
    if layer.spec.max_length_padding:
        pytest.skip("padding counts in its texts")
    positions = layer.spec.positions
    total = 16 if positions is None else layer.base_layer.get_submodule(positions).num_positions
    for found, expected in zip(layer.embed(**words([5, 5], total=total)), layer.embed(**words([5, 5])), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "tower", "attention"), [p for p in TOWERS if CASES[p.values[0]].words(p.values[1])])
@torch.no_grad()
def test_visible_prompts_equal_a_longer_native_text(name, tower, attention):
    """Prompts that are embeddings of words give what the same words give in the text."""
    case = CASES[name]
    model = adapt(case, attention, fusion="none", frozen_weight=0.0)
    layer = tower_of(model, tower)
    extra = torch.tensor([11, 12, 13])[: layer.active_settings.num_prompts]
    prompts = find_embedding(layer.base_layer, "token_embedding", "word_embeddings").weight[extra]
    embeddings = getattr(layer.base_layer, "embeddings", None)
    # TIPSv2 and VideoPrism scale the embeddings of words
    prompts = prompts * next((m.embed_scale for m in layer.base_layer.modules() if hasattr(m, "embed_scale")), 1.0)
    prompts = prompts * getattr(embeddings, "scaling", 1.0)
    places = torch.tensor([9, 10, 11])  # where positions do not move, the prompts' words come from after the text
    if not case.shifts:
        assert layer.spec.positions is None
        table = embeddings.position_embedding  # a module, or VideoPrism's buffer
        prompts = prompts + getattr(table, "weight", table)[places]
    layer.sep_prompts["default"].data.copy_(prompts)
    for inputs in variants_of_inputs(case, tower):
        at = layer.spec.insert_at
        longer = {}
        for key, value in inputs.items():
            middle = extra.expand(len(value), -1) if key == "input_ids" else torch.ones(len(value), len(extra)).long()
            longer[key] = torch.cat([value[:, :at], middle, value[:, at:]], dim=1)
        if not case.shifts:
            own = torch.arange(inputs["input_ids"].shape[1])
            longer["position_ids"] = torch.cat([own[:at], places, own[at:]])[None]
        if case.pools_all:
            states = layer(**inputs).last_hidden_state
            native = layer._call_base(**longer, return_dict=True).last_hidden_state
            native = torch.cat([native[:, :at], native[:, at + len(extra) :]], dim=1)
            real = inputs.get("attention_mask", torch.ones(states.shape[:2])).bool()
            torch.testing.assert_close(states[real], native[real], rtol=1e-4, atol=2e-5)
            continue
        expected = base_features(case, attention, tower, longer)
        torch.testing.assert_close(run(model, tower, inputs), expected, rtol=1e-4, atol=2e-5)


def find_embedding(tower: torch.nn.Module, *names: str) -> torch.nn.Embedding:
    return next(m for key, m in tower.named_modules() if key.endswith(names))


@pytest.mark.parametrize(("name", "tower"), READING)
def test_texts_end_where_the_family_says(name, tower):
    """Padding without a mask is after the end of a text wherever the family tells it from the ids."""
    case = CASES[name]
    layer, words = tower_of(adapt_once(case), tower), case.words(tower)
    expected = [8, 8, 8] if layer.spec.text_end is None else [4, 3, 6]
    assert layer.texts.span(words([5, 4, 7], total=9, mask=False))[1].tolist() == expected
    assert layer.texts.span(words([5, 4, 7], total=9))[1].tolist() == [4, 3, 6]


@pytest.mark.parametrize("name", FIRST)
def test_gradients_reach_every_adapter_parameter_and_nothing_else(name):
    case = CASES[name]
    model = adapt(case).train()
    total = sum(run(model, tower, tower_inputs(case, tower)).pow(2).mean() for tower in model.base_model.towers)
    total.backward()
    for key, parameter in model.named_parameters():
        if ".sep_" in key:
            assert parameter.grad is not None, key
            # the bias of keys shifts all scores of a query alike
            assert ".key." in key or parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None and not parameter.requires_grad, key


@torch.no_grad()
def everything(model: torch.nn.Module, case: Case) -> list[torch.Tensor]:
    """All tensors that a call of the whole model returns."""
    output = model.eval()(**case.inputs())
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", FIRST)
def test_lifecycle(name, tmp_path):
    """Saved, loaded, disabled and unloaded."""
    case = CASES[name]
    base = case.build().requires_grad_(False)  # as under PEFT, since torch rounds otherwise where gradients may follow
    keys, plain = list(base.state_dict()), everything(base, case)
    model = adapt(case)
    changed = everything(model, case)
    assert not all_equal(changed, plain)
    with model.disable_adapter():
        assert all_equal(everything(model, case), plain)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(case.build(), tmp_path)
    assert all_equal(everything(fresh, case), changed)
    other = copy.deepcopy(model)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == keys
    assert all_equal(everything(unloaded, case), plain)
    assert all_equal(everything(other, case), changed)


@torch.no_grad()
def test_a_projection_to_mix_after_may_be_trained(tmp_path):
    """It stays one of the model's own modules to PEFT, and is unwrapped with the rest."""
    case = CASES["clap"]
    model = adapt(case, modules_to_save=["text_projection"])
    trained = model.get_base_model().text_projection.modules_to_save["default"]
    trained.linear2.weight += 0.3
    changed = model(**case.inputs()).text_embeds
    expected = mix_embeddings(*tower_of(model, "text").embed(**case.text([5, 4, 7])), 0.5)
    torch.testing.assert_close(changed, expected)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(case.build(), tmp_path)
    assert torch.equal(fresh(**case.inputs()).text_embeds, changed)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == list(case.build().state_dict())
    assert unloaded.text_projection is trained.base_layer


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_results_do_not_depend_on_the_batch(name):
    case = CASES[name]
    model = adapt_once(case)
    for tower in model.base_model.towers:
        inputs = tower_inputs(case, tower)
        together = run(model, tower, inputs)
        size = case.frames if tower == "vision" else 1
        for i in range(0, len(together), size):
            alone = run(model, tower, {key: value[i : i + size] for key, value in inputs.items()})
            torch.testing.assert_close(alone, together[i : i + size], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_the_model_mixes_as_published(name):
    """Features and outputs of the model point where the mix of both branches points."""
    case = CASES[name]
    model = adapt_once(case)
    found = {"text": find_features(model, case, "text"), "vision": find_features(model, case, "vision")}
    for tower, layer in model.base_model.towers.items():
        prompted, frozen = layer.embed(**tower_inputs(case, tower))
        expected = mix_embeddings(prompted, frozen, 0.5)
        assert found[tower], f"nothing to compare for the {tower} tower"
        for features in found[tower]:
            torch.testing.assert_close(F.normalize(features, dim=-1), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.text and c.image and c.features is None])
@pytest.mark.parametrize("value", [None, 9.0])
@torch.no_grad()
def test_logits_are_scaled_as_the_model_scales_them(name, value):
    """Scale, its limit and bias of the row give the model's own logits."""
    case = CASES[name]
    model = adapt(case)
    row, base = tower_of(model, "vision").architecture, model.get_base_model()
    if value is not None:
        getattr(base, row.logit_scale).fill_(value)
    if row.logit_bias is not None:
        getattr(base, row.logit_bias).fill_(-2.5)
    embeds = {}
    for tower, layer in model.base_model.towers.items():
        embeds[tower] = mix_embeddings(*layer.embed(**tower_inputs(case, tower)), 0.5)
    text, vision = embeds["text"], embeds["vision"]
    # Without a share of zero-shot the frozen embeddings are not read.
    found = class_logits(tower_of(model, "vision"), vision, vision, ClassWeights(text, text))
    expected = model(**case.inputs()).logits_per_image
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_padded_patches_are_never_selected():
    """Nor do they matter in any other way, also where an image has fewer patches than there are prompts."""
    case = CASES["siglip2"]
    layer = tower_of(adapt_once(case), "vision")
    inputs = patches([(2, 4), (1, 1)], total=11)(2)
    padding = inputs["pixel_attention_mask"] == 0
    loud = inputs | {"pixel_values": inputs["pixel_values"].masked_fill(padding[..., None], 100.0)}
    trace = {}
    found = layer.embed(**loud, trace=trace)
    for first, second in zip(found, layer.embed(**inputs), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=2e-5)
    for seen in trace.values():
        assert not padding.gather(1, seen.token_positions).any()
        assert seen.token_positions[1].tolist() == [0, 0]


@pytest.mark.parametrize(("name", "tower", "attention"), TOWERS)
@torch.no_grad()
def test_hidden_states_have_the_length_and_count_of_the_base_model(name, tower, attention):
    case = CASES[name]
    inputs = tower_inputs(case, tower)
    for options in ({}, {"start_layer": 1}):
        model = adapt_once(case, attention, **options)
        layer = tower_of(model, tower)
        plain = layer._call_base(**layer._bind((), inputs), output_hidden_states=True)
        found = layer(**layer._bind((), inputs), output_hidden_states=True)
        assert [x.shape for x in found.hidden_states] == [x.shape for x in plain.hidden_states]
        assert len(found.hidden_states) == LAYERS + 1
        as_tuple = layer(**layer._bind((), inputs), return_dict=False)
        assert torch.equal(as_tuple[0], layer(**layer._bind((), inputs))[0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.compiled])
@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    """Of two layers a tower, since the compiler's time grows with them."""

    def config():
        made = CASES[name].config()
        made.text_config.num_hidden_layers = made.vision_config.num_hidden_layers = 2
        return made

    case = dataclasses.replace(CASES[name], config=config)
    model = adapt(case)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = case.inputs()
    torch.testing.assert_close(compiled(**inputs).logits_per_image, model(**inputs).logits_per_image)
    torch._dynamo.reset()


def test_segmentation_without_gradients_is_refused():
    config = CASES["clipseg"].config()
    with pytest.raises(ValueError, match="num_text_prompts must be 0 for this model, because the model runs"):
        get_peft_model(hf.CLIPSegForImageSegmentation(config), SEPConfig.published(**PROMPTS))


def test_a_class_with_its_towers_elsewhere_is_refused():
    model = hf.OwlViTForObjectDetection(CASES["owlvit"].config())
    with pytest.raises(ValueError, match="with a 'text_model', but OwlViTForObjectDetection has none"):
        get_peft_model(model, SEPConfig.published(**PROMPTS))
