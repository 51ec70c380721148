"""SEP, Self-Enhanced Prompt Tuning (arXiv 2405.15549), as a method of PEFT.

Importing this package registers the method, so that `peft.get_peft_model(model, SEPConfig())`,
`PeftModel.from_pretrained` and transformers' `load_adapter` know it.
"""

from . import losses
from .classifier.card import CardDetails, Score
from .classifier.classes import TaskClasses
from .classifier.classifier import SEPClassifier, SEPClassifierOutput
from .classifier.explain import Explanation, explain
from .classifier.export import ImageEmbedder, ImageScorer
from .classifier.pipelines import ImageClassifier
from .classifier.trunk_cache import TrunkCache
from .families.spec import Architecture, TowerSpec
from .method.fusion import TokenFusion
from .tuner import registration
from .tuner.config import SEPConfig
from .tuner.convert import convert_reference_checkpoint
from .tuner.files import AdapterMismatchError, cast_adapter
from .tuner.hotswap import hotswap_adapter
from .tuner.model import SEPModel, lifted
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
