"""`export_file`: an adapter with its base model in one file that strangers run without this package."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft import PeftModel
from transformers import ImageProcessingMixin

from ..tuner.current import chosen_adapters
from ..tuner.disk import try_folder
from ..tuner.files import replace_files
from ..tuner.messages import shown
from ..tuner.modes import evaluating
from ..version import __version__
from ..words import counted
from .answers import Answers
from .export import ImageEmbedder, ImageScorer, ImageTasks
from .files import base_model_name
from .images import read_image
from .onnx_file import OnnxModel, check_packages, quantize_onnx, quietly, write_onnx
from .prediction import check_answers
from .preprocessing import Preprocessing
from .processors import processor_part
from .whitened import Whitening, check_whitening


if TYPE_CHECKING:
    from .adapter import Adapter
    from .classifier import SEPClassifier


#: Version of the layout of what a file says of itself.
FORMAT_VERSION = 1
#: What a file calls its input.
INPUT = "pixel_values"
#: Endings of the files that are written.
ENDINGS = (".onnx", ".pt2")
#: Where it lies in a .pt2, and beside any file, so that it can be read without reading the file.
METADATA_FILE = "sep_peft.json"
#: Scores and entries of embeddings of a file and of the model differ by no more.
LARGEST_DIFFERENCE = 1e-3
#: Images that are computed at a time while a file is checked.
BATCH_SIZE = 16


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it compares with the model on the images that it was checked with.

    Args:
        path: of the file.
        metadata: what it says of itself.
        bytes: its size.
        difference: the largest of any output, before the weights were made 8 bits.
        images: how many images it was checked with.
        quantized_difference: the same of the file, where its weights are of 8 bits; None: they are as they were.
        agreement: of each output of scores, the share of images whose best class is the model's, in percent.
        scores: of each output, what the file gives, (N, C) or (N, E).
        model_scores: the same of the model.
    """

    path: Path
    metadata: dict[str, Any]
    bytes: int
    difference: float
    images: int
    quantized_difference: float | None
    agreement: dict[str, float]
    scores: dict[str, torch.Tensor]
    model_scores: dict[str, torch.Tensor]


def metadata_path(path: Path) -> Path:
    """The file beside an exported one that holds what it says of itself."""
    return path.with_name(path.name + ".json")


def export_file(
    path: str | os.PathLike,
    classifier: SEPClassifier | Adapter,
    images: Sequence[Any],
    *,
    tasks: Sequence[str] | None = None,
    embed: bool = False,
    whiten: bool = False,
    quantize: str | None = None,
) -> Exported:
    """Write a classifier, or several of its tasks, as one graph from pixels to scores, or to embeddings.

    The file says of itself what is needed to use it: labels, templates, calibration and what to do with an image before
    the model sees it; ``FILE.json`` beside it says the same. It is checked with images before it takes its place: an
    error leaves what was there.

    Args:
        path: a .onnx, or a .pt2 of torch.export.
        classifier: its present classes, with the active adapter; or an adapter without classes, of which there are
            embeddings alone. Weights are written in fp32, and the classifier is
            left on the CPU in fp32.
        images: as `read_image` takes them, to check the file with, and to quantize it.
        tasks: of the classifier, each an output by its name; the frozen pass is run once for all. None: the
            classifier's own classes, whose output is "scores", or "embeds".
        embed: give out embeddings, of unit length, in the place of scores.
        whiten: by the whitening of the adapter, to compare with images alone; without `tasks`, and with `embed`.
        quantize: "int8" for weights of 8 bits in a .onnx; None: as they are.

    Raises:
        ImportError: a package for ONNX is missing.
        OSError: nothing can be written at `path`; found out before the export.
        ValueError: `path` has another ending, there are no images, one cannot be read, there are no classes to score,
            or none with a calibration where an image may have several, `quantize` is unknown or not for this file,
            there is no such task or none at all, one is called as the input, a file could not tell what the image
            processor does, or `whiten` is not for embeddings of one adapter that has a whitening.
        RuntimeError: the file gives something else than the model.
    """
    path = Path(path)
    check_target(path, quantize)
    if not len(images):
        raise ValueError("There are no images to check the file with.")
    if not (embed and tasks is None) and not hasattr(classifier, "classes"):
        raise ValueError("An adapter without classes has no scores. Pass embed=True, or a classifier.")
    if whiten and not (embed and tasks is None):
        raise ValueError("Whitened are the embeddings of one adapter. Pass embed=True, without tasks, or whiten=False.")
    if tasks is not None and (isinstance(tasks, str) or not tasks):
        raise ValueError(f"tasks must be None or a list of at least one task, but got {shown(tasks)}.")
    if tasks is not None and INPUT in tasks:
        raise ValueError(f"The input is called {INPUT}, so no output can be. Rename the task.")
    processor = processor_part(classifier.processor, "image_processor", ImageProcessingMixin, "to read images")
    preprocessing = Preprocessing.of(processor)
    module, outputs = _module(classifier, tasks, embed, check_whitening(classifier.whitening) if whiten else None)
    pixels = torch.from_numpy(np.stack([preprocessing(read_image(image)) for image in images]))  # (N, 3, H, W)
    with evaluating(module), torch.no_grad():
        expected = _in_batches(module.to("cpu", torch.float32), pixels)
        metadata = _metadata(classifier, preprocessing, outputs, pixels.shape, quantize, embed)
        text = json.dumps(metadata, ensure_ascii=False)
        program = _program(module, pixels[:1])
    with replace_files(path.parent) as temporary:
        written = Path(temporary, path.name)
        run = _write(program, written, list(outputs), text)
        difference = _largest(_in_batches(run, pixels), expected)
        if not difference <= LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"The file differs from the model by {difference:.2g}, more than {LARGEST_DIFFERENCE:.2g}, on "
                f"{counted(len(pixels), 'image')}; nothing was written."
            )
        if quantize is not None:
            quantize_onnx(written)
            run = OnnxModel(written)
        found = _in_batches(run, pixels)
        metadata_path(written).write_text(json.dumps(metadata, ensure_ascii=False, indent=1), encoding="utf-8")
    names = list(outputs)
    agree = {name: _agreement(a, b) for name, a, b in zip(names, found, expected, strict=True) if not embed}
    return Exported(
        path,
        metadata,
        path.stat().st_size,
        difference,
        len(pixels),
        None if quantize is None else _largest(found, expected),
        agree,
        dict(zip(names, found, strict=True)),
        dict(zip(names, expected, strict=True)),
    )


def check_target(path: Path, quantize: str | None) -> None:
    """Whether `export_file` can write there, found out before anything is loaded; arguments as there.

    Raises:
        ImportError: a package for ONNX is missing.
        OSError: nothing can be written in the folder of `path`.
        ValueError: `path` has another ending or is a folder, or `quantize` is unknown or not for this file.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"An exported file must end in {' or '.join(ENDINGS)}, but got {shown(path.name)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a file of that name is to be written. Rename or remove it.")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be None or 'int8', but got {shown(quantize)}.")
    if quantize is not None and path.suffix != ".onnx":
        raise ValueError("Weights of 8 bits are for files of ONNX. Write a .onnx.")
    if path.suffix == ".onnx":
        check_packages()
    try_folder(path.parent)


def _module(
    classifier: SEPClassifier | Adapter, tasks: Sequence[str] | None, embed: bool, whitening: Whitening | None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """What is exported, and output -> its classes, or the width of its embeddings later."""
    if tasks is None and embed:
        return ImageEmbedder(classifier.model, whitening), {"embeds": None}
    classifier = cast("SEPClassifier", classifier)
    if tasks is None:
        return ImageScorer(classifier), {"scores": classifier.classes}
    found = {name: classifier.tasks[name] for name in tasks}
    if not embed:
        check_answers(Answers(), list(found.values()))
    weights: list[tuple[str, Any]] = []
    for task in found.values():
        adapter = cast(str, task.adapter)  # every task of a classifier names one
        with chosen_adapters.set(adapter), evaluating(classifier.model), torch.no_grad():
            weights.append((adapter, None if embed else task.encoder.weights(training=False)))
    outputs = {name: None if embed else task.classes for name, task in found.items()}
    return ImageTasks(classifier.model, weights), outputs


def _program(module: torch.nn.Module, image: torch.Tensor) -> torch.export.ExportedProgram:
    """A module as a graph, for batches of any size of what looks like an image (1, 3, H, W).

    The first graph keeps every weight of the model, those of its text tower too; so it is traced again without what it
    does not use.
    """
    pixels, batch = image.repeat(2, 1, 1, 1), {"pixel_values": {0: torch.export.Dim("batch")}}
    with quietly():
        graph = cast(torch.fx.GraphModule, torch.export.export(module, (pixels,), dynamic_shapes=batch).module())
        for node in [node for node in graph.graph.nodes if node.op == "get_attr" and not node.users]:
            graph.graph.erase_node(node)
        read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
        for name in [name for name, _ in [*graph.named_parameters(), *graph.named_buffers()] if name not in read]:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
        graph.recompile()
        program = torch.export.export(graph, (pixels,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names files of this machine
    return program


def _in_batches(run: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Each output of a module, a program or a file for pixels (N, 3, H, W), in fp32 on the CPU."""
    parts = []
    for batch in pixels.split(BATCH_SIZE):
        found = run(batch)
        parts.append([found] if isinstance(found, torch.Tensor) else list(found))
    return [torch.cat(outputs).float() for outputs in zip(*parts, strict=True)]


def _write(
    program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], metadata: str
) -> Callable[[torch.Tensor], Any]:
    """Write a program; returns what runs the file."""
    if path.suffix == ".onnx":
        write_onnx(program, path, outputs, metadata)
        return OnnxModel(path)
    torch.export.save(program, path, extra_files={METADATA_FILE: metadata})
    return torch.export.load(path).module()


def _largest(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def _agreement(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of images, in percent, whose best of C scores (N, C) is the same."""
    return 100 * (found.argmax(dim=1) == expected.argmax(dim=1)).double().mean().item()


def _metadata(
    classifier: SEPClassifier | Adapter,
    preprocessing: Preprocessing,
    outputs: Mapping[str, Any],
    shape: torch.Size,
    quantize: str | None,
    embed: bool,
) -> dict[str, Any]:
    """What a file says of itself."""
    return {
        "format_version": FORMAT_VERSION,
        "sep_peft": __version__,
        "base_model": base_model_name(cast(PeftModel, classifier.model)),
        "weights": quantize or "fp32",
        "input": {"name": INPUT, "shape": ["batch", *shape[1:]], "dtype": "float32"},
        "preprocessing": preprocessing.to_json(),
        "outputs": [
            {"name": name, "kind": "embeds"} if embed else {"name": name, "kind": "scores", **_of_classes(classes)}
            for name, classes in outputs.items()
        ],
    }


def _of_classes(classes: Any) -> dict[str, Any]:
    return {
        "labels": list(classes.names),
        "multi_label": classes.multi_label,
        "templates": list(classes.templates),
        "descriptions": [list(texts) for texts in classes.description_texts],
        "calibration": None if classes.calibration is None else asdict(classes.calibration),
    }
