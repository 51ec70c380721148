"""``sep-peft info``: says what an adapter is, from its files alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

from huggingface_hub.constants import REPOCARD_NAME

from ..classifier.card import LABEL_METRICS, METRIC, RECALL_METRIC, read_card
from ..classifier.files import MissingClassesError, load_classes
from ..tuner.config import SEPConfig
from ..tuner.files import WeightsOrigin, read_shapes
from ..tuner.find_file import find_file
from .session import AdapterSource, Result, Session


def info(source: AdapterSource, session: Session) -> Result:
    """Read an adapter's files, but neither its base model nor more of its weights than their header.

    Args:
        source: of the adapter.
        session: how to work.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is one of another method, or a file of it is missing or damaged.
    """
    options = source.hub_options(session)
    config = SEPConfig.of_adapter(source.name, source.subfolder, **options)
    weights = cast(WeightsOrigin, config.take_weights_origin()).find()  # it has just been read
    if weights is None:
        raise ValueError(f"{source.name} holds the configuration of an adapter, but no weights. Copy it again.")
    parameters = sum(shape.numel() for shape in read_shapes(weights).values())
    try:
        classes = load_classes(source.name, source.subfolder, options)
    except MissingClassesError:  # an adapter of a plain model
        classes = None
    data = {
        "adapter": source.name,
        "base_model": config.base_model_name_or_path,
        "model_type": (config.base_architecture or {}).get("model_type"),
        "text_prompts": config.num_text_prompts,
        "vision_prompts": config.num_vision_prompts,
        "fusion": config.fusion,
        "frozen_weight": config.frozen_weight,
        "batch_coupled": config.batch_coupled,
        "parameters": parameters,
        "bytes": os.path.getsize(weights),
        "classes": list(classes.names) if classes else [],
        "multi_label": bool(classes and classes.multi_label),
        "templates": list(classes.templates) if classes else [],
        "scores": _scores(source, options),
    }
    return Result(data, [f"{key.replace('_', ' '):<15}{_shown(value)}" for key, value in data.items()])


def _scores(source: AdapterSource, options: Mapping[str, Any]) -> list[dict]:
    """As the adapter's model card gives them."""
    try:
        card = read_card(find_file(source.name, REPOCARD_NAME, source.subfolder, options))
    except OSError:  # there is none
        return []
    except ValueError as error:
        warnings.warn(f"No scores are shown: {error}", stacklevel=2)
        return []
    found: dict[tuple[str, str | None], dict] = {}
    for r in getattr(card.data, "eval_results", None) or ():
        if (measure := _measure(str(r.metric_name))) is not None:
            own = found.setdefault(
                (r.dataset_name, r.dataset_split), {"dataset": r.dataset_name, "split": r.dataset_split}
            )
            own[measure] = r.metric_value
    return list(found.values())


def _measure(metric: str) -> str | None:
    """What a metric of a model card is called here; None: it is none of ours."""
    if metric.startswith(f"{RECALL_METRIC}, "):
        return f"recall {metric.removeprefix(f'{RECALL_METRIC}, ')}".replace(" ", "_")
    return {METRIC: "accuracy", **{name: measure for _, name, measure in LABEL_METRICS}}.get(metric)


def _score(score: Mapping[str, Any]) -> str:
    """On one line; several measures are named."""
    places = [str(score[key]) for key in ("dataset", "split")]
    measures = {key.replace("_", " "): value for key, value in score.items() if key not in ("dataset", "split")}
    if list(measures) == ["accuracy"]:
        return " ".join([*places, str(measures["accuracy"])])
    return " ".join([*places, ", ".join(f"{name} {value}" for name, value in measures.items())])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        items = [_score(item) if isinstance(item, dict) else str(item) for item in value]
        return "; ".join(items) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
