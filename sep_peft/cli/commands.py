"""What the commands of ``sep-peft`` do; each takes parsed arguments and returns a `Result`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, set_seed

from ..classifier.card import METRIC, CardDetails, Score, read_card
from ..classifier.classes import TEMPLATE
from ..classifier.classifier import SEPClassifier
from ..classifier.files import CONFIG_FILE, MODEL_CARD, find_file, load_classes
from ..classifier.images import find_images, read_image
from ..method.recipe import Recipe
from ..training import evaluation
from ..training.fit import fit
from ..training.folders import ImageFolder, Samples, read_folder, read_test, without_unreadable
from ..tuner.config import SEPConfig
from ..tuner.convert import convert_reference_checkpoint


WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Result:
    """
    Args:
        data: for ``--json``.
        text: for people.
        code: exit code; 1 where something was left out.
    """

    data: Any
    text: str
    code: int = 0


#: Choices of --save-dtype.
SAVE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: What makes the adapter's configuration and its recipe, for each setting of the command line.
SETTINGS = {
    "default": (SEPConfig, Recipe),
    "compact": (SEPConfig.compact, Recipe.compact),
    "published": (SEPConfig.published, Recipe.published),
}


# train


def train(args: argparse.Namespace) -> Result:
    """Train an adapter, measure it beside zero-shot where there is something to test on, and save it with a card."""
    _check_output(args.output, args.overwrite)
    if args.cache is not None and args.start_layer == 0:
        raise ValueError("--cache keeps what is below --start-layer, which is 0. Pass a layer above 0, or no --cache.")
    make_recipe = SETTINGS[args.setting][1]
    recipe = make_recipe(**_given(args, "epochs", "batch_size", "learning_rate", "seed", "max_steps", "views"))
    folder, broken = _readable(read_folder(args.folder, args.shots, args.seed), args)
    set_seed(args.seed)
    classifier = _new_classifier(args, folder.names)
    with classifier.model.disable_adapter():
        zero_shot = _evaluate_parts(classifier, folder, args, "zero-shot")
    fit(classifier, folder.train, recipe, quiet=args.quiet, cache=args.cache)
    adapted = _evaluate_parts(classifier, folder, args, "SEP")
    name = args.name or Path(args.folder).resolve().name
    scores = [
        Score(name, found.accuracy, zero_shot[part].accuracy, images=found.images, split=part)
        for part, found in adapted.items()
    ]
    protocol = {"shots": args.shots, "seeds": [args.seed], "protocol": str(recipe)}
    details = CardDetails(**protocol, scores=scores, license=args.license)
    classifier.save_pretrained(args.output, details, SAVE_DTYPES[args.save_dtype])
    return _trained(args.output, folder, scores, broken)


def _trained(output: Path, folder: ImageFolder, scores: list[Score], broken: dict[Path, str]) -> Result:
    size = (output / WEIGHTS_FILE).stat().st_size
    data = {
        "adapter": str(output),
        "bytes": size,
        "classes": folder.names,
        "training_images": len(folder.train),
        "scores": [asdict(score) for score in scores],
        "unreadable": _listed(broken),
    }
    lines = [f"saved {output} ({size / 1e6:.1f} MB), {len(folder.names)} classes"]
    lines += [
        f"{score.split}: {score.accuracy:.1f} % with SEP, {score.zero_shot:.1f} % zero-shot, {score.images} images"
        for score in scores
    ]
    return Result(data, "\n".join(lines))


def _evaluate_parts(
    classifier: SEPClassifier, folder: ImageFolder, args: argparse.Namespace, title: str
) -> dict[str, evaluation.Evaluation]:
    return {part: _evaluate(classifier, samples, args, f"{title}, {part}") for part, samples in folder.tests.items()}


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given; the others have their defaults elsewhere."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed to save into.")
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise FileExistsError(f"{folder} has an adapter already. Pass --overwrite to replace it.")


def _readable(folder: ImageFolder, args: argparse.Namespace) -> tuple[ImageFolder, dict[Path, str]]:
    """Without images that cannot be read, which are named on standard error."""
    train, broken = _check_images(folder.train, args)
    if lost := sorted(set(folder.names) - {name for _, name in train}):
        raise ValueError(f"No training image can be read of {', '.join(lost)}.")
    tests = {}
    for part, samples in folder.tests.items():
        samples, more = _check_images(samples, args)
        broken |= more
        if samples:
            tests[part] = samples
    return ImageFolder(folder.names, train, tests), broken


def _new_classifier(args: argparse.Namespace, names: list[str]) -> SEPClassifier:
    make_config = SETTINGS[args.setting][0]
    config = make_config(
        num_text_prompts=args.text_prompts,
        num_vision_prompts=args.vision_prompts,
        start_layer=args.start_layer,
        **_given(args, "fusion_rank", "fusion_hidden_size", "share_fusion"),
    )
    base, processor = _load_base(args)
    model = get_peft_model(base, config).to(_device(args))
    return SEPClassifier.from_class_names(model, processor, names, template=args.template or TEMPLATE)


# predict


def predict(args: argparse.Namespace) -> Result:
    """Classify images; those that cannot be read are named, and the others classified all the same."""
    images = [path for given in args.images for path in _images(given)]
    if not images:
        raise ValueError(f"There are no images in {', '.join(args.images)}.")
    classifier = _load(args)
    if args.classes:
        classifier.set_classes(args.classes, zero_shot_margin=args.zero_shot_margin)
    top_k = args.top_k or min(5, len(classifier.classes))
    data = []
    for start in _progress(args, "batches")(range(0, len(images), args.batch_size)):
        data += _predict_batch(classifier, images[start : start + args.batch_size], top_k)
    broken = {entry["image"]: entry["error"] for entry in data if "error" in entry}
    _warn(broken)
    text = "\n".join(_prediction_line(entry) for entry in data if "error" not in entry)
    return Result(data, text, code=1 if broken else 0)


def _images(given: str) -> list[str]:
    return [str(path) for path in find_images(Path(given))] if os.path.isdir(given) else [given]


def _predict_batch(classifier: SEPClassifier, images: list[str], top_k: int) -> list[dict]:
    """For each image an entry with its prediction or with what is wrong with it."""
    entries, read = [{"image": path} for path in images], []
    for entry in entries:
        try:
            read.append((entry, read_image(entry["image"])))
        except ValueError as error:
            entry["error"] = str(error)
    predictions = classifier.predict([image for _, image in read], top_k=top_k, batch_size=len(entries))
    for (entry, _), prediction in zip(read, predictions, strict=True):
        entry["prediction"] = prediction
    return entries


def _prediction_line(entry: dict) -> str:
    return f"{entry['image']}: " + ", ".join(f"{top['label']} {top['score']:.1%}" for top in entry["prediction"])


# evaluate


def evaluate(args: argparse.Namespace) -> Result:
    """Measure an adapter beside zero-shot."""
    samples, broken = _check_images(read_test(args.folder), args)
    classifier = _load(args)
    if args.new_classes:
        names = sorted({name for _, name in samples})
        classifier.set_classes(names, zero_shot_margin=args.zero_shot_margin)
    adapted, zero_shot = _evaluate(classifier, samples, args, "SEP"), None
    if not args.no_zero_shot:
        with classifier.model.disable_adapter():
            zero_shot = _evaluate(classifier, samples, args, "zero-shot")
    data = {
        "images": adapted.images,
        "classes": len(classifier.classes),
        "accuracy": adapted.accuracy,
        "zero_shot": zero_shot and zero_shot.accuracy,
        "per_class": adapted.per_class,
        "unreadable": _listed(broken),
    }
    beside = "" if zero_shot is None else f", {zero_shot.accuracy:.1f} % zero-shot"
    lines = [f"{adapted.accuracy:.1f} % with SEP{beside}, {adapted.images} images of {len(adapted.count)} classes"]
    lines += [f"{accuracy:6.1f} %  {name}" for name, accuracy in adapted.per_class.items()]
    return Result(data, "\n".join(lines))


# import-reference


def import_reference(args: argparse.Namespace) -> Result:
    """Convert a checkpoint of the authors' code, with the classes that it was trained on if they are given."""
    _check_output(args.output, args.overwrite)
    names = args.classes and [line.strip() for line in args.classes.read_text("utf-8").splitlines() if line.strip()]
    base, processor = _load_base(args) if names else (_load_base_model(args), None)
    with tempfile.TemporaryDirectory() as temporary:  # names that do not fit are found out before `output` changes
        folder = temporary if names else args.output
        report = convert_reference_checkpoint(args.checkpoint, base, folder, args.text_layers, args.vision_layers)
        if names:
            model = PeftModel.from_pretrained(base, folder)
            classifier = SEPClassifier.from_class_names(model, processor, names, template=args.template or TEMPLATE)
            classifier.save_pretrained(args.output)
    data = {
        "adapter": str(args.output),
        "epoch": report.epoch,
        "text_prompts": report.config.num_text_prompts,
        "vision_prompts": report.config.num_vision_prompts,
        "classes": names or [],
        "unused": report.unused,
    }
    classes = f"{len(names)} classes" if names else "no class list"
    return Result(
        data, f"saved {args.output}, {classes}; {len(report.unused)} entries of the checkpoint were not needed"
    )


# info


def info(args: argparse.Namespace) -> Result:
    """Read an adapter's files, but neither its base model nor more of its weights than their header."""
    options = _hub_options(args)
    config = SEPConfig.from_pretrained(_adapter(args), subfolder=args.subfolder, **options)
    weights = find_file(args.adapter, WEIGHTS_FILE, args.subfolder, options)
    with safe_open(weights, framework="pt") as file:
        parameters = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())
    try:
        classes = load_classes(args.adapter, args.subfolder, options)
    except ValueError:  # an adapter of a plain model
        classes = None
    data = {
        "adapter": args.adapter,
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
        "templates": list(classes.templates) if classes else [],
        "scores": _scores(args, options),
    }
    return Result(data, "\n".join(f"{key.replace('_', ' '):<15}{_shown(value)}" for key, value in data.items()))


def _scores(args: argparse.Namespace, options: dict) -> list[dict]:
    """As the adapter's model card gives them."""
    try:
        card = read_card(find_file(args.adapter, MODEL_CARD, args.subfolder, options))
    except (OSError, ValueError):
        return []
    results = [result for result in card.data.eval_results or () if result.metric_name == METRIC]
    return [{"dataset": r.dataset_name, "split": r.dataset_split, "accuracy": r.metric_value} for r in results]


def _shown(value) -> str:
    if isinstance(value, list):
        return (
            "; ".join(" ".join(map(str, item.values())) if isinstance(item, dict) else str(item) for item in value)
            or "none"
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# what they share


def _hub_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"token": args.token, "revision": getattr(args, "revision", None)}
    return {key: value for key, value in options.items() if value is not None}


def _adapter(args: argparse.Namespace) -> str:
    """The adapter's folder or repository; a folder that is not there is an error here, not one of the Hub's."""
    name = args.adapter
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"There is no adapter folder {name}.")
    return name


def _load_base(args: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    return _load_base_model(args), AutoProcessor.from_pretrained(args.base_model, token=args.token)


def _load_base_model(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModel.from_pretrained(args.base_model, token=args.token)


def _load(args: argparse.Namespace) -> SEPClassifier:
    options = {"subfolder": args.subfolder, **_hub_options(args)}
    path = _adapter(args)
    if args.base_model is None:
        classifier = SEPClassifier.from_pretrained(path, **options)
    else:
        base, processor = _load_base(args)
        classifier = SEPClassifier.from_pretrained(base, path, processor=processor, **options)
    return classifier.to(_device(args))


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _evaluate(
    classifier: SEPClassifier, samples: Samples, args: argparse.Namespace, title: str
) -> evaluation.Evaluation:
    return evaluation.evaluate(classifier, samples, args.batch_size, _progress(args, title))


def _check_images(samples: Samples, args: argparse.Namespace) -> tuple[Samples, dict[Path, str]]:
    samples, broken = without_unreadable(samples, _progress(args, "reading images"))
    _warn(broken)
    return samples, broken


def _progress(args: argparse.Namespace, title: str):
    return partial(tqdm, desc=title, disable=args.quiet, file=sys.stderr)


def _warn(broken: dict) -> None:
    """Name and count images on standard error."""
    for error in broken.values():
        print(f"sep-peft: warning: {' '.join(error.split())}", file=sys.stderr)
    if broken:
        print(f"sep-peft: warning: {len(broken)} images cannot be read and are left out", file=sys.stderr)


def _listed(broken: dict[Path, str]) -> list[dict[str, str]]:
    return [{"image": str(path), "error": error} for path, error in broken.items()]
