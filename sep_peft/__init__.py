"""SEP, Self-Enhanced Prompt Tuning (arXiv 2405.15549), as a method of PEFT.

Importing this package registers the method, so that `peft.get_peft_model(model, SEPConfig())`,
`PeftModel.from_pretrained` and transformers' `load_adapter` know it. The plugin is imported for that; what classifies
images and trains is imported when one of its names is used first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .requirements import check_installed


check_installed()  # before anything asks an older one for what it does not have

# ruff: noqa: E402 (imports come after the check of what is installed)
from . import losses, pipeline_tasks
from .families.spec import Architecture, TowerSpec
from .method.fusion import TokenFusion
from .method.recipe import Recipe
from .tuner import loading, registration
from .tuner.config import SEPConfig
from .tuner.convert import convert_reference_checkpoint
from .tuner.files import AdapterMismatchError, cast_adapter
from .tuner.hotswap import hotswap_adapter
from .tuner.model import SEPModel, lifted
from .tuner.strength import set_frozen_weight
from .version import __version__


if TYPE_CHECKING:
    from . import classifier as classifier
    from .classifier.card import CardDetails, ClassScore, Score
    from .classifier.classes import TaskClasses
    from .classifier.classifier import SEPClassifier, SEPClassifierOutput
    from .classifier.embeddings import max_text_length
    from .classifier.explain import explain
    from .classifier.explanation import Explanation
    from .classifier.export import ImageEmbedder, ImageScorer
    from .classifier.pipelines import ImageClassifier
    from .classifier.trunk_cache import TrunkCache
    from .training.trainer import SEPTrainer


__all__ = [
    "AdapterMismatchError",
    "Architecture",
    "CardDetails",
    "ClassScore",
    "Explanation",
    "ImageClassifier",
    "ImageEmbedder",
    "ImageScorer",
    "Recipe",
    "SEPClassifier",
    "SEPClassifierOutput",
    "SEPConfig",
    "SEPModel",
    "SEPTrainer",
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
    "max_text_length",
    "set_frozen_weight",
]

#: Name -> file that has it, imported when the name is used first.
_LATER = {
    "CardDetails": "classifier.card",
    "ClassScore": "classifier.card",
    "Explanation": "classifier.explanation",
    "ImageClassifier": "classifier.pipelines",
    "ImageEmbedder": "classifier.export",
    "ImageScorer": "classifier.export",
    "SEPClassifier": "classifier.classifier",
    "SEPClassifierOutput": "classifier.classifier",
    "SEPTrainer": "training.trainer",
    "Score": "classifier.card",
    "TaskClasses": "classifier.classes",
    "TrunkCache": "classifier.trunk_cache",
    "explain": "classifier.explain",
    "max_text_length": "classifier.embeddings",
}

registration.register(SEPConfig, SEPModel)
loading.wrap_loaders()
pipeline_tasks.register()


def __getattr__(name: str) -> Any:
    """Import what classifies images when it is used first."""
    if name == "classifier":
        return import_module(f"{__name__}.classifier")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value  # Python finds it there the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "classifier"})
