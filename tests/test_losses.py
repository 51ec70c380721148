"""The training objective against a plain-loop reference written from the formula in its docstring."""

from __future__ import annotations

import math
import re

import pytest
import torch

from sep_peft.method import reference as plain_method
from sep_peft.method.losses import SEPLoss, consistency, prototype_loss, sep_loss
from sep_peft.method.recipe import Recipe


SIZES = [(1, 2, 3), (5, 7, 11), (3, 1, 4)]  # B, C, E
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
WEIGHTS = {"text_weight": 3.0, "vision_weight": 2.0, "prototype_weight": 0.7}
NAMES = ("logits", "labels", "image_embeds", "frozen_image_embeds", "text_embeds", "frozen_text_embeds", "prototypes")


def make_arguments(batch: int, classes: int, width: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of `sep_loss` by name; embeddings are not of unit length."""
    generator = torch.Generator().manual_seed(batch)
    shapes = ((batch, classes), None, *2 * ((batch, width),), *3 * ((classes, width),))
    arguments = {
        name: 3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in zip(NAMES, shapes, strict=True)
        if shape is not None
    }
    arguments["labels"] = torch.randint(0, classes, (batch,), generator=generator)
    return arguments


# the reference: lists of Python floats, sums written out


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b)))


def cross_entropy(rows: list[list[float]], labels: list[int]) -> float:
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        total += math.log(sum(math.exp(x) for x in row)) - row[label]
    return total / len(rows)


def mean_cosine(a: list[list[float]], b: list[list[float]]) -> float:
    return sum(cosine(x, y) for x, y in zip(a, b, strict=True)) / len(a)


def reference(arguments: dict, text_weight: float, vision_weight: float, prototype_weight: float) -> list[float]:
    """Total, classification, text, vision and prototypes."""
    logits, labels, v, v0, t, t0, prototypes = (arguments[name].tolist() for name in NAMES)
    parts = [
        cross_entropy(logits, labels),
        text_weight * (1 - mean_cosine(t, t0)),
        vision_weight * (1 - mean_cosine(v, v0)),
        prototype_weight
        * (
            cross_entropy([[10 * cosine(x, w) for w in prototypes] for x in v], labels)
            + cross_entropy([[10 * cosine(x, w) for w in prototypes] for x in v0], labels)
        ),
    ]
    return [sum(parts), *parts]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_reference(sizes, dtype):
    arguments = make_arguments(*sizes, dtype)
    loss = sep_loss(**arguments, **WEIGHTS)
    tolerance = TOLERANCES[dtype]
    for part, value in zip(loss, reference(arguments, **WEIGHTS), strict=True):
        assert part.shape == ()
        assert part.dtype == dtype
        assert part.item() == pytest.approx(value, rel=tolerance, abs=tolerance)


def test_default_weights_are_the_recipes():
    arguments = make_arguments(5, 7, 11)
    default = {"text_weight": 4.0, "vision_weight": 0.0, "prototype_weight": 0.5}
    assert [part.item() for part in sep_loss(**arguments)] == pytest.approx(reference(arguments, **default))
    published = {"text_weight": 8.0, "vision_weight": 6.0, "prototype_weight": 0.5}
    loss = sep_loss(**arguments, **Recipe.published().loss_weights)
    assert [part.item() for part in loss] == pytest.approx(reference(arguments, **published))


def test_class_texts_may_teach_images_less_or_nothing():
    arguments = make_arguments(5, 7, 11)
    whole = sep_loss(**arguments)
    half, none = (sep_loss(**arguments, classification_weight=weight) for weight in (0.5, 0))
    assert half.classification.item() == pytest.approx(0.5 * whole.classification.item())
    assert none.classification == 0 and none[2:] == whole[2:]
    assert none.total.item() == pytest.approx((whole.total - whole.classification).item())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_total_is_the_sum_of_the_parts(sizes):
    loss = sep_loss(**make_arguments(*sizes))
    assert isinstance(loss, SEPLoss)
    assert loss.total.item() == pytest.approx(sum(part.item() for part in loss[1:]), rel=1e-14)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(sizes):
    """In fp64, of everything but the labels."""
    arguments = make_arguments(*sizes)
    labels = arguments.pop("labels")
    names, values = list(arguments), [value.requires_grad_() for value in arguments.values()]

    def total(*inputs):
        return sep_loss(labels=labels, **dict(zip(names, inputs, strict=True)), **WEIGHTS).total

    assert torch.autograd.gradcheck(total, values)


@pytest.mark.parametrize(
    ("weight", "part", "unused"),
    [
        ("text_weight", "text_consistency", {"text_embeds", "frozen_text_embeds"}),
        ("vision_weight", "vision_consistency", set()),
        ("prototype_weight", "prototypes", {"prototypes"}),
    ],
)
def test_a_weight_of_zero_drops_its_part(weight, part, unused):
    """Its value and its gradient: a part of NaN would not reach the total either."""
    arguments = make_arguments(5, 7, 11)
    for name in unused:
        arguments[name] = torch.full_like(arguments[name], math.nan).requires_grad_()
    loss = sep_loss(**arguments, **(WEIGHTS | {weight: 0.0}))
    expected = reference(make_arguments(5, 7, 11), **(WEIGHTS | {weight: 0.0}))
    assert [value.item() for value in loss] == pytest.approx(expected)
    assert getattr(loss, part).item() == 0.0
    assert not loss.total.requires_grad


@pytest.mark.parametrize("prototype_weight", [0.0, 0.5])
def test_without_prototypes(prototype_weight):
    arguments = make_arguments(5, 7, 11)
    expected = reference(arguments, **(WEIGHTS | {"prototype_weight": 0.0}))
    loss = sep_loss(**(arguments | {"prototypes": None}), **(WEIGHTS | {"prototype_weight": prototype_weight}))
    assert [part.item() for part in loss] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    arguments = make_arguments(5, 7, 11, dtype)
    arguments["logits"] = arguments["logits"] * 100  # e^300 is past fp32 and far past fp16
    loss = sep_loss(**arguments)
    wide = sep_loss(**{name: v if name == "labels" else v.double() for name, v in arguments.items()})
    for part, value in zip(loss, wide, strict=True):
        assert part.dtype == torch.float32
        assert part.isfinite()
        assert part.item() == pytest.approx(value.item(), rel=1e-5)


def test_equal_branches_cost_nothing():
    arguments = make_arguments(5, 7, 11)
    arguments |= {"image_embeds": 2 * arguments["frozen_image_embeds"], "text_embeds": arguments["frozen_text_embeds"]}
    loss = sep_loss(**arguments)
    assert loss.text_consistency.item() == pytest.approx(0, abs=1e-12)
    assert loss.vision_consistency.item() == pytest.approx(0, abs=1e-12)


def test_parts_by_themselves():
    """The smallest cases that can be read off: opposite, orthogonal, and prototypes along the axes."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert consistency(x, -x).item() == 2
    assert consistency(x, y).item() == 1
    assert prototype_loss(x, torch.eye(2), torch.tensor([1])).item() == pytest.approx(math.log(1 + math.exp(10)))


@pytest.mark.parametrize(
    ("name", "wrong", "needed"),
    [
        ("labels", (4,), (5,)),
        ("labels", (5, 1), (5,)),
        ("image_embeds", (6, 11), (5, 11)),
        ("frozen_image_embeds", (5, 10), (5, 11)),
        ("frozen_image_embeds", (4, 11), (5, 11)),
        ("text_embeds", (5, 11), (7, 11)),
        ("frozen_text_embeds", (1, 11), (7, 11)),
        ("prototypes", (7, 12), (7, 11)),
        ("prototypes", (5, 11), (7, 11)),
    ],
)
def test_wrong_shape(name, wrong, needed):
    arguments = make_arguments(5, 7, 11)
    arguments[name] = torch.zeros(wrong, dtype=arguments[name].dtype)
    message = f"{name} must have shape {needed} beside logits (5, 7), got {wrong}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sep_loss(**arguments)


def test_logits_of_one_dimension():
    arguments = make_arguments(5, 7, 11)
    arguments["logits"] = arguments["logits"][0]
    with pytest.raises(ValueError, match=r"^logits must have shape \(B, C\), got \(7,\)\.$"):
        sep_loss(**arguments)


def test_the_methods_reference_says_the_same():
    """The plain file of the method, with logits made of its embeddings."""
    arguments = make_arguments(5, 7, 11)
    names = ("image_embeds", "frozen_image_embeds", "text_embeds", "frozen_text_embeds")
    embeds = [torch.nn.functional.normalize(arguments[name], dim=-1) for name in names]
    logits = 3.0 * embeds[0] @ embeds[2].T
    expected = sep_loss(logits, arguments["labels"], *embeds, arguments["prototypes"], **WEIGHTS).total
    weights = WEIGHTS["text_weight"], WEIGHTS["vision_weight"], WEIGHTS["prototype_weight"]
    found = plain_method.loss(*embeds, arguments["labels"], 3.0, arguments["prototypes"], weights)
    torch.testing.assert_close(found, expected)
