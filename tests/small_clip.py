"""Small seeded models and inputs that the tests share; nothing here touches the network."""

from __future__ import annotations

import torch
from copies import made_once
from transformers import CLIPConfig, CLIPModel


BOS, EOS = 61, 62
TEXT_POSITIONS = 20


@made_once
def make_clip(
    attention: str = "sdpa", text_layers: int = 3, vision_layers: int = 4, seed: int = 0, **text
) -> CLIPModel:
    """A CLIP of odd sizes: text 32 wide with 1 head, vision 48 wide with 3 heads, 9 patches and CLS."""
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 1,
            "vocab_size": 63,
            "max_position_embeddings": TEXT_POSITIONS,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": 0,
            **text,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 3,
            "image_size": 24,
            "patch_size": 8,
        },
        projection_dim=24,
        attn_implementation=attention,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # biases and norms away from their zeros and ones
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def make_texts(lengths: list[int], total: int | None = None, pad: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Texts of `lengths` tokens with BOS and EOS, padded on the right to `total` or to the longest."""
    generator = torch.Generator().manual_seed(seed)
    total = total or max(lengths)
    input_ids = torch.full((len(lengths), total), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        words = torch.randint(1, 60, (length - 2,), generator=generator)
        input_ids[row, :length] = torch.tensor([BOS, *words.tolist(), EOS])
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def make_images(count: int, seed: int = 2) -> torch.Tensor:
    """(count, 3, 24, 24)."""
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def perturb(model: torch.nn.Module, adapter: str = "default", scale: float = 0.1, seed: int = 3) -> None:
    """Move every parameter of an adapter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".sep_" in name and f".{adapter}" in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
