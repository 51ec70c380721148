"""Adapt a CLIP to a few pictures per class with SEP, and see what it gains.

    python examples/quickstart.py                       # bundled small CLIP and pictures, about two minutes
    python examples/quickstart.py --data my_pictures --model openai/clip-vit-base-patch16 --image cat.jpg

The first half of the classes is trained on, the other half is new: it is met for the first time when testing.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel, Trainer, TrainingArguments, set_seed

from sep_peft import SEPClassifier, SEPConfig, explain


ASSETS = Path(__file__).parent / "assets"
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
Samples = list[tuple[Path, str]]  # picture, class name


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    train, test = read_folder(args.data, args.shots, args.seed)
    names = sorted({name for _, name in train})
    base, new = names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]
    train = [sample for sample in train if sample[1] in base]
    print(f"{len(base)} base classes with {len(train)} training pictures, {len(new)} new classes")

    processor = AutoProcessor.from_pretrained(args.model)
    config = SEPConfig(num_text_prompts=args.text_prompts, num_vision_prompts=args.vision_prompts)
    model = get_peft_model(CLIPModel.from_pretrained(args.model), config).to(args.device)
    model.print_trainable_parameters()
    classifier = SEPClassifier.from_class_names(model, processor, base, template=args.template)

    with model.disable_adapter():
        zero_shot = evaluate(classifier, test, base, new, "zero-shot")
    fit(classifier.set_classes(base), train, processor, args)
    adapted = evaluate(classifier, test, base, new, "SEP")
    print_table({"zero-shot": zero_shot, "SEP": adapted})

    folder = args.output / "adapter"
    classifier.set_classes(names).save_pretrained(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"\nsaved {folder} ({size / 1e6:.1f} MB)")
    fresh = SEPClassifier.from_pretrained(CLIPModel.from_pretrained(args.model), folder, processor=processor)
    check_equal(classifier.eval(), fresh.to(args.device), [path for path, _ in test])

    image = args.image or test[0][0]
    print(f"\n{image}")
    for result in fresh.predict(image, top_k=min(3, len(names))):
        print(f"  {result['score']:6.1%}  {result['label']}")
    patches = args.output / "selected_patches.png"
    explain(fresh.model, processor, image).plot(patches)
    print(f"patches that the fusion selected per layer: {patches}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ASSETS / "caltech101", help="one folder per class, or train/ and test/"
    )
    parser.add_argument("--model", default=str(ASSETS / "clip-small"), help="name on the Hub or path of a CLIP")
    parser.add_argument("--image", type=Path, help="picture to classify at the end; default: one of the test pictures")
    parser.add_argument("--template", default="a photo of a {}.", help="what the frozen text branch reads")
    parser.add_argument("--shots", type=int, default=16, help="training pictures per class")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
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


def read_folder(folder: Path, shots: int, seed: int) -> tuple[Samples, Samples]:
    """Training and test pictures; without train/ and test/ below `folder`, `shots` a class train and the rest tests."""
    rng = random.Random(seed)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = read_classes(folder / "train"), read_classes(folder / "test")
        train = {name: rng.sample(paths, min(shots, len(paths))) for name, paths in train.items()}
    else:
        train, test = {}, {}
        for name, paths in read_classes(folder).items():
            rng.shuffle(paths)
            train[name], test[name] = paths[:shots], paths[shots:]
    if empty := sorted(name for name in set(train) | set(test) if not train.get(name) or not test.get(name)):
        raise SystemExit(
            f"Each class needs pictures to train and to test on, but these have too few for --shots {shots}: "
            f"{', '.join(empty)}"
        )
    if len(train) < 2:
        raise SystemExit(f"{folder} needs at least two folders with pictures, one per class, but has {len(train)}.")
    return tuple([(path, name) for name in sorted(part) for path in part[name]] for part in (train, test))


def read_classes(folder: Path) -> dict[str, list[Path]]:
    """Name of each folder -> the pictures in it."""
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            classes[entry.name] = sorted(path for path in entry.rglob("*") if path.suffix.lower() in ENDINGS)
    return {name: paths for name, paths in classes.items() if paths}


class Pictures(torch.utils.data.Dataset):
    """Pictures with labels as a Trainer wants them; while training each is cropped and flipped at random."""

    def __init__(self, samples: Samples, names: list[str], processor, augment: bool):
        self.samples = [(Image.open(path).convert("RGB"), names.index(name)) for path, name in samples]
        self.processor = processor
        self.augment = augment

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        picture, label = self.samples[index]
        if self.augment:
            picture = random_crop_and_flip(picture)
        return {"pixel_values": self.processor(images=picture, return_tensors="pt")["pixel_values"][0], "labels": label}


def random_crop_and_flip(picture: Image.Image) -> Image.Image:
    """A square-ish part of 8 to 100 percent of the area, mirrored half of the time: the field's augmentation."""
    width, height = picture.size
    area, ratio = width * height * random.uniform(0.08, 1), random.uniform(3 / 4, 4 / 3)
    part = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = random.randint(0, width - part[0]), random.randint(0, height - part[1])
    side = min(width, height)
    picture = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + part[0], top + part[1]))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else picture


def fit(classifier: SEPClassifier, train: Samples, processor, args: argparse.Namespace) -> None:
    """Train the adapter with the published recipe: Adam, learning rate 2.5e-3, eps 1e-3, cosine."""
    names = classifier.class_names
    plain = torch.utils.data.DataLoader(Pictures(train, names, processor, augment=False), args.batch_size)
    classifier.reset_prototypes(plain)
    steps_per_epoch = -(-len(train) // args.batch_size)
    arguments = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        adam_epsilon=1e-3,
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=steps_per_epoch,
        logging_steps=10 * steps_per_epoch,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=args.device == "cpu",
        dataloader_pin_memory=args.device != "cpu",
    )
    Trainer(classifier, arguments, train_dataset=Pictures(train, names, processor, augment=True)).train()


def evaluate(classifier: SEPClassifier, test: Samples, base: list[str], new: list[str], title: str) -> dict[str, float]:
    """Accuracy in percent on base classes among base classes, on new ones among new ones, and their harmonic mean."""
    result = {}
    for key, names in (("base", base), ("new", new)):
        classifier.set_classes(names).eval()
        samples = [sample for sample in test if sample[1] in names]
        right = 0
        for start in tqdm(range(0, len(samples), 32), desc=f"{title}, {key} classes"):
            batch = samples[start : start + 32]
            predictions = classifier.predict([path for path, _ in batch], top_k=1)
            right += sum(top[0]["label"] == name for top, (_, name) in zip(predictions, batch, strict=True))
        result[key] = 100 * right / len(samples)
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
    print(f"the loaded adapter predicts the same for all {len(paths)} test pictures")


if __name__ == "__main__":
    main()
