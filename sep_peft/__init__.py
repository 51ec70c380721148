"""SEP, Self-Enhanced Prompt Tuning (arXiv 2405.15549), as a method of PEFT.

Importing this package registers the method, so that `peft.get_peft_model(model, SEPConfig())`,
`PeftModel.from_pretrained` and transformers' `load_adapter` know it.
"""

from . import losses, registration
from .architectures import Architecture, TowerSpec
from .checkpoint import AdapterMismatchError, cast_adapter
from .classes import TaskClasses
from .classifier import SEPClassifier, SEPClassifierOutput
from .config import SEPConfig
from .convert import convert_reference_checkpoint
from .explain import Explanation, explain
from .export import ImageEmbedder, ImageScorer
from .fusion import TokenFusion
from .hotswap import hotswap_adapter
from .model import SEPModel, lifted
from .model_card import CardDetails, Score
from .pipelines import ImageClassifier
from .trunk_cache import TrunkCache
from .version import __version__


__all__ = [
    "AdapterMismatchError",
    "Architecture",
    "CardDetails",
    "Explanation",
    "ImageClassifier",
    "ImageEmbedder",
    "ImageScorer",
    "SEPClassifier",
    "SEPClassifierOutput",
    "SEPConfig",
    "SEPModel",
    "Score",
    "TaskClasses",
    "TokenFusion",
    "TowerSpec",
    "TrunkCache",
    "__version__",
    "cast_adapter",
    "convert_reference_checkpoint",
    "explain",
    "hotswap_adapter",
    "lifted",
    "losses",
]

registration.register(SEPConfig, SEPModel)
