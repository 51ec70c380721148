"""The loaders of PEFT and transformers load an adapter of SEP whole or not at all.

They put an adapter into the model first, read its weights afterwards, and leave what they have made where reading
fails; a method has no say in that. So these three functions are wrapped. With adapters of other methods they do as they
are written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .current import Current
from .files import WeightsOrigin
from .restore import Known


#: Keyword arguments of loaders that choose a file on the Hub.
HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")


@dataclass
class Loading:
    """One call of a loader.

    Attributes:
        model: that takes the adapter in.
        origin: where the weights lie; None where they were handed in.
        key_mapping: patterns of older keys -> what stands for them, as PEFT applies them without its prefix.
        before: the model as it was; None as long as nothing of SEP has been put into it.
        made: the tuner and the name of each adapter of SEP that the call has made.
    """

    model: nn.Module
    origin: WeightsOrigin | None
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    before: Known | None = None
    made: list[tuple[Any, str]] = field(default_factory=list)

    def remember(self) -> None:
        """Keep the model as it is before the first change."""
        if self.before is None:
            self.before = Known(self.model)

    def check(self) -> None:
        """
        Raises:
            ValueError: weights that were read have gone to the meta device.
        """
        for tuner, name in self.made:
            if any(p.is_meta for tower in tuner.towers.values() for p in tower.adapter_parameters(name)):
                raise ValueError(
                    f"The base model lies on the meta device, where the weights of adapter {name!r} would be lost. "
                    "Load the base model's weights first, or pass low_cpu_mem_usage=True, which leaves those of the "
                    "adapter on the CPU."
                )


#: The call of a loader that runs in this thread.
current_loading = Current("sep_peft_current_loading")


@contextmanager
def _whole(loading: Loading) -> Iterator[None]:
    try:
        with current_loading.set(loading):
            yield
        loading.check()
    except BaseException:
        if loading.before is not None:
            loading.before.restore()
        raise


def wrap_loaders() -> None:
    """Wrap them, once."""
    if not hasattr(PeftModel.load_adapter, "__wrapped__"):
        from_pretrained = _wrapped(PeftModel.from_pretrained.__func__, _start_from_pretrained)
        # pyright sees the signature of the method in place of its descriptor
        PeftModel.from_pretrained = classmethod(from_pretrained)  # pyright: ignore[reportAttributeAccessIssue]
        PeftModel.load_adapter = _wrapped(PeftModel.load_adapter, _start_load_adapter)
        PeftAdapterMixin.load_adapter = _wrapped(PeftAdapterMixin.load_adapter, _start_of_transformers, _finish)


def _wrapped(
    load: Callable, start: Callable[[dict], Loading], finish: Callable[[Loading, dict, Any], None] | None = None
) -> Callable:
    signature = inspect.signature(load)

    @wraps(load)
    def loader(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return load(*args, **kwargs)  # which says what is wrong
        if current_loading.get() is not None:  # a loader that another one has called
            return load(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments | bound.arguments.get("kwargs", {})
        loading = start(arguments)
        with _whole(loading):
            result = load(*args, **kwargs)
            if finish is not None:
                finish(loading, arguments, result)
        return result

    return loader


def _start_from_pretrained(arguments: dict) -> Loading:
    model = arguments["model"]
    mapping = arguments["key_mapping"]
    mapping = getattr(model, "_checkpoint_conversion_mapping", {}) if mapping is None else mapping
    loading = Loading(model, _origin(arguments["model_id"], arguments), mapping)
    if hasattr(model, "hf_device_map"):  # PEFT takes accelerate's hooks off before it does anything else
        loading.remember()
    return loading


def _start_load_adapter(arguments: dict) -> Loading:
    return Loading(arguments["self"], _origin(arguments["model_id"], arguments), arguments["key_mapping"] or {})


def _start_of_transformers(arguments: dict) -> Loading:
    handed_in = arguments["adapter_state_dict"] is not None or arguments["peft_model_id"] is None
    load_config = arguments["load_config"]
    options = {} if load_config is None else dict(load_config.download_kwargs)
    options |= arguments | (arguments["adapter_kwargs"] or {})
    return Loading(arguments["self"], None if handed_in else _origin(arguments["peft_model_id"], options))


def _finish(loading: Loading, arguments: dict, report: Any) -> None:
    """transformers renames keys by rules of the base model, which may hit keys of SEP, and warns of those it misses."""
    for _, name in loading.made:
        origin, state = loading.origin, arguments["adapter_state_dict"]
        if origin is not None:
            state = load_peft_weights(origin.path, device="cpu", subfolder=origin.subfolder, **origin.hub_options)
        if state is not None:
            set_peft_model_state_dict(loading.model, state, name)
            for keys in (report.missing_keys, report.unexpected_keys):
                keys.clear()


def _origin(path: Any, options: Mapping[str, Any]) -> WeightsOrigin:
    hub_options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    return WeightsOrigin(str(path), options.get("subfolder"), hub_options, {}, True)
