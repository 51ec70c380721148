"""Adapters come and go: add, switch, disable, save, load, delete, unload, through PEFT and through transformers."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from small_clip import make_clip, perturb
from small_sep import IMAGES, SETTINGS, TEXTS, adapted, outputs, snapshot
from transformers import CLIPModel

from sep_peft import AdapterMismatchError, SEPConfig


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    make_clip().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", SETTINGS)
class TestOneAdapter:
    def test_disabled_equals_the_base_bit_for_bit(self, name):
        base = outputs(make_clip())
        model = adapted(name)
        assert not torch.equal(outputs(model), base)
        with model.disable_adapter():
            assert torch.equal(outputs(model), base)
        assert not torch.equal(outputs(model), base)

    def test_unload_gives_back_the_very_same_modules(self, name):
        clip = make_clip()
        before, base = snapshot(clip), outputs(clip)
        model = get_peft_model(clip, SEPConfig.published(**SETTINGS[name]))
        assert snapshot(clip) != before
        assert model.unload() is clip
        assert snapshot(clip) == before
        assert torch.equal(outputs(clip), base)
        assert not hasattr(clip, "peft_config")

    def test_deleting_the_last_adapter_gives_the_base(self, name):
        model = adapted(name)
        model.delete_adapter("default")
        # not through PeftModel, which looks for the configuration of an active adapter
        assert torch.equal(outputs(model.base_model), outputs(make_clip()))
        assert not any(".sep_" in key for key in model.state_dict())

    def test_saved_and_loaded_into_a_fresh_model(self, name, tmp_path):
        model = adapted(name)
        model.save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        for low_cpu_mem_usage in (False, True):
            fresh = PeftModel.from_pretrained(make_clip(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(outputs(fresh), outputs(model))
            assert not any(p.requires_grad for p in fresh.parameters())
        again = PeftModel.from_pretrained(make_clip(), tmp_path, is_trainable=True)
        assert {k for k, p in again.named_parameters() if p.requires_grad} == {
            k for k in again.state_dict() if ".sep_" in k
        }

    def test_file_holds_only_the_adapter(self, name, tmp_path):
        model = adapted(name)
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        assert all(".sep_prompts" in key or ".sep_fusion." in key for key in state)
        assert not any("default" in key or "base_layer" in key for key in state)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(tensor.numel() for tensor in state.values()) == trainable

    def test_transformers_loads_it(self, name, tmp_path, clip_folder):
        model = adapted(name)
        model.save_pretrained(tmp_path)
        clip = CLIPModel.from_pretrained(clip_folder)
        clip.load_adapter(str(tmp_path))
        assert torch.equal(outputs(clip), outputs(model))

    def test_transformers_disables_and_removes_it(self, name, tmp_path, clip_folder, own_adapters):
        model = adapted(name)
        model.save_pretrained(tmp_path)
        clip = CLIPModel.from_pretrained(clip_folder)
        base = outputs(clip)
        clip.load_adapter(str(tmp_path))
        clip.disable_adapters()
        assert torch.equal(outputs(clip), base)
        clip.enable_adapters()
        assert torch.equal(outputs(clip), outputs(model))
        clip.delete_adapter("default")
        assert torch.equal(outputs(clip), base)

    def test_deepcopy_and_moves_follow_their_own_weights(self, name):
        model = adapted(name)
        expected = outputs(model)
        other = copy.deepcopy(model)
        perturb(model, seed=9)
        assert torch.equal(outputs(other), expected)
        assert not torch.equal(outputs(model), expected)
        wide = other.double()(**TEXTS, pixel_values=IMAGES.double()).logits_per_image
        torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [("published", "one prompt"), ("published", "layers"), ("vision only", "text only"), ("start", "shallow")],
)
class TestTwoAdapters:
    def both(self, first, second) -> PeftModel:
        model = adapted(first, "one")
        torch.manual_seed(4)
        model.add_adapter("two", SEPConfig.published(**SETTINGS[second]))
        perturb(model, "two", seed=4)
        return model.eval()

    def alone(self, first, second) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs(adapted(first, "one")), outputs(adapted(second, "two", seed=4))

    def test_switching(self, first, second):
        model = self.both(first, second)
        one, two = self.alone(first, second)
        for name, expected in (("one", one), ("two", two), ("one", one)):
            model.set_adapter(name)
            assert torch.equal(outputs(model), expected)
            trained = {key for key, p in model.named_parameters() if p.requires_grad}
            assert trained == {key for key in model.state_dict() if ".sep_" in key and f".{name}" in key}

    def test_each_is_saved_alone(self, first, second, tmp_path):
        model = self.both(first, second)
        model.save_pretrained(tmp_path)
        for name, expected in zip(("one", "two"), self.alone(first, second), strict=True):
            fresh = PeftModel.from_pretrained(make_clip(), tmp_path / name, adapter_name="other")
            assert torch.equal(outputs(fresh), expected)

    @pytest.mark.parametrize("removed", ["one", "two"])
    @pytest.mark.parametrize("active", ["one", "two"])
    def test_deleting_either(self, first, second, removed, active):
        model = self.both(first, second)
        model.set_adapter(active)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says which adapter is active now
            model.delete_adapter(removed)
        kept = "two" if removed == "one" else "one"
        assert torch.equal(outputs(model), self.alone(first, second)[kept == "two"])
        status = model.get_model_status()
        assert status.active_adapters == [kept] and status.available_adapters == [kept]

    def test_loading_a_second_one(self, first, second, tmp_path):
        self.both(first, second).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_clip(), tmp_path / "one", adapter_name="one")
        model.load_adapter(tmp_path / "two", adapter_name="two")
        one, two = self.alone(first, second)
        assert torch.equal(outputs(model), one)
        model.set_adapter("two")
        assert torch.equal(outputs(model), two)


def test_what_is_printed_reads_sensibly(capsys):
    model = adapted("published", "one")
    model.add_adapter("two", SEPConfig.published(**SETTINGS["vision only"]))
    model.print_trainable_parameters()
    own = sum(p.numel() for n, p in model.named_parameters() if ".sep_" in n and ".one" in n)
    total = sum(p.numel() for p in model.parameters())
    line = f"trainable params: {own:,d} || all params: {total:,d} || trainable%: {100 * own / total:.4f}\n"
    assert capsys.readouterr().out == line
    printed = str(model)
    assert "SEPModel(" in printed and "SEPTower(" in printed and "SEPEncoderLayer(" in printed
    assert "(one): LayerFusions" in printed and "TokenFusion(" in printed


def test_the_status_of_each_layer():
    model = adapted("published", "one")
    model.add_adapter("two", SEPConfig.published(**SETTINGS["vision only"]))
    towers = {status.name: status for status in model.get_layer_status() if status.module_type == "SEPTower"}
    assert {name.rpartition(".")[2]: status.available_adapters for name, status in towers.items()} == {
        "text_model": ["one"],
        "vision_model": ["one", "two"],
    }
    for status in towers.values():
        assert status.enabled and status.active_adapters == ["one"] and not status.merged_adapters
        assert status.requires_grad["one"] is True and status.requires_grad.get("two") in (None, False)
    status = model.get_model_status()
    assert status.adapter_model_type == "SEPModel" and status.peft_types == {"one": "SEP", "two": "SEP"}
    assert status.enabled is True and status.active_adapters == ["one"] and status.merged_adapters == []


def test_three_adapters_agree_on_the_next_active_one():
    """Each tower picks the next adapter itself; they must pick the same one, also where an adapter skips a tower."""
    model = adapted("vision only", "a")
    model.add_adapter("b", SEPConfig.published(**SETTINGS["vision only"]))
    model.add_adapter("c", SEPConfig.published(**SETTINGS["text only"]))
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert {tuple(tower.active_adapters) for tower in model.base_model.towers.values()} == {("b",)}
    assert model.get_model_status().active_adapters == ["b"]


def test_two_active_adapters_are_refused():
    model = adapted("published", "one")
    model.add_adapter("two", SEPConfig.published(**SETTINGS["published"]))
    message = r"One SEP adapter can be active at a time, but got \['one', 'two'\]. Pass a single name."
    with pytest.raises(ValueError, match=message):
        model.base_model.set_adapter(["one", "two"])
    assert model.base_model.active_adapters == ["one"]


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(call):
    model = adapted("published")
    expected = outputs(model)
    message = (
        r"A SEP adapter cannot be merged: its prompts are computed from each input, so no change of the weights can "
        r"stand for them. Keep the adapter attached, or call unload\(\) to get the base model back without it."
    )
    with pytest.raises(NotImplementedError, match=message):
        getattr(model, call)()
    assert torch.equal(outputs(model), expected)


def test_transformers_adds_an_adapter(clip_folder, own_adapters):
    clip = CLIPModel.from_pretrained(clip_folder)
    clip.add_adapter(SEPConfig.published(**SETTINGS["published"]), adapter_name="task")
    assert clip.active_adapters() == ["task"]
    perturb(clip, "task")
    changed = outputs(clip)
    clip.add_adapter(SEPConfig.published(**SETTINGS["layers"]), adapter_name="other")
    clip.set_adapter("task")
    assert torch.equal(outputs(clip), changed)
    assert set(clip.get_adapter_state_dict("task")) == set(get_peft_model_state_dict(clip, adapter_name="task"))


def test_injecting_without_a_peft_model():
    clip = inject_adapter_in_model(SEPConfig.published(**SETTINGS["published"]), make_clip())
    assert isinstance(clip, CLIPModel)
    assert all(p.requires_grad == (".sep_" in key) for key, p in clip.named_parameters())


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = get_peft_model(
        make_clip(), SEPConfig.published(**SETTINGS["published"], modules_to_save=["visual_projection"])
    )
    perturb(model)
    model.get_base_model().visual_projection.modules_to_save["default"].weight.data += 0.3
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(make_clip(), tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))


def test_autocast_adapter_dtype_false_takes_the_dtype_of_the_base():
    model = get_peft_model(make_clip().to(torch.bfloat16), SEPConfig.published(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def damaged(tmp_path, change) -> str:
    adapted("published").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    return str(tmp_path)


PROMPTS = "base_model.model.text_model.sep_prompts"
SCALE = "base_model.model.vision_model.sep_fusion.2.scale1"


def test_file_that_does_not_fit_lists_every_key(tmp_path):
    def change(state):
        del state[PROMPTS]
        state[PROMPTS + "_more"] = torch.zeros(1)
        state[SCALE] = torch.zeros(3)

    message = (
        f"the file of adapter 'default' does not fit this model and configuration; missing keys: {PROMPTS}; "
        f"unexpected keys: {PROMPTS}_more; other shapes: {SCALE} is (3,), needed is (1,)"
    )
    with pytest.raises(AdapterMismatchError) as error:
        PeftModel.from_pretrained(make_clip(), damaged(tmp_path, change))
    assert str(error.value) == message


def test_adapter_of_another_architecture_is_refused_before_the_model_changes(tmp_path):
    adapted("published").save_pretrained(tmp_path)
    clip = make_clip(vision_layers=5)
    before = snapshot(clip)
    with pytest.raises(
        ValueError, match=r"This adapter was made for another architecture: it needs .*'num_layers': 4.*"
    ):
        PeftModel.from_pretrained(clip, tmp_path)
    assert snapshot(clip) == before


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_file_cut_short_is_named(tmp_path, keep):
    adapted("published").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    clip = make_clip()
    before = snapshot(clip)
    with pytest.raises(
        Exception, match=r"adapter_model.safetensors cannot be read .* cut short or no safetensors file"
    ):
        PeftModel.from_pretrained(clip, tmp_path)
    assert snapshot(clip) == before


def test_pickled_weights_are_read_as_weights_only(tmp_path, capsys):
    """PEFT falls back to adapter_model.bin; code in it must not run."""

    class Evil:
        def __reduce__(self):
            return (print, ("this must never run",))

    adapted("published").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({PROMPTS: Evil()}, tmp_path / "adapter_model.bin")
    message = (
        f"{tmp_path / 'adapter_model.bin'} cannot be read: it is cut short or damaged, or holds more than tensors. "
        "Copy or download it again."
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        PeftModel.from_pretrained(make_clip(), tmp_path)
    assert "this must never run" not in capsys.readouterr().out


def test_importing_twice_registers_once():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import PeftType

    from sep_peft import SEPModel
    from sep_peft.tuner import registration

    registration.register(SEPConfig, SEPModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SEP] is SEPConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING["SEP"] == "sep_"
    assert PeftType("SEP") is PeftType.SEP is copy.deepcopy(PeftType.SEP)


def test_a_foreign_sep_is_reported(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from sep_peft import SEPModel
    from sep_peft.tuner import registration

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, registration.peft_type(), PeftConfig)
    with pytest.raises(ImportError, match=r"PEFT already has a method called SEP \(peft.config.PeftConfig\)"):
        registration.register(SEPConfig, SEPModel)
