"""Writes tests/data/open_clip: weights and outputs of tiny random models of open_clip itself.

    pip install open_clip_torch && python tests/open_clip_reference.py

`tests/test_convert_open_clip.py` compares with these numbers, so that no test needs open_clip. A torchvision for CUDA
can be imported beside a torch for the CPU, as far as open_clip needs it, once the operators that it lacks are declared.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


DATA = Path(__file__).parent / "data" / "open_clip"
TEXT = {"context_length": 12, "vocab_size": 63, "width": 16, "heads": 2, "layers": 2}
#: Name -> configuration, as open_clip reads it. They differ in whatever the conversion looks at.
MODELS = {
    "gelu": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0},
        "text_cfg": TEXT,
    },
    "custom_text": {
        "embed_dim": 8,
        "quick_gelu": True,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 24,
            "head_width": 6,
            "patch_size": 8,
            "patch_dropout": 0.5,
        },
        "text_cfg": {**TEXT, "mlp_ratio": 3.0, "heads": 4},
    },
}


def main() -> None:
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import open_clip
    from open_clip.model import CLIP, CustomTextCLIP

    DATA.mkdir(exist_ok=True)
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        options = {key: value for key, value in config.items() if key != "custom_text"}
        model = (CustomTextCLIP if config.get("custom_text") else CLIP)(**options).eval()
        for parameter in model.parameters():  # biases and norms away from their zeros and ones
            parameter.data += 0.1 * torch.randn(parameter.shape)
        size = config["vision_cfg"]["image_size"]
        image = torch.randint(0, 256, (29, 37, 3), dtype=torch.uint8)
        texts = torch.zeros(3, TEXT["context_length"], dtype=torch.int64)
        for row, length in enumerate((5, 12, 3)):
            words = torch.randint(1, 60, (length - 2,))
            texts[row, :length] = torch.tensor([61, *words.tolist(), 62])
        settings = {"size": (size, size), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
        settings["resize_mode"] = "shortest" if name == "gelu" else "squash"
        transform = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**settings), is_train=False
        )
        from PIL import Image

        pixels = transform(Image.fromarray(image.numpy()))[None]
        with torch.no_grad():
            outputs = {"image_embeds": model.encode_image(pixels), "text_embeds": model.encode_text(texts)}
        inputs = {"image": image, "pixels": pixels, "texts": texts}
        save_file({**inputs, **outputs}, DATA / f"{name}.expected.safetensors")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, DATA / f"{name}.safetensors")
        written = {"model_cfg": config, "preprocess_cfg": settings}
        (DATA / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
        print(name, open_clip.__version__, {key: tuple(value.shape) for key, value in outputs.items()})


if __name__ == "__main__":
    main()
