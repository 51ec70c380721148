"""What must hold for every family of `families.CASES`, tower by tower."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb
from families import CASES, LAYERS, Case
from peft import PeftModel, get_peft_model

from sep_peft import SEPConfig, functional, passes


TOWERS = [
    pytest.param(name, tower, attention, id=f"{name}-{tower}-{attention}")
    for name, case in CASES.items()
    for tower in ("text", "vision")
    if (case.text if tower == "text" else case.image) is not None
    for attention in case.attentions
]
FIRST = [pytest.param(name, id=name) for name in CASES]
PROMPTS = {"num_text_prompts": 3, "num_vision_prompts": 2}


def adapt(case: Case, attention: str | None = None, perturbed: bool = True, **options) -> PeftModel:
    model = get_peft_model(case.build(attention), SEPConfig(**(PROMPTS | case.options | options)))
    if perturbed:
        perturb(model)
    return model.eval()


def tower_inputs(case: Case, tower: str, count: int = 3, **text) -> dict[str, torch.Tensor]:
    if tower == "vision":
        return case.image(count)
    return case.text([5, 4, 7][:count], **text)


def tower_of(model: PeftModel, tower: str):
    return model.base_model.towers[tower]


def run(model: PeftModel, tower: str, inputs: dict) -> torch.Tensor:
    """The tower's projected embeddings of the prompted pass."""
    return tower_of(model, tower).embed_prompted(**inputs)


def base_features(case: Case, attention: str, tower: str, inputs: dict) -> torch.Tensor:
    """The unmodified model's projected embeddings."""
    model = adapt(case, attention)
    return tower_of(model, tower).embed_frozen(**inputs)


def variants_of_inputs(case: Case, tower: str) -> list[dict]:
    """No mask, an all-ones mask, a padded mask."""
    if tower == "vision":
        return [case.image(2)]
    full = case.text([6, 6])
    return [case.text([6, 6], mask=False), full, case.text([6, 4])]


@pytest.mark.parametrize(("name", "tower", "attention"), TOWERS)
@torch.no_grad()
def test_hidden_prompts_change_nothing(name, tower, attention, monkeypatch):
    """Prompts that no token may see leave every token as it was, with the mask that arrives extended."""
    case = CASES[name]
    model = adapt(case, attention, start_layer=1, frozen_weight=0.0)
    spec = tower_of(model, tower).spec
    extend = functional.extend_mask

    def hide(mask, count, position, causal):
        mask = extend(mask, count, position, causal)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
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
            visible = torch.ones(length, length, dtype=torch.bool)
            causal = spec.causal and case.causal_without_mask
            mask = (visible.tril() if causal else visible).expand(len(hidden), 1, -1, -1)
            lowest = torch.finfo(torch.float32).min
            kwargs["attention_mask"] = torch.where(mask, 0.0, lowest) if attention == "eager" else mask
        return run_layer(self, wrapper, hidden, (), kwargs)

    first_layer = tower_of(model, tower)._inner[0]
    if "attention_mask" not in first_layer.argument_names:
        assert name in MASKLESS
        return
    monkeypatch.setattr(passes.PromptedPass, "run_layer", with_mask)
    monkeypatch.setattr(functional, "extend_mask", hide)
    for inputs in variants_of_inputs(case, tower):
        expected = base_features(case, attention, tower, inputs)
        torch.testing.assert_close(run(model, tower, inputs), expected, rtol=1e-4, atol=2e-5)


#: Families whose image layers take no mask, so that prompts cannot be hidden; copies of all tokens test them instead.
MASKLESS: set[str] = set()


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
        return  # tested against longer native texts
    inputs = tower_inputs(case, tower, count=1)
    frozen_pass = passes.FrozenPass(start)
    with passes.current_pass.set(frozen_pass):
        layer._call_base(**layer._bind((), inputs), return_dict=True)
    layer.sep_prompts["default"] = torch.nn.Parameter(frozen_pass.trunk[0].clone())
    layer.sep_settings["default"] = dataclasses.replace(
        layer.sep_settings["default"], num_prompts=frozen_pass.trunk.shape[1]
    )
    expected = base_features(case, attention, tower, inputs)
    torch.testing.assert_close(run(model, tower, inputs), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "tower", "attention"), [p for p in TOWERS if p.values[1] == "text"])
@torch.no_grad()
def test_visible_prompts_equal_a_longer_native_text(name, tower, attention):
    """Prompts that are embeddings of words give what the same words give in the text."""
    case = CASES[name]
    model = adapt(case, attention, fusion="none", frozen_weight=0.0)
    layer = tower_of(model, tower)
    extra = torch.tensor([11, 12, 13])
    prompts = find_embedding(layer.base_layer, "token_embedding", "word_embeddings").weight[extra]
    embeddings = getattr(layer.base_layer, "embeddings", None)
    prompts = prompts * getattr(embeddings, "scaling", 1.0)  # VideoPrism's
    places = torch.tensor([9, 10, 11])  # where positions do not move, the prompts' words come from behind the text
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
            torch.testing.assert_close(states, native, rtol=1e-4, atol=2e-5)
            continue
        expected = base_features(case, attention, tower, longer)
        torch.testing.assert_close(run(model, tower, inputs), expected, rtol=1e-4, atol=2e-5)


def find_embedding(tower: torch.nn.Module, *names: str) -> torch.nn.Embedding:
    return next(m for key, m in tower.named_modules() if key.endswith(names))


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


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_results_do_not_depend_on_the_batch(name):
    case = CASES[name]
    model = adapt(case)
    for tower in model.base_model.towers:
        inputs = tower_inputs(case, tower)
        together = run(model, tower, inputs)
        for i in range(len(together)):
            alone = run(model, tower, {key: value[i : i + 1] for key, value in inputs.items()})
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_the_model_mixes_as_published(name):
    """Features and outputs of the model point where the mix of both branches points."""
    case = CASES[name]
    model = adapt(case)
    found = {"text": find_features(model, case, "text"), "vision": find_features(model, case, "vision")}
    for tower, layer in model.base_model.towers.items():
        prompted, frozen = layer.embed(**tower_inputs(case, tower))
        expected = functional.mix_embeddings(prompted, frozen, 0.5)
        assert found[tower], f"nothing to compare for the {tower} tower"
        for features in found[tower]:
            torch.testing.assert_close(F.normalize(features, dim=-1), expected, rtol=1e-4, atol=2e-5)


def find_features(model: PeftModel, case: Case, tower: str) -> list[torch.Tensor]:
    """Embeddings (3, E) of a tower wherever the model returns them."""
    make = case.text if tower == "text" else case.image
    if make is None:
        return []
    inputs = tower_inputs(case, tower)
    found = []
    getter = getattr(model.get_base_model(), "get_text_features" if tower == "text" else "get_image_features", None)
    if getter is not None:
        features = getter(**inputs)
        found.append(features.get("embeds", features.pooler_output))
    output = model(**case.inputs())
    for key in ("text_embeds",) if tower == "text" else ("image_embeds",):
        if output.get(key) is not None:
            found.append(output[key])
    if not found and output.get("pooler_output") is not None:
        found.append(output.get("embeds", output.pooler_output))  # a model that is a tower
    if not found:  # a classification head over mean tokens
        states = model.base_model.towers[tower](**inputs).last_hidden_state
        found.append(states[:, model.base_model.towers[tower].spec.leading_tokens :].mean(dim=1))
    return found


@pytest.mark.parametrize(("name", "tower", "attention"), TOWERS)
@torch.no_grad()
def test_hidden_states_have_the_length_and_count_of_the_base_model(name, tower, attention):
    case = CASES[name]
    inputs = tower_inputs(case, tower)
    for start in (0, 1):
        model = adapt(case, attention, start_layer=start)
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
    case = CASES[name]
    model = adapt(case)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = case.inputs()
    torch.testing.assert_close(compiled(**inputs).logits_per_image, model(**inputs).logits_per_image)
    torch._dynamo.reset()
