"""Turn a checkpoint of open_clip into a folder that transformers, and so sep_peft, load as a CLIPModel.

    python examples/convert_open_clip.py epoch_32.pt --config ViT-B-32.json --output my-clip

CHECKPOINT is what open_clip's training wrote, or `open_clip_pytorch_model.bin` or `open_clip_model.safetensors` of a
repository on the Hub. The configuration is that repository's `open_clip_config.json`, or the model's file in
`model_configs` of open_clip. Models of open_clip's own image and text transformer are converted; what has another
tower, another tokenizer or an option that CLIPModel does not have is refused by name. open_clip is not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from sep_peft.tuner.files import is_state_dict, load_pickled


#: Name in open_clip -> name in transformers, as patterns of which the first one that fits a whole name is taken; "T "
#: before it: the matrix is transposed.
NAMES = {
    r"logit_scale": "logit_scale",
    r"visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"visual\.conv1\.(weight)": r"vision_model.embeddings.patch_embedding.\1",
    r"visual\.ln_pre\.(\w+)": r"vision_model.pre_layrnorm.\1",
    r"visual\.ln_post\.(\w+)": r"vision_model.post_layernorm.\1",
    r"visual\.proj": "T visual_projection.weight",
    r"visual\.transformer\.resblocks\.(.+)": r"vision_model.encoder.layers.\1",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"token_embedding\.(weight)": r"text_model.embeddings.token_embedding.\1",
    r"ln_final\.(\w+)": r"text_model.final_layer_norm.\1",
    r"text_projection": "T text_projection.weight",
    r"text_projection\.(weight)": r"text_projection.\1",
    r"transformer\.resblocks\.(.+)": r"text_model.encoder.layers.\1",
}
#: The same inside of a layer; a name with {} stands for three tensors, one below the other, in this order.
LAYER_NAMES = {
    r"ln_1\.": "layer_norm1.",
    r"ln_2\.": "layer_norm2.",
    r"mlp\.c_fc\.": "mlp.fc1.",
    r"mlp\.c_proj\.": "mlp.fc2.",
    r"attn\.out_proj\.": "self_attn.out_proj.",
    r"attn\.in_proj_": "self_attn.{}_proj.",
}
STACKED = ("q", "k", "v")
#: Key in open_clip's configuration -> in transformers'; heads of the image tower are its width over its head_width.
VISION = {"layers": "num_hidden_layers", "width": "hidden_size", "patch_size": "patch_size", "image_size": "image_size"}
TEXT = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
TEXT |= {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
#: What open_clip has where a configuration does not say it.
VISION_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT_DEFAULTS = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}
#: Options that change nothing of what a model answers, and values of others with which CLIPModel is the same.
WITHOUT_EFFECT = {"patch_dropout", "output_tokens", "hf_model_pretrained", "timm_model_pretrained", "custom_text"}
WITHOUT_EFFECT |= {"pad_id", "eos_id"}  # of which models that pool where the id is highest read neither
SAME: dict[str, Any] = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "block_type": (None, "default"),
    "proj_type": ("linear",),
}
#: mean and std of images where the configuration has none.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: Whose tokenizer is open_clip's own.
TOKENIZER = "openai/clip-vit-base-patch32"


def main() -> None:
    args = parse_arguments()
    try:
        settings = json.loads(args.config.read_text(encoding="utf-8"))
        config = clip_config(settings.get("model_cfg", settings))
        images = image_processor(settings.get("preprocess_cfg", {}), config.vision_config.image_size)
        model = CLIPModel(config)
        state = clip_state(read_checkpoint(args.checkpoint))
        check_fit(state, model.state_dict())
        model.load_state_dict(state)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        check_tokenizer(tokenizer, config)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    model.save_pretrained(args.output)
    CLIPProcessor(images, tokenizer).save_pretrained(args.output)
    print(f"wrote {args.output}: {model.num_parameters() / 1e6:.1f} million parameters, and a processor")


# configuration


def clip_config(model: Mapping[str, Any]) -> CLIPConfig:
    """The configuration of transformers for one of open_clip.

    Raises:
        ValueError: the model is none that CLIPModel is; names the option and its value.
    """
    model = dict(model)
    vision, text = (dict(model.pop(key, {})) for key in ("vision_cfg", "text_cfg"))
    size, quick = model.pop("embed_dim", None), model.pop("quick_gelu", False)
    if not isinstance(size, int):
        raise ValueError(f"The configuration needs embed_dim, a whole number, but has {size!r}.")
    activation = {"hidden_act": "quick_gelu" if quick else "gelu"}
    vision_options, text_options = tower(vision, VISION_DEFAULTS, VISION), tower(text, TEXT_DEFAULTS, TEXT)
    heads, rest = divmod(vision_options["hidden_size"], {**VISION_DEFAULTS, **vision}["head_width"])
    if rest:
        raise ValueError("vision_cfg has a width that is no multiple of its head_width.")
    refuse("vision_cfg.", {k: v for k, v in vision.items() if k not in VISION_DEFAULTS})
    refuse("text_cfg.", {k: v for k, v in text.items() if k not in TEXT_DEFAULTS})
    refuse("", model)
    end = text_options["vocab_size"] - 1  # open_clip pools where the id is highest, at the first such token
    return CLIPConfig(
        projection_dim=size,
        text_config={
            **text_options, **activation, "projection_dim": size, "bos_token_id": end - 1, "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**vision_options, **activation, "projection_dim": size, "num_attention_heads": heads},
    )  # fmt: skip


def tower(given: Mapping[str, Any], defaults: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What transformers calls a tower's sizes."""
    sizes = {**defaults, **{key: value for key, value in given.items() if key in defaults}}
    for key, value in sizes.items():
        if not isinstance(value, (int, float)) or value <= 0 or (key != "mlp_ratio" and value != int(value)):
            raise ValueError(f"The configuration has {key} {value!r}, which CLIPModel does not take.")
    return {
        **{name: sizes[key] for key, name in names.items()},
        "intermediate_size": int(sizes["width"] * sizes["mlp_ratio"]),
    }


def refuse(place: str, options: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: one of the options makes another model than CLIPModel.
    """
    for key, value in options.items():
        same = value in SAME[key] if key in SAME else not value
        if key not in WITHOUT_EFFECT and not same:
            raise ValueError(
                f"The configuration has {place}{key} {value!r}, which transformers' CLIPModel does not have. Look for "
                "this model in transformers' format on the Hub; SigLIP, for one, is there as SiglipModel."
            )


def image_processor(settings: Mapping[str, Any], image_size: int) -> CLIPImageProcessor:
    """What resizes and normalizes images, as `preprocess_cfg` has it."""
    modes = {"shortest": True, "squash": False}
    resize, filters = settings.get("resize_mode", "shortest"), {"bicubic": 3, "bilinear": 2}
    interpolation = settings.get("interpolation", "bicubic")
    for key, value, known in (("resize_mode", resize, modes), ("interpolation", interpolation, filters)):
        if value not in known:
            raise ValueError(f"preprocess_cfg has {key} {value!r}, but {', '.join(known)} are known.")
    size: dict[str, int] = {"shortest_edge": image_size}
    if not modes[resize]:
        size = {"height": image_size, "width": image_size}
    return CLIPImageProcessor(
        size=size,
        crop_size=image_size,
        do_center_crop=modes[resize],
        resample=filters[interpolation],
        image_mean=settings.get("mean", MEAN),
        image_std=settings.get("std", STD),
    )


def check_tokenizer(tokenizer: Any, config: CLIPConfig) -> None:
    """
    Raises:
        ValueError: its texts do not end in the id at which the model pools.
    """
    end = config.text_config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise ValueError(
            f"The model ends texts with the id {end}, but the tokenizer with {tokenizer.eos_token_id}. Pass the "
            "--tokenizer that it was trained with."
        )


# weights


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file, without what training keeps beside them; no code of it runs.

    Raises:
        ValueError: it holds no tensors by name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    data = load_pickled(path)
    data = data.get("state_dict", data) if isinstance(data, dict) else data
    if not is_state_dict(data):
        raise ValueError(f"{path} holds no weights by name.")
    return data


def clip_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of transformers.

    Raises:
        ValueError: names one that CLIPModel does not have.
    """
    found: dict[str, torch.Tensor] = {}
    for given, tensor in state.items():
        name = given.removeprefix("module.")  # of DistributedDataParallel
        name = name.removeprefix("text.")  # where the text tower is a module of its own
        if name == "attn_mask":
            continue
        found |= renamed(given, name, tensor)
    return found


def renamed(given: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    for pattern, target in NAMES.items():
        if match := re.fullmatch(pattern, name):
            new = match.expand(target.removeprefix("T "))
            break
    else:
        raise ValueError(f"The checkpoint has {given!r}, which transformers' CLIPModel does not have.")
    if target.startswith("T "):
        return {new: tensor.T.contiguous()}
    for pattern, inner in LAYER_NAMES.items():
        new = re.sub(rf"(?<=layers\.)(\d+)\.{pattern}", rf"\1.{inner}", new)
    if "{}" not in new:
        return {new: tensor}
    parts = tensor.chunk(len(STACKED))  # (3 D, ...) -> 3 x (D, ...)
    return {new.format(part): each.clone() for part, each in zip(STACKED, parts, strict=True)}


def check_fit(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: names that are missing or not expected, or tensors of another shape.
    """
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, needed is {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"The checkpoint does not fit the configuration: {'; '.join(problems[:5])}{more}.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a .pt, .bin or .safetensors of open_clip")
    parser.add_argument("--config", type=Path, required=True, help="open_clip_config.json, or a file of model_configs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--tokenizer", default=TOKENIZER, help=f"a folder or an id on the Hub; default: {TOKENIZER}")
    args = parser.parse_args()
    if args.output.exists() and (not args.output.is_dir() or os.listdir(args.output)):
        parser.error(f"{args.output} is there already; choose another --output, or empty it")
    return args


if __name__ == "__main__":
    main()
