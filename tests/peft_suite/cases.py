"""PEFT's generic tuner tests over a tiny CLIP. Started by `run.py`, which makes `peft_tests` importable.

The tests and their assertions are PEFT's, untouched. `model(**inputs)[0]`, which they look at, are CLIP's logits.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from sep_peft import SEPConfig


pytest.register_assert_rewrite("peft_tests.testing_common")

from peft_tests import testing_utils  # noqa: E402 (after the line that makes failed assertions show their values)
from peft_tests.testing_common import PeftCommonTester  # noqa: E402


BOS, EOS, IMAGE_SIZE = 98, 99, 24
PROMPTS = {"num_text_prompts": 2, "num_vision_prompts": 2}

METHODS = [
    # weights that change the output from the start, as PEFT's tests of unload and disable_adapter ask for
    pytest.param(LoraConfig, {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}, id="lora"),
    pytest.param(SEPConfig, PROMPTS, id="sep"),
    pytest.param(SEPConfig, PROMPTS | {"fusion_rank": None, "share_fusion": False}, id="sep_published_fusion"),
    pytest.param(SEPConfig, PROMPTS | {"fusion": "none"}, id="sep_no_fusion"),
    pytest.param(SEPConfig, PROMPTS | {"start_layer": 1}, id="sep_start_layer"),
]

#: Names of PEFT's tests, with the arguments beside model and configuration.
TESTS = [
    ("model_attr", {}),
    ("adapter_name", {}),
    ("load_model_low_cpu_mem_usage", {}),
    ("save_pretrained", {"safe_serialization": True}),
    ("save_pretrained", {"safe_serialization": False}),
    ("save_pretrained_selected_adapters", {"safe_serialization": True}),
    ("save_pretrained_selected_adapters", {"safe_serialization": False}),
    ("save_pretrained_adapter_name_substring", {}),
    ("from_pretrained_config_construction", {}),
    ("load_multiple_adapters", {}),
    ("add_adapter_no_autocast_adapter_dtype", {"dtype": torch.float16}),
    ("add_adapter_no_autocast_adapter_dtype", {"dtype": torch.bfloat16}),
    ("training", {}),
    ("training_gradient_checkpointing", {"use_reentrant": True}),
    ("training_gradient_checkpointing", {"use_reentrant": False}),
    ("inference_safetensors", {}),
    ("peft_model_device_map", {}),
    ("delete_adapter", {}),
    ("delete_inactive_adapter", {}),
    ("delete_unknown_adapter_raises", {}),
    ("unload_adapter", {}),
    ("get_base_model_state_dict", {}),
]

#: PEFT's tests that are not run, with the reason.
LEFT_OUT = {
    "merge_layers": "merging: SEP's prompts depend on the input, so no weight can take them up",
    "merge_layers_fp16": "merging",
    "merge_layers_is_idempotent": "merging",
    "merge_layers_multi": "merging",
    "merge_layers_nan": "merging",
    "safe_merge": "merging",
    "lora_conversion": "for methods that add to weights; it reads hidden_states, which CLIPModel does not return",
    "mixed_adapter_batches": "for LoRA and RoAd only, and calls generate()",
    "generate": "CLIPModel has no generate()",
    "generate_half_prec": "CLIPModel has no generate()",
    "generate_pos_args": "CLIPModel has no generate()",
    "generate_with_mixed_adapter_batches_and_beam_search": "CLIPModel has no generate()",
    "prepare_for_training": "CLIPModel has no get_input_embeddings()",
    "passing_input_embeds_works": "CLIPModel takes no inputs_embeds",
    "training_layer_indexing": "for methods with layers_to_transform, which SEPConfig does not have",
    "training_prompt_learning_tasks": "for the prompt methods inside PeftModel, which have a prompt_encoder",
    "adding_multiple_adapters_with_bias_raises": "for methods with bias, which SEPConfig does not have",
    "weighted_combination_of_adapters": "for LoRA and IA3 only",
    "weighted_combination_of_adapters_lora": "a part of the one above",
    "weighted_combination_of_adapters_ia3": "a part of the one above",
}


class CLIPWithScores(CLIPModel):
    """A CLIP for `_test_disable_adapter`, which compares the scores of generate(), as every `PeftModel` has one."""

    def generate(self, return_dict_in_generate, output_scores, **inputs):
        return SimpleNamespace(scores=[self(**inputs).logits_per_image])


@pytest.fixture(scope="module")
def model_id(tmp_path_factory) -> str:
    """Path of a tiny CLIP, three layers in each tower."""
    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **size, vocab_size=100, max_position_embeddings=16, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS
    )
    vision = CLIPVisionConfig(**size, image_size=IMAGE_SIZE, patch_size=8)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    CLIPModel(config).save_pretrained(folder)
    # PEFT's tests go online for a model that they have not seen before; this one counts as seen.
    testing_utils._HUB_MODEL_ACCESSES[str(folder)] = 1
    return str(folder)


def test_every_test_is_accounted_for():
    """A new version of PEFT may bring new tests: each one belongs into `TESTS` or, with a reason, into `LEFT_OUT`."""
    present = {name.removeprefix("_test_") for name in dir(PeftCommonTester) if name.startswith("_test_")}
    assert present == {name for name, _ in TESTS} | {"disable_adapter"} | set(LEFT_OUT)


@pytest.mark.parametrize("config_cls, config_kwargs", METHODS)
class TestCLIP(PeftCommonTester):
    """Every test of `TESTS` with every method of `METHODS`."""

    transformers_class = CLIPModel

    @pytest.fixture(autouse=True)
    def seed(self):
        """The weights of adapters are random."""
        torch.manual_seed(0)

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        """Two texts of different length and two images, always the same."""
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "input_ids": torch.tensor([[BOS, 1, 2, 3, EOS], [BOS, 4, EOS, EOS, EOS]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
            "pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        }
        return {name: tensor.to(self.torch_device) for name, tensor in inputs.items()}

    @pytest.mark.parametrize(
        "name, options", [pytest.param(*test, id="-".join(map(str, [test[0], *test[1].values()]))) for test in TESTS]
    )
    def test_generic(self, name, options, model_id, config_cls, config_kwargs):
        getattr(self, f"_test_{name}")(model_id, config_cls, config_kwargs.copy(), **options)

    def test_disable_adapter(self, model_id, config_cls, config_kwargs, monkeypatch):
        monkeypatch.setattr(self, "transformers_class", CLIPWithScores)
        self._test_disable_adapter(model_id, config_cls, config_kwargs.copy())
