"""``sep-peft predict``: classifies images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..classifier.classifier import SEPClassifier
from ..classifier.images import find_images, other_endings, read_image, warn_left_out
from .session import AdapterSource, Result, Session, load_classifier, warn_unreadable


def predict(
    source: AdapterSource,
    images: Sequence[str],
    session: Session,
    *,
    base_model: str | None = None,
    classes: Sequence[str] | None = None,
    zero_shot_margin: float | None = None,
    top_k: int | None = None,
    batch_size: int = 32,
    **asked: Any,
) -> Result:
    """Classify images; those that cannot be read are named, and the others classified all the same.

    Args:
        source: of the adapter.
        images: files, folders or addresses.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        classes: names in place of the trained ones.
        zero_shot_margin: for `classes`; see `SEPClassifier.set_classes`.
        top_k: classes to name for each image; None: all, but at most 5, and where an image may have several classes
            all that reach their thresholds.
        batch_size: images at a time.
        asked: `min_score`, `unknown` and `coverage`, as for `SEPClassifier.predict`.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: there are no images, or what is asked for is not allowed or not known.
    """
    paths = [path for given in images for path in _images(given)]
    if not paths:
        raise ValueError(f"There are no images in {', '.join(images)}.")
    classifier = load_classifier(source, base_model, session)
    if classes:
        classifier.set_classes(classes, zero_shot_margin=zero_shot_margin)
    if asked.get("coverage") is None and not classifier.classes.multi_label:
        top_k = top_k or min(5, len(classifier.classes))
    data = []
    for start in session.progress("batches")(range(0, len(paths), batch_size)):
        data += _predict_batch(classifier, paths[start : start + batch_size], {"top_k": top_k, **asked})
    broken = {entry["image"]: entry["error"] for entry in data if "error" in entry}
    warn_unreadable(broken)
    lines = [_prediction_line(entry) for entry in data if "error" not in entry]
    return Result(data, lines, code=1 if broken else 0)


def _images(given: str) -> list[str]:
    if not os.path.isdir(given):
        return [given]
    warn_left_out(given, other_endings(given))
    return [str(path) for path in find_images(given)]


def _predict_batch(classifier: SEPClassifier, images: list[str], asked: dict[str, Any]) -> list[dict]:
    """For each image an entry with its prediction or with what is wrong with it."""
    entries, read = [{"image": path} for path in images], []
    for entry in entries:
        try:
            read.append((entry, read_image(entry["image"])))
        except ValueError as error:
            entry["error"] = str(error)
    predictions = classifier.predict([image for _, image in read], batch_size=len(entries), **asked)
    for (entry, _), prediction in zip(read, predictions, strict=True):
        entry["prediction"] = prediction
    return entries


def _prediction_line(entry: dict) -> str:
    said = ", ".join(f"{top['label']} {top['score']:.1%}" for top in entry["prediction"])
    return f"{entry['image']}: {said or 'none of these'}"
