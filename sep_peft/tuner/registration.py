"""The only file that touches PEFT's registries: makes "SEP" a PEFT method.

PEFT has no entry points for methods that live outside of it, and its registry accepts only members of the `PeftType`
enumeration, so a member is added before `register_peft_method` is called.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method


#: Name of the method in adapter_config.json, and the prefix of its parameters. transformers derives one from the other.
METHOD = "SEP"
PREFIX = "sep_"


def peft_type() -> PeftType:
    """The `PeftType` member of SEP, made on first use.

    A real member, because plain strings as mapping keys do not survive saving in PEFT nor `delete_adapter` in
    transformers.
    """
    if METHOD not in PeftType.__members__:
        member = str.__new__(PeftType, METHOD)
        member._name_ = METHOD
        member._value_ = METHOD
        PeftType._member_names_.append(METHOD)
        PeftType._member_map_[METHOD] = member
        PeftType._value2member_map_[METHOD] = member
        type.__setattr__(PeftType, METHOD, member)
    return PeftType[METHOD]


def register(config_cls: type, model_cls: type) -> None:
    """Register SEP with PEFT; calling it again changes nothing.

    Raises:
        ImportError: PEFT, or another plugin, already has a method of this name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if registered is None:
        register_peft_method(name=METHOD.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    elif (registered.__module__, registered.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise ImportError(
            f"PEFT already has a method called {METHOD} ({registered.__module__}.{registered.__qualname__}), so "
            "sep_peft cannot register its own. Use that one, or uninstall the package that provides it."
        )
