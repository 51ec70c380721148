"""SEP, Self-Enhanced Prompt Tuning (arXiv 2405.15549), as a method of PEFT.

Importing this package registers the method, so that `peft.get_peft_model(model, SEPConfig())`,
`PeftModel.from_pretrained` and transformers' `load_adapter` know it.
"""

from . import registration
from .checkpoint import AdapterMismatchError
from .config import SEPConfig
from .fusion import TokenFusion
from .model import SEPModel
from .version import __version__


__all__ = ["AdapterMismatchError", "SEPConfig", "SEPModel", "TokenFusion", "__version__"]

registration.register(SEPConfig, SEPModel)
