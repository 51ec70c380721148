"""Train SEP with transformers' Trainer on a data set of the package datasets: metrics, TensorBoard, and going on.

    python examples/trainer.py                       # bundled small CLIP and images
    python examples/trainer.py --data my_images --model openai/clip-vit-base-patch16 --output run
    python examples/trainer.py ... --resume          # after an interruption, with the same arguments
    tensorboard --logdir outputs/trainer

The folder has train/ and test/ with one folder of images per class. Any data set with a column of images and one of
labels does as well: see `as_images`.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, EarlyStoppingCallback, EvalPrediction, TrainingArguments, set_seed

from sep_peft import SEPClassifier, SEPConfig, SEPTrainer
from sep_peft.classifier.images import read_image
from sep_peft.training import LabelledImages, Recipe


ASSETS = Path(__file__).parent / "assets"


def main() -> None:
    args = parse_arguments()
    data = load_dataset("imagefolder", data_dir=str(args.data))
    names = data["train"].features["label"].names
    recipe = Recipe(args.epochs, seed=args.seed)

    set_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model)
    model = get_peft_model(AutoModel.from_pretrained(args.model), SEPConfig())
    classifier = SEPClassifier.from_class_names(model, processor, names, recipe=recipe)
    trainer = SEPTrainer(
        classifier,
        arguments(args),
        train_dataset=as_images(data["train"], processor, recipe),
        eval_dataset=as_images(data["test"], processor),
        compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(args.patience)],
    )
    with model.disable_adapter():
        print(f"zero-shot: {shown(trainer.evaluate(metric_key_prefix='zero_shot'), 'zero_shot')}")
    trainer.train(resume_from_checkpoint=args.resume)
    print(f"SEP: {shown(trainer.evaluate(metric_key_prefix='test'), 'test')}")
    classifier.save_pretrained(args.output / "adapter")
    print(f"saved {args.output / 'adapter'}")


def as_images(data: Dataset, processor, recipe: Recipe | None = None) -> LabelledImages:
    """A data set with the columns `image` and `label`, augmented as a recipe says; images are read when needed."""
    names = data.features["label"].names
    samples = [(index, names[label]) for index, label in enumerate(data["label"])]
    return LabelledImages(samples, names, processor, recipe, read=lambda index: read_image(data[index]["image"]))


def arguments(args: argparse.Namespace) -> TrainingArguments:
    """Where the run goes and how often it is measured; how it trains is the recipe's."""
    return TrainingArguments(
        str(args.output),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best one and the last one
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        logging_steps=1,
        report_to=args.report_to,
        use_cpu=args.cpu,
    )


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy over all images, and its mean over the classes, in percent."""
    right = prediction.predictions.argmax(axis=-1) == prediction.label_ids
    classes = [right[prediction.label_ids == label].mean() for label in np.unique(prediction.label_ids)]
    return {"accuracy": 100 * float(right.mean()), "mean_over_classes": 100 * float(np.mean(classes))}


def shown(found: dict[str, float], prefix: str) -> str:
    accuracy, mean = found[f"{prefix}_accuracy"], found[f"{prefix}_mean_over_classes"]
    return f"{accuracy:.1f} % of the images, {mean:.1f} % as the mean over classes"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ASSETS / "caltech101", help="folder with train/ and test/")
    parser.add_argument("--model", default=str(ASSETS / "clip-small"), help="name on the Hub or path")
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer"))
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--patience", type=int, default=10, help="epochs without progress before it ends")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    parser.add_argument(
        "--report-to",
        default="tensorboard" if find_spec("tensorboard") else "none",
        help='"tensorboard", where it is installed the default, or "none"',
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
