"""Private methods of PEFT that the plugin overrides or calls, as data: what a newer PEFT may move without a word.

`tests/test_peft_hooks.py` holds that this list is complete and that the installed PEFT has them; `tests/upstream/run`
reports which have moved in a release that is to come.
"""

from __future__ import annotations

import inspect
from importlib import import_module


#: "module:class" -> method -> names of its parameters, without `self` and `cls`.
HOOKS: dict[str, dict[str, tuple[str, ...]]] = {
    "peft.tuners.tuners_utils:BaseTuner": {
        "_cast_adapter_dtype": ("adapter_name", "autocast_adapter_dtype"),
        "_check_merge_allowed": (),
        "_check_target_module_exists": ("peft_config", "key"),
        "_create_and_replace": (
            "peft_config",
            "adapter_name",
            "target",
            "target_name",
            "parent",
            "current_key",
            "parameter_name",
        ),
        "_enable_adapter_layers": ("enabled",),
        "_get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
        "_get_module_names_tied_with_embedding": (),
        "_mark_only_adapters_as_trainable": ("model",),
        "_prepare_adapter_config": ("peft_config", "model_config"),
        "_prepare_model": ("peft_config", "model"),
        "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
        "_remove_adapter_name_from_key": ("key", "adapter_name"),
        "_replace_module": ("parent", "child_name", "new_module", "child"),
    },
    "peft.tuners.tuners_utils:BaseTunerLayer": {
        "_move_adapter_to_device_of_base_layer": ("adapter_name", "device"),
    },
    "peft.config:PeftConfig": {"_split_kwargs": ("kwargs",)},
    # not of the tuner's base class: PeftModel enters what the tuner has under this name around each forward
    "peft:PeftModel": {"_enable_peft_forward_hooks": ("args", "kwargs")},
}


def moved_hooks() -> list[str]:
    """What differs in the installed PEFT, a line for each; empty where all are as they were."""
    lines = []
    for place, methods in HOOKS.items():
        module, _, name = place.partition(":")
        holder = getattr(import_module(module), name, None)
        for method, expected in methods.items():
            found = getattr(holder, method, None)
            if found is None:
                lines.append(f"{place}.{method} is gone")
                continue
            parameters = tuple(name for name in inspect.signature(found).parameters if name not in ("self", "cls"))
            if parameters != expected:
                lines.append(f"{place}.{method} takes {parameters}, where it took {expected}")
    return lines
