"""The tiny CLIP with SEP in all its settings, and how a model is compared with another."""

from __future__ import annotations

import torch
from copies import made_once
from peft import PeftModel, get_peft_model
from small_clip import make_clip, make_images, make_texts, perturb

from sep_peft import SEPConfig


#: Settings that the oracle, the invariances and the lifecycle are checked with.
SETTINGS = {
    "published": {"num_text_prompts": 3, "num_vision_prompts": 4},
    "small": {
        "num_text_prompts": 3,
        "num_vision_prompts": 4,
        "fusion_rank": 4,
        "fusion_hidden_size": 16,
        "share_fusion": True,
    },
    "one prompt": {"num_text_prompts": 1, "num_vision_prompts": 1},
    "layers": {"num_text_prompts": 5, "num_vision_prompts": 2, "text_layers": [2], "vision_layers": [1, 3]},
    "start": {"num_text_prompts": 3, "num_vision_prompts": 2, "start_layer": 1},
    "rank": {"num_text_prompts": 2, "num_vision_prompts": 3, "fusion_rank": 2, "fusion_hidden_size": 5},
    "shared": {"num_text_prompts": 2, "num_vision_prompts": 3, "share_fusion": True},
    "prompted alone": {"num_text_prompts": 2, "num_vision_prompts": 2, "frozen_weight": 0.0},
    "mostly frozen": {"num_text_prompts": 2, "num_vision_prompts": 2, "frozen_weight": 0.8},
    "shallow": {"num_text_prompts": 4, "num_vision_prompts": 3, "fusion": "none", "frozen_weight": 0.0},
    "start alone": {"num_text_prompts": 3, "num_vision_prompts": 2, "start_layer": 1, "frozen_weight": 0.0},
    "independent": {
        "num_text_prompts": 3,
        "num_vision_prompts": 2,
        "fusion": "independent",
        "text_layers": [2],
        "frozen_weight": 0.3,
    },
    "random": {"num_text_prompts": 3, "num_vision_prompts": 4, "fusion_tokens": "random"},
    "mean": {"num_text_prompts": 4, "num_vision_prompts": 3, "fusion_tokens": "mean", "start_layer": 1},
    "noise": {"num_text_prompts": 2, "num_vision_prompts": 3, "fusion_tokens": "noise", "share_fusion": True},
    "vision only": {"num_text_prompts": 0, "num_vision_prompts": 3},
    "text only": {"num_text_prompts": 3, "num_vision_prompts": 0},
}

TEXTS, IMAGES = make_texts([5, 3, 9, 4]), make_images(3)


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model.eval()(**TEXTS, pixel_values=IMAGES).logits_per_image


def snapshot(model) -> tuple:
    """Everything by which a module tree can differ."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, list(model.state_dict()), [p.data_ptr() for p in model.parameters()]


@made_once
def adapted(name: str, adapter: str = "default", seed: int = 3, **sizes) -> PeftModel:
    """With SEP in one of `SETTINGS`; `sizes` are those of `make_clip`."""
    clip = make_clip(**sizes)
    torch.manual_seed(seed)
    model = get_peft_model(clip, SEPConfig.published(**SETTINGS[name]), adapter_name=adapter)
    perturb(model, adapter, seed=seed)
    return model.eval()
