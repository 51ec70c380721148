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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AutoProcessor, CLIPModel

from sep_peft import Explanation, SEPClassifier
from sep_peft.classifier.attribution import log_odds
from sep_peft.classifier.images import read_image
from sep_peft.classifier.patches import PatchGrid
from sep_peft.classifier.prediction import image_logits
from sep_peft.training.folders import read_test


ASSETS = Path(__file__).parent / "assets"
#: Shares of the patches that have gone, or come, on the way.
WAY = torch.linspace(0, 1, 9)
#: Random masks of RISE: as many runs of the model as occlusion needs for 8 x 8 patches.
MASKS = 64


class AttentionMaps:
    """Attention as the image tower computes it by this name, whose maps are kept while somebody asks for them.

    A map is (B, heads, L, L), rows are what looks; it is part of the graph, so that it has a gradient.
    """

    name = "with_maps"

    def __init__(self):
        self._kept: list[torch.Tensor] | None = None
        AttentionInterface.register(self.name, self._attend)

    @contextmanager
    def kept(self) -> Iterator[list[torch.Tensor]]:
        """The maps of all layers and both branches, in the order in which they are computed."""
        self._kept = maps = []
        try:
            yield maps
        finally:
            self._kept = None

    def _attend(self, module, query, key, value, attention_mask, scaling: float, **kwargs):
        """Of query, key and value (B, heads, L, D), as an attention function of transformers."""
        weights = query @ key.transpose(2, 3) * scaling
        weights = (weights if attention_mask is None else weights + attention_mask).softmax(dim=-1)
        if self._kept is not None:
            self._kept.append(weights)
        return (weights @ value).transpose(1, 2), weights


MAPS = AttentionMaps()


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


def attention(scorer: Scorer) -> torch.Tensor:
    """How much of a patch arrives at CLS through attention that speaks for the class, in both branches.

    Maps are multiplied layer by layer, each weighted by the gradient of the log odds and without what speaks against:
    Chefer, Gur and Wolf, "Generic Attention-Model Explainability" (ICCV 2021, arXiv 2103.15679). Prompts are tokens
    like others; that they are made from tokens of the layer before is left out.
    """
    tower, inputs = scorer.classifier.vision_tower, {"pixel_values": scorer.pixel_values.clone().requires_grad_()}
    weights = scorer.classifier.encoder.weights(training=False)
    with torch.enable_grad(), MAPS.kept() as maps:
        odds = log_odds(image_logits(tower, inputs, weights, through_frozen=True), scorer.label)
        gradients = torch.autograd.grad(odds.sum(), maps)
    arrives: dict[int, torch.Tensor] = {}  # number of tokens, which the branch with prompts has more of -> (L, L)
    for weights, gradient in zip(maps, gradients, strict=True):
        count = weights.shape[-1]
        speaks_for = (gradient * weights)[0].clamp_min(0).mean(dim=0).detach()  # (L, L)
        before = arrives.get(count, torch.eye(count))
        arrives[count] = before + speaks_for @ before
    patches = slice(1, 1 + scorer.grid.count)  # after CLS; prompts come last
    return torch.stack([each[0, patches] for each in arrives.values()]).sum(dim=0)


def integrated_gradients(scorer: Scorer) -> torch.Tensor:
    """What `SEPClassifier.explain` gives: Sundararajan et al. (ICML 2017)."""
    return scorer.explanation.effects.flatten()


ATTRIBUTIONS: dict[str, Callable[[Scorer], torch.Tensor]] = {
    "chance": by_chance,
    "the middle first": middle,
    "selected by SEP": selected,
    "occlusion": occlusion,
    f"RISE, {MASKS} masks": rise,
    "attention and gradients": attention,
    "integrated gradients": integrated_gradients,
}


def main() -> None:
    args = parse_arguments()
    processor = AutoProcessor.from_pretrained(args.model)
    model = CLIPModel.from_pretrained(args.model, attn_implementation={"vision_config": MAPS.name})
    classifier = SEPClassifier.from_pretrained(args.adapter, model=model, processor=processor).eval()
    samples = [path for path, name in read_test(args.data) if name in classifier.class_names]
    random.Random(args.seed).shuffle(samples)
    torch.manual_seed(args.seed)
    chosen = {name: ATTRIBUTIONS[name] for name in args.only or ATTRIBUTIONS}
    results = {name: [] for name in chosen}
    for path in tqdm(samples[: args.images]):
        start = time.perf_counter()
        explanation = classifier.explain(path)
        explained_in = time.perf_counter() - start
        pixel_values = processor(images=read_image(path), return_tensors="pt")["pixel_values"]
        scorer = Scorer(classifier, pixel_values, explanation)
        for name, attribute in chosen.items():
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
    parser.add_argument(
        "--only", nargs="+", choices=ATTRIBUTIONS, metavar="NAME", help="these attributions; default: all"
    )
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
