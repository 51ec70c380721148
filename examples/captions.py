"""Images with captions: makes pairs of Caltech-101, trains on half of its classes, and prints recall beside the base.

    python examples/captions.py --data caltech101.zip --descriptions caltech101.json --base-model clip --output run

Captions are made from class names by templates, and taken from sentences that describe a class. Every image of a class
has all captions of its class, so a caption is found where any image of its class is. Images to test on have sentences
that were not trained on, and those of the other half of the classes show what was never trained on.

`--data` is a zip with Caltech-101 and its split (split_zhou_Caltech101.json), `--descriptions` a JSON file, class name
-> sentences, such as CuPL's (https://github.com/sarahpratt/CuPL). `--output` gets the images and the pairs as JSON
lines, for ``sep-peft train-pairs`` as well, the adapter, and recalls.json.
"""

from __future__ import annotations

import argparse
import json
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, set_seed

from sep_peft import SEPConfig
from sep_peft.training import PairsRecipe, evaluate_pairs, fit_pairs, read_pairs
from sep_peft.training.retrieval import PairEvaluation


SPLIT = "split_zhou_Caltech101.json"
TEMPLATES = ["a photo of a {}.", "a close-up photo of a {}.", "a picture that shows a {}.", "there is a {} here."]
#: The sentences call these classes otherwise than the split does.
NAMES = {
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "face": "centered face",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}
#: Sentences of each class that are trained on; as many others are for images that are tested on.
SENTENCES = 8


def make_pairs(data: Path, descriptions: Path, output: Path, shots: int, tests: int, seed: int) -> dict[str, Path]:
    """Unpack images and write their pairs as JSON lines.

    Args:
        data, descriptions: as the head of this file says.
        output: folder.
        shots: training images a class; a quarter as many of the part "val" are to validate on.
        tests: images a class to test on.
        seed: of what is drawn.

    Returns:
        "train", "val", "trained classes" and "new classes" -> file.
    """
    sentences, rng = json.loads(descriptions.read_text()), random.Random(seed)
    files = {part: output / f"{part.replace(' ', '-')}.jsonl" for part in ("train", "val", *PARTS)}
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data) as archive:
        split = json.loads(archive.read(SPLIT))
        names = sorted({name for _, _, name in split["train"]})
        trained = names[: (len(names) + 1) // 2]
        for part, file in files.items():
            source, count = {"train": ("train", shots), "val": ("val", max(1, shots // 4))}.get(part, ("test", tests))
            lines = []
            for name in names:
                if (name in trained) == (part == "new classes"):
                    continue
                images = [path for path, _, of in split[source] if of == name]
                captions = captions_of(name, sentences, seen=part in ("train", "val"))
                for image in rng.sample(images, min(count, len(images))):
                    archive.extract(image, output / "images")
                    lines.append(json.dumps({"file_name": f"images/{image}", "captions": captions}))
            file.write_text("\n".join(lines))
    return files


#: What is tested on -> how the table calls it.
PARTS = {"trained classes": "trained classes, other images and sentences", "new classes": "classes never trained on"}


def captions_of(name: str, sentences: dict[str, list[str]], seen: bool) -> list[str]:
    """Captions of a class: templates and sentences that are trained on, or one template and other sentences."""
    called = NAMES.get(name, name.replace("_", " "))
    distinct = list(dict.fromkeys(sentences[called]))
    if seen:
        return [template.format(called) for template in TEMPLATES] + distinct[:SENTENCES]
    return [f"an image of a {called}.", *distinct[SENTENCES : 2 * SENTENCES]]


def table(found: dict[str, PairEvaluation]) -> str:
    """Recalls as Markdown."""
    lines = ["| recall (%) | | image to text: 1 | 5 | 10 | text to image: 1 | 5 | 10 |", "|---" * 8 + "|"]
    for part, evaluation in found.items():
        for name, recall in (("base", evaluation.frozen), ("SEP", evaluation.adapted)):
            shares = [*recall.image_to_text.values(), *recall.text_to_image.values()]
            lines.append(f"| {PARTS[part]} | {name} | {' | '.join(f'{share:.1f}' for share in shares)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--descriptions", type=Path, required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=16, help="training images a class")
    parser.add_argument("--tests", type=int, default=10, help="images a class to test on")
    parser.add_argument("--recipe", type=json.loads, default={}, help='settings of PairsRecipe, as JSON: {"epochs": 5}')
    parser.add_argument("--chunk-size", type=int, help="images whose activations are kept at a time")
    args = parser.parse_args()
    recipe = PairsRecipe(**args.recipe)
    files = make_pairs(args.data, args.descriptions, args.output, args.shots, args.tests, recipe.seed)
    set_seed(recipe.seed)
    model = get_peft_model(AutoModel.from_pretrained(args.base_model), SEPConfig())
    processor = AutoProcessor.from_pretrained(args.base_model)
    options = {"processor": processor, "long_captions": "cut"}
    history = fit_pairs(
        model,
        read_pairs(files["train"]),
        recipe,
        eval_pairs=read_pairs(files["val"]),
        chunk_size=args.chunk_size,
        folder=args.output,
        resume=True,
        **options,
    )
    model.save_pretrained(args.output)
    found = {part: evaluate_pairs(model, read_pairs(files[part]), **options) for part in PARTS}
    written = {part: asdict(evaluation) for part, evaluation in found.items()}
    data = {"recipe": asdict(recipe), "history": history.to_json(), "recalls": written}
    (args.output / "recalls.json").write_text(json.dumps(data, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
