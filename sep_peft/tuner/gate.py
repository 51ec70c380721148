"""The one gate of all loaders: an adapter's weights are compared with its configuration before a model changes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..families.spec import Architecture
from .checks import base_tower, modules_to_save, target_towers
from .config import SEPConfig
from .files import AdapterMismatchError, check_keys, check_numbers, read_shapes, read_tensors
from .layer_fusions import fusion_keys, new_fusion
from .loading import Loading
from .registration import PREFIX
from .settings import TowerSettings
from .wrappers import layer_lists


#: What PEFT puts before the keys of an adapter file.
KEY_PREFIX = "base_model.model."


def check_weights(
    config: SEPConfig, architecture: Architecture, model: nn.Module, adapter_name: str, loading: Loading | None = None
) -> None:
    """Check the weights that lie beside a configuration, where it was read from a file; the model stays as it is.

    Names and shapes come first, from the header alone, so that nothing of a wrong size is ever allocated.

    Args:
        config: passed `checks.check_config`.
        architecture: of the model.
        model: into which the weights will be loaded.
        adapter_name: for messages.
        loading: the call that loads the adapter; None where its configuration alone is used.

    Raises:
        AdapterMismatchError: a key is missing, unexpected or of another shape.
        SafetensorError: the file is cut short.
        ValueError: there are no weights, or numbers that are not finite or far too large.
    """
    origin, key_mapping = config.take_weights_origin(), {}
    if loading is not None:
        origin, key_mapping = loading.origin, loading.key_mapping
    if origin is None:
        return
    file = origin.find()
    if file is None:
        if loading is None and not (config.inference_mode or origin.frozen):  # options for a new adapter
            return
        raise ValueError(
            f"{origin.path} holds the configuration of an adapter, but no weights. Copy or download it again; for a "
            "new adapter with these options, set inference_mode to false in it and use get_peft_model."
        )
    source = f"the file of adapter {adapter_name!r}"
    found = {_plain(_renamed(key, key_mapping)): shape for key, shape in read_shapes(file).items()}
    check_entries(found, expected_shapes(config, architecture, model), model, source)
    check_numbers(read_tensors(file), source)


def check_entries(
    found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], model: nn.Module, source: str
) -> None:
    """`check_keys`, where weights of the base model are called that.

    Args:
        found: key -> shape of what a file holds.
        expected: key -> shape of what the adapter needs.
        model: with the adapter or without it.
        source: for messages.

    Raises:
        AdapterMismatchError: the file holds weights of the base model, or a key is missing, unexpected or of another
            shape.
    """
    if unexpected := set(found) - set(expected):
        names = (name for name, _ in model.named_parameters(remove_duplicate=False) if PREFIX not in name)
        of_base = set(map(_plain, names))
        if taken := sorted(key for key in unexpected if _plain(key) in of_base):
            raise AdapterMismatchError(
                f"{source} holds weights of the base model, {len(taken)} in all, such as {taken[0]}. PEFT saves "
                "embeddings with an adapter where save_embedding_layers=True or the vocabulary was resized; loaded, "
                "they would change the model for all its adapters. Save the adapter again with "
                "save_embedding_layers=False; a base model that was changed is saved by itself, with its own "
                "save_pretrained."
            )
    check_keys(found, expected, source)


def expected_shapes(config: SEPConfig, architecture: Architecture, model: nn.Module) -> dict[str, torch.Size]:
    """Key -> shape of everything that an adapter file for this configuration holds."""
    shapes: dict[str, torch.Size] = {}
    for path, modality in target_towers(config, architecture).items():
        spec = architecture.towers[modality]
        if spec.refused is not None or not config.prompts_of(modality):
            continue
        tower = base_tower(model, spec)
        width = getattr(tower.config, spec.hidden_size)
        settings = TowerSettings.from_config(config, modality, sum(map(len, layer_lists(tower, spec.layers))))
        shapes[f"{KEY_PREFIX}{path}.sep_prompts"] = torch.Size([settings.num_prompts, width])
        if keys := fusion_keys(settings):
            fusion = new_fusion(config, modality, width, device="meta").state_dict()
            shapes |= {f"{KEY_PREFIX}{path}.sep_fusion.{key}.{n}": v.shape for key in keys for n, v in fusion.items()}
    for path, module in modules_to_save(config, model).items():
        shapes |= {_plain(f"{KEY_PREFIX}{path}.{key}"): value.shape for key, value in module.state_dict().items()}
    return shapes


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    """A key of a file as PEFT renames it by `key_mapping`: by the first pattern that is found, without the prefix."""
    bare = key.removeprefix(KEY_PREFIX)
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, bare)
        if count:
            return KEY_PREFIX + renamed
    return key


def _plain(key: str) -> str:
    """A key under which a module is found whether something wraps it or not."""
    return KEY_PREFIX + key.removeprefix(KEY_PREFIX).replace("base_layer.", "")
