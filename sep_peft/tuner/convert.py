"""Checkpoints of the authors' code (https://github.com/htyao89/SEP) -> adapters.

Their trainer writes ``prompt_learner/model.pth.tar-<epoch>``: a pickled dict with the parameters of the prompt learner
under "state_dict". What it does not hold, the layers before which prompts are fused, comes from their configuration.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn

from .config import SEPConfig
from .files import AdapterMismatchError, check_numbers, is_state_dict, load_pickled, replace_files
from .model import find_towers
from .save_id import stamp_files


#: Name of the tower -> its prompts, and its list of fusion modules, in the authors' naming.
TOWERS = {"text": ("ctx", "prompt_projections"), "vision": ("ctx_visual", "visual_prompts")}

#: Entry of one of their fusion modules -> ours; the packed projection is split by `convert_fusion`.
FUSION_RENAMES = {
    "ln_pa_1_visual.weight": "norm1.weight",
    "ln_pa_1_visual.bias": "norm1.bias",
    "promt_attention_visual.out_proj.weight": "attention.output.weight",
    "promt_attention_visual.out_proj.bias": "attention.output.bias",
    "ln_pa_2_visual.weight": "norm2.weight",
    "ln_pa_2_visual.bias": "norm2.bias",
    "mlp_pa_visual.c_fc1.weight": "fc1.weight",
    "mlp_pa_visual.c_proj.weight": "fc2.weight",
    "scale1": "scale1",
    "scale2": "scale2",
}
#: Packed (3D, D) and (3D,) projections of query, key and value.
PACKED = {"promt_attention_visual.in_proj_weight": "weight", "promt_attention_visual.in_proj_bias": "bias"}


@dataclass(frozen=True)
class ConversionReport:
    """What became of a checkpoint.

    Args:
        config: of the adapter.
        output_dir: where the adapter is.
        unused: entries of the checkpoint that the adapter does not hold, by name: modules that the authors' code
            registers and never runs, the class prototypes of training, and buffers that repeat the frozen model.
        epoch: as the checkpoint says, or None.
    """

    config: SEPConfig
    output_dir: str
    unused: list[str] = field(default_factory=list)
    epoch: int | None = None


def convert_reference_checkpoint(
    checkpoint: str | os.PathLike,
    base_model: nn.Module,
    output_dir: str | os.PathLike,
    text_layers: Sequence[int] | None = None,
    vision_layers: Sequence[int] | None = None,
) -> ConversionReport:
    """Turn a checkpoint of the authors' prompt learner into an adapter with ``batch_coupled=True``.

    Their tokenizer pads with id 0 and their selection reads padding, so hand the text tower ids that are padded with 0
    (`SEPClassifier` does); its text tower must see all classes at once.

    Args:
        checkpoint: their ``model.pth.tar-N``. It is read without running any code it may contain.
        base_model: the CLIP it was trained on; it is not changed.
        output_dir: folder for the adapter.
        text_layers: layers of the text tower before which prompts are fused; None: all but the first.
        vision_layers: the same for the image tower.

    Returns:
        ConversionReport, with the entries that were not needed.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the file is no checkpoint of a prompt learner.
        AdapterMismatchError: an entry is missing or has another shape; the message names each.
    """
    data = _read(checkpoint)
    state = data["state_dict"]
    for name, (prompts, _) in TOWERS.items():
        if prompts not in state:
            raise AdapterMismatchError(f"{os.fspath(checkpoint)} lacks {prompts}, the prompts of the {name} tower.")
        if state[prompts].ndim != 2:
            shape = tuple(state[prompts].shape)
            raise AdapterMismatchError(f"{os.fspath(checkpoint)} must hold {prompts} (n, D), but its shape is {shape}.")
    config = SEPConfig.published(
        num_text_prompts=len(state["ctx"]),
        num_vision_prompts=len(state["ctx_visual"]),
        text_layers=None if text_layers is None else list(text_layers),
        vision_layers=None if vision_layers is None else list(vision_layers),
        batch_coupled=True,
    )
    model = get_peft_model(copy.deepcopy(base_model), config)
    adapter, used = convert_state_dict(state, fusion_layers(model), os.fspath(checkpoint))
    set_peft_model_state_dict(model, adapter)
    with replace_files(output_dir) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        stamp_files(temporary)
    return ConversionReport(
        config=cast(SEPConfig, model.peft_config["default"]),
        output_dir=os.fspath(output_dir),
        unused=sorted(set(state) - used),
        epoch=data.get("epoch"),
    )


def convert_state_dict(
    state: dict[str, torch.Tensor], layers: Mapping[str, tuple[str, Sequence[int]]], source: str = "the checkpoint"
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Their names -> ours.

    Args:
        state: entries of the prompt learner.
        layers: "text" and "vision" -> path of the tower, and the layers before which prompts are fused. The i-th of
            their fusion modules belongs to the i-th of these layers.
        source: for messages.

    Returns:
        the adapter's state dict, and the names of the entries that went into it.

    Raises:
        AdapterMismatchError: names every entry that is missing.
    """
    adapter, used, missing = {}, set(), []

    def take(name: str) -> torch.Tensor | None:
        if name not in state:
            missing.append(name)
            return None
        used.add(name)
        value = state[name]
        check_numbers([(name, value)], source)
        value = value.float()
        # their forward pass rounds the scales to half precision
        return value.half().float() if name.endswith(("scale1", "scale2")) else value

    for tower, (path, indices) in layers.items():
        prompts, fusions = TOWERS[tower]
        adapter[f"base_model.model.{path}.sep_prompts"] = take(prompts)
        for position, layer in enumerate(indices):
            target = f"base_model.model.{path}.sep_fusion.{layer}"
            for theirs, ours in FUSION_RENAMES.items():
                adapter[f"{target}.{ours}"] = take(f"{fusions}.{position}.{theirs}")
            for theirs, suffix in PACKED.items():
                packed = take(f"{fusions}.{position}.{theirs}")
                parts = (None, None, None) if packed is None else _thirds(packed, source, theirs)
                for name, part in zip(("query", "key", "value"), parts, strict=True):
                    adapter[f"{target}.attention.{name}.{suffix}"] = part
    if missing:
        raise AdapterMismatchError(f"{source} lacks entries that the adapter needs: {', '.join(missing)}.")
    return adapter, used


def _thirds(packed: torch.Tensor, source: str, name: str) -> tuple[torch.Tensor, ...]:
    """(3 D, ...) -> query, key and value, each (D, ...)."""
    if packed.ndim == 0 or len(packed) % 3 or not len(packed):
        shape = tuple(packed.shape)
        raise AdapterMismatchError(f"{source} must hold {name} of three equal parts, but its shape is {shape}.")
    return packed.chunk(3)


def fusion_layers(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """ "text" and "vision" -> path of the tower and the layers before which the adapter fuses."""
    found = {}
    for name, tower in find_towers(model).items():
        settings = tower.active_settings
        assert settings is not None, "a converted adapter prompts both towers"
        found[name] = (tower.spec.path, settings.fusion_layers)
    return found


def _read(checkpoint: str | os.PathLike) -> dict:
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"There is no checkpoint {os.fspath(checkpoint)}.")
    data = load_pickled(checkpoint)
    if not isinstance(data, dict) or not is_state_dict(data.get("state_dict")):
        raise ValueError(
            f'{os.fspath(checkpoint)} holds no "state_dict" of tensors, so it is no checkpoint of a prompt learner.'
        )
    return data
