"""Adapt a CLIP to a few images per class with SEP, and see what it gains.

    python examples/quickstart.py                       # bundled small CLIP and images, about two minutes
    python examples/quickstart.py --data my_images --model openai/clip-vit-base-patch16 --image cat.jpg

The first half of the classes is trained on, the other half is new: it is met for the first time when testing.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.training import Recipe, evaluate, fit
from sep_peft.training.folders import Samples, read_folder


ASSETS = Path(__file__).parent / "assets"


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    folder = read_folder(args.data, args.shots, args.seed)
    names, test = folder.names, folder.tests["test"]
    base, new = names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]
    train = [sample for sample in folder.train if sample[1] in base]
    print(f"{len(base)} base classes with {len(train)} training images, {len(new)} new classes")

    processor = AutoProcessor.from_pretrained(args.model)
    config = SEPConfig(num_text_prompts=args.text_prompts, num_vision_prompts=args.vision_prompts)
    model = get_peft_model(CLIPModel.from_pretrained(args.model), config).to(args.device)
    model.print_trainable_parameters()
    recipe = Recipe(args.epochs, args.batch_size, args.learning_rate, seed=args.seed)
    classifier = SEPClassifier.from_class_names(model, processor, base, template=args.template, recipe=recipe)

    with model.disable_adapter():
        zero_shot = measure(classifier, test, base, new, "zero-shot")
    fit(classifier.set_classes(base), train)
    adapted = measure(classifier, test, base, new, "SEP")
    print_table({"zero-shot": zero_shot, "SEP": adapted})

    saved = args.output / "adapter"
    classifier.set_classes(base).save_pretrained(saved)
    size = (saved / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    print(f"\nsaved {saved} ({size / 1e6:.1f} MB)")
    fresh = SEPClassifier.from_pretrained(saved, model=CLIPModel.from_pretrained(args.model), processor=processor)
    check_equal(classifier.eval(), fresh.to(args.device), [path for path, _ in test])

    image = args.image or test[0][0]
    print(f"\n{image}")
    for result in fresh.set_classes(names).predict(image, top_k=min(3, len(names))):
        print(f"  {result['score']:6.1%}  {result['label']}")
    drawing = args.output / "explanation.png"
    fresh.explain(image).plot(drawing)
    print(f"patches that decided, and those that SEP selected before each layer: {drawing}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ASSETS / "caltech101", help="one folder per class, or train/ and test/"
    )
    parser.add_argument("--model", default=str(ASSETS / "clip-small"), help="name on the Hub or path of a CLIP")
    parser.add_argument("--image", type=Path, help="image to classify at the end; default: one of the test images")
    parser.add_argument("--template", default="a photo of a {}.", help="what the frozen text branch reads")
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--text-prompts", type=int, default=6)
    parser.add_argument("--vision-prompts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args()
    if args.shots < 1 or args.epochs < 1:
        parser.error("--shots and --epochs must be at least 1")
    if args.image and not args.image.is_file():
        parser.error(f"--image {args.image} does not exist")
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder")
    return args


def measure(classifier: SEPClassifier, test: Samples, base: list[str], new: list[str], title: str) -> dict[str, float]:
    """Accuracy in percent on base classes among base classes, on new ones among new ones, and their harmonic mean."""
    result = {}
    for key, names in (("base", base), ("new", new)):
        classifier.set_classes(names).eval()
        samples = [sample for sample in test if sample[1] in names]
        progress = partial(tqdm, desc=f"{title}, {key} classes")
        result[key] = evaluate(classifier, samples, progress=progress).accuracy
    result["harmonic mean"] = 2 * result["base"] * result["new"] / max(result["base"] + result["new"], 1e-9)
    return result


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Accuracies in percent, one line a method."""
    columns = list(next(iter(rows.values())))
    print("\naccuracy (%)    " + "".join(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<16}" + "".join(f"{row[column]:16.1f}" for column in columns))


def check_equal(first: SEPClassifier, second: SEPClassifier, paths: list[Path]) -> None:
    """Make sure that the adapter read from disk predicts what the trained one does."""
    for a, b in zip(first.predict(paths, top_k=1), second.predict(paths, top_k=1), strict=True):
        if a[0]["label"] != b[0]["label"] or abs(a[0]["score"] - b[0]["score"]) > 1e-5:
            raise SystemExit(f"The loaded adapter predicts {b}, the trained one {a}.")
    print(f"the loaded adapter predicts the same for all {len(paths)} test images")


if __name__ == "__main__":
    main()
