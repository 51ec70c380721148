"""``sep-peft export``: writes an adapter with its base model into one file that others run without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..classifier.classifier import SEPClassifier
from ..classifier.export_file import Exported, check_target, export_file, metadata_path
from ..classifier.images import find_images
from ..classifier.preprocessing import made_images
from ..training.folders import find_parts
from ..tuner.config import SEPConfig
from ..tuner.messages import shown
from ..words import counted
from .session import AdapterSource, Result, Session, check_images, load_adapter, load_classifier


#: What a classifier that was loaded calls its own adapter.
DEFAULT = "default"
#: Images of a folder that a file is checked with, at most; they are taken from all of it.
CHECKED_IMAGES = 512


def export(
    adapters: Sequence[str],
    output: Path,
    source: AdapterSource,
    session: Session,
    *,
    base_model: str | None = None,
    embed: bool = False,
    whiten: bool = False,
    quantize: str | None = None,
    images: Path | None = None,
) -> Result:
    """Write one adapter, or several of one base model, into a file, and compare it with the model.

    Args:
        adapters: folders or names on the Hub.
        output: a .onnx or .pt2.
        source: where on the Hub each of them is.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapters name.
        embed: give out embeddings in the place of scores.
        whiten: whitened ones, of one adapter, which compare with images alone.
        quantize: "int8" for weights of 8 bits; None: as they are.
        images: folder of images to compare with; their folders may have the names of classes. None: made ones.

    Raises:
        FileNotFoundError: there is no such adapter.
        NotADirectoryError: there is no folder `images`.
        ImportError, OSError, RuntimeError: as `export_file`; what is wrong with `output` is found out first.
        ValueError: as there; or two adapters have one name or different base models, or `quantize` comes without
            `images`.
    """
    if quantize is not None and images is None:
        raise ValueError("--quantize needs --images FOLDER, on which it is measured what it costs.")
    check_target(output, quantize)
    paths = [] if images is None else _checked(images, session)
    sources = [replace(source, name=name) for name in adapters]
    names = _names(adapters)
    if base_model is None:
        _check_bases(sources, session)
    if len(adapters) == 1:
        tasks, load = None, load_adapter if embed else load_classifier  # embeddings need no classes
        classifier = load(sources[0], base_model, session)
    else:
        tasks, classifier = names, _with_tasks(sources, names, base_model, session)
    options = {"embed": embed, "whiten": whiten, "quantize": quantize}
    found = export_file(output, classifier, paths or made_images(), tasks=tasks, **options)
    return _result(found, paths)


def _with_tasks(
    sources: Sequence[AdapterSource], names: Sequence[str], base_model: str | None, session: Session
) -> SEPClassifier:
    """A classifier that has all adapters as tasks; one that is called as a classifier's own is its own."""
    own = names.index(DEFAULT) if DEFAULT in names else 0
    classifier = load_classifier(sources[own], base_model, session)
    classifier.add_task(names[own], classifier.classes, DEFAULT)
    for index, (each, name) in enumerate(zip(sources, names, strict=True)):
        if index != own:
            classifier.load_task(each.name, name, subfolder=each.subfolder, **each.hub_options(session))
    return classifier


def _checked(folder: Path, session: Session) -> list[Path]:
    """Images of test/ below a folder, else of val/, else of all of it, that can be read."""
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}.")
    parts = find_parts(folder)
    every = find_images(parts.get("test") or parts.get("val") or folder)
    some = every[:: max(1, -(-len(every) // CHECKED_IMAGES))]
    samples, _ = check_images([(path, path.parent.name) for path in some], session)
    if not samples:
        raise ValueError(f"{str(folder)!r} holds no image that can be read.")
    return [Path(path) for path, _ in samples]


def _names(adapters: Sequence[str]) -> list[str]:
    """The last part of each adapter's place, which its output is called."""
    names = [Path(name).resolve().name if Path(name).is_dir() else name.rpartition("/")[2] for name in adapters]
    if len(set(names)) < len(names):
        raise ValueError(f"Outputs are named after adapters, but two have one name: {', '.join(names)}. Rename one.")
    return names


def _check_bases(sources: Sequence[AdapterSource], session: Session) -> None:
    """
    Raises:
        ValueError: two adapters name different base models.
    """
    bases = {
        each.name: SEPConfig.of_adapter(each.name, each.subfolder, **each.hub_options(session)).base_model_name_or_path
        for each in sources
    }
    first = sources[0].name
    for name, base in bases.items():
        if base != bases[first]:
            raise ValueError(
                f"Adapters share one base model, but {first} names {shown(bases[first])} and {name} {shown(base)}. "
                "Where these are the same, pass --base-model."
            )


def _result(found: Exported, paths: Sequence[Path]) -> Result:
    labels = {each["name"]: each.get("labels", []) for each in found.metadata["outputs"]}
    accuracies = {
        name: accuracy
        for name, names in labels.items()
        if (accuracy := _accuracies(names, paths, found.scores[name], found.model_scores[name])) is not None
    }
    images = counted(found.images, "image" if paths else "made image") + (
        "" if paths else "; pass --images to take your own"
    )
    beside = metadata_path(found.path).name
    lines = [
        f"wrote {found.path} ({found.bytes / 1e6:.1f} MB), {', '.join(labels)}; {beside} says how to use it",
        f"largest difference from the model: {found.difference:.1e}, on {images}",
    ]
    if found.quantized_difference is not None:
        lines.append(f"largest difference with weights of 8 bits: {found.quantized_difference:.1e}")
        lines += [f"{name}: {share:.1f} % have the same best class" for name, share in found.agreement.items()]
    lines += [
        f"{name}: accuracy {accuracy:.1f} %, of the model {before:.1f} %, on {counted(count, 'image')} of its classes"
        for name, (accuracy, before, count) in accuracies.items()
    ]
    data = {
        "file": str(found.path),
        "bytes": found.bytes,
        "metadata": found.metadata,
        "images": found.images,
        "difference": found.difference,
        "quantized_difference": found.quantized_difference,
        "agreement": found.agreement,
        "accuracy": {
            name: {"file": accuracy, "model": before, "images": count}
            for name, (accuracy, before, count) in accuracies.items()
        },
    }
    return Result(data, lines)


def _accuracies(
    names: Sequence[str], paths: Sequence[Path], scores: torch.Tensor, model_scores: torch.Tensor
) -> tuple[float, float, int] | None:
    """In percent, of the file and of the model, and on how many images whose folder is a class; None where none is.

    Args:
        names: of C classes.
        paths: of N images.
        scores, model_scores: (N, C).
    """
    known = [(row, names.index(path.parent.name)) for row, path in enumerate(paths) if path.parent.name in names]
    if not known:
        return None
    rows, labels = map(torch.tensor, zip(*known, strict=True))
    right = [(each[rows].argmax(dim=1) == labels).double().mean().item() for each in (scores, model_scores)]
    return 100 * right[0], 100 * right[1], len(known)
