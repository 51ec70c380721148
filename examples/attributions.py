"""Which attribution tells what decided? Deletion and insertion tests on the classifier that the quickstart trains.

    python examples/quickstart.py
    python examples/attributions.py  # 100 test images; some ten minutes on two cores

An attribution says of each patch how much it did for the score of the class that was said. If it is right, the score
falls fast where the patches that did most go first (deletion), and rises fast where they come first into a blurred
image (insertion): Petsiuk, Das and Saenko, "RISE" (BMVC 2018). Both are the mean score along the way, in percent.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel

from sep_peft import Explanation, SEPClassifier
from sep_peft.classifier.attribution import log_odds
from sep_peft.classifier.images import read_image
from sep_peft.classifier.patches import PatchGrid
from sep_peft.training.folders import read_test


ASSETS = Path(__file__).parent / "assets"
#: Shares of the patches that have gone, or come, on the way.
WAY = torch.linspace(0, 1, 9)
#: Random masks of RISE: as many runs of the model as occlusion needs for 8 x 8 patches.
MASKS = 64


class Scorer:
    """What a classifier makes of one image with patches hidden, for the class that it says.

    Args:
        classifier: in evaluation.
        pixel_values: (1, 3, H, W).
        explanation: of the image.
    """

    def __init__(self, classifier: SEPClassifier, pixel_values: torch.Tensor, explanation: Explanation):
        self.classifier, self.pixel_values, self.explanation = classifier, pixel_values, explanation
        self.grid = PatchGrid.of(classifier.vision_tower, {"pixel_values": pixel_values})
        self.label = classifier.class_names.index(explanation.label)
        self.plain = self.grid.plain(pixel_values)
        small = F.avg_pool2d(pixel_values, (self.grid.height, self.grid.width))
        small = F.avg_pool2d(small, 3, stride=1, padding=1, count_include_pad=False)
        self.blurred = F.interpolate(small, size=pixel_values.shape[2:], mode="bicubic")

    @torch.no_grad()
    def logits(self, shown: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) of the image with `fill` (1, 3, H, W) where patches shown (N, P) are not."""
        masks = shown.float().unflatten(1, (self.grid.rows, self.grid.columns))[:, None]  # (N, P) -> (N, 1, rows, cols)
        images = torch.lerp(fill, self.pixel_values, F.interpolate(masks, size=fill.shape[2:]))
        return self.classifier(images).logits

    def score_on_the_way(self, attribution: torch.Tensor, first: bool, fill: torch.Tensor) -> float:
        """Mean score where the patches that did most are hidden first, or shown first."""
        rank = attribution.argsort(descending=True).argsort()  # (P,)
        done = rank < (WAY[:, None] * self.grid.count).round()  # (steps, P)
        logits = self.logits(done if first else ~done, fill)
        return 100 * logits.softmax(dim=1)[:, self.label].mean().item()


# attributions: (P,), large for the patches that did most


def by_chance(scorer: Scorer) -> torch.Tensor:
    return torch.rand(scorer.grid.count)


def middle(scorer: Scorer) -> torch.Tensor:
    """The middle first, whatever is there."""
    rows, columns = (torch.linspace(-1, 1, size) for size in (scorer.grid.rows, scorer.grid.columns))
    return -(rows[:, None] ** 2 + columns**2).flatten()


def selected(scorer: Scorer) -> torch.Tensor:
    """How often SEP selected a patch; chance decides between equals."""
    return scorer.explanation.counts().flatten() + 0.01 * torch.rand(scorer.grid.count)


def occlusion(scorer: Scorer) -> torch.Tensor:
    """How far the log odds fall where a patch has the mean color: Zeiler and Fergus (ECCV 2014)."""
    hidden = torch.eye(scorer.grid.count, dtype=torch.bool)
    return -log_odds(scorer.logits(~hidden, scorer.plain), scorer.label)


def rise(scorer: Scorer) -> torch.Tensor:
    """Mean log odds where a patch is seen less where it is not, over random halves: Petsiuk et al. (BMVC 2018)."""
    shown = (torch.rand(MASKS, scorer.grid.count) < 0.5).float()
    odds = log_odds(scorer.logits(shown, scorer.plain), scorer.label)
    return odds @ shown / shown.sum(dim=0) - odds @ (1 - shown) / (1 - shown).sum(dim=0)


def integrated_gradients(scorer: Scorer) -> torch.Tensor:
    """What `SEPClassifier.explain` gives: Sundararajan et al. (ICML 2017)."""
    return scorer.explanation.effects.flatten()


ATTRIBUTIONS: dict[str, Callable[[Scorer], torch.Tensor]] = {
    "chance": by_chance,
    "the middle first": middle,
    "selected by SEP": selected,
    "occlusion": occlusion,
    f"RISE, {MASKS} masks": rise,
    "integrated gradients": integrated_gradients,
}


def main() -> None:
    args = parse_arguments()
    processor = AutoProcessor.from_pretrained(args.model)
    model = CLIPModel.from_pretrained(args.model)
    classifier = SEPClassifier.from_pretrained(args.adapter, model=model, processor=processor).eval()
    samples = [path for path, name in read_test(args.data) if name in classifier.class_names]
    random.Random(args.seed).shuffle(samples)
    torch.manual_seed(args.seed)
    results = {name: [] for name in ATTRIBUTIONS}
    for path in tqdm(samples[: args.images]):
        start = time.perf_counter()
        explanation = classifier.explain(path)
        explained_in = time.perf_counter() - start
        pixel_values = processor(images=read_image(path), return_tensors="pt")["pixel_values"]
        scorer = Scorer(classifier, pixel_values, explanation)
        for name, attribute in ATTRIBUTIONS.items():
            start = time.perf_counter()
            attribution = attribute(scorer)
            seconds = explained_in if attribute is integrated_gradients else time.perf_counter() - start
            deletion = scorer.score_on_the_way(attribution, False, scorer.plain)
            insertion = scorer.score_on_the_way(attribution, True, scorer.blurred)
            results[name].append((deletion, insertion, insertion - deletion, 1000 * seconds))
        if args.output:
            args.output.write_text(json.dumps(results))
    print_table(results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="outputs/quickstart/adapter", help="what the quickstart saved")
    parser.add_argument("--model", default=str(ASSETS / "clip-small"), help="the CLIP that it was trained on")
    parser.add_argument("--data", default=str(ASSETS / "caltech101"), help="images to test on, one folder per class")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON with the numbers of every image")
    return parser.parse_args()


def print_table(results: dict[str, list[tuple[float, ...]]]) -> None:
    """Means over images; for insertion less deletion with standard errors."""
    print(f"{'':<24}{'deletion':>10}{'insertion':>11}{'difference':>16}{'ms an image':>13}")
    for name, rows in results.items():
        values = torch.tensor(rows)
        deletion, insertion, difference, milliseconds = values.mean(dim=0).tolist()
        error = values[:, 2].std().item() / len(values) ** 0.5
        print(f"{name:<24}{deletion:>10.1f}{insertion:>11.1f}{difference:>10.1f} ± {error:3.1f}{milliseconds:>13.0f}")


if __name__ == "__main__":
    main()
