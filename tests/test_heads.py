"""Heads that stand on any adapter: GDA, linear probes and Tip-Adapter-F, against their equations and in use."""

from __future__ import annotations

import copy
import functools
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_classifier import (
    CLASSES,
    IMAGES,
    LABELS,
    TEMPLATES,
    contents,
    logits_of,
    make_classifier,
    make_model,
    raises,
    with_prototypes,
)
from small_clip import make_clip, make_images

from sep_peft import ImageScorer, SEPClassifier, TaskClasses
from sep_peft.classifier.answers import Answers
from sep_peft.classifier.prediction import Task, predict_batch
from sep_peft.method.fit_heads import best_residual, class_means, fit_head, gda, probe, residual, tip_adapter_keys
from sep_peft.method.heads import NAMES, ClassHead, HeadLogits, cache_logits


KINDS = list(NAMES)
FILE = "sep_head.safetensors"
TRAIN, TRAIN_LABELS = make_images(12, seed=11), torch.arange(12) % 4
BATCHES = [{"pixel_values": TRAIN[i : i + 5], "labels": TRAIN_LABELS[i : i + 5]} for i in (0, 5, 10)]


def clusters(count: int, seed: int, size: int = 12, spread: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of unit length around three centres, and their classes."""
    centres = F.normalize(torch.randn(3, size, generator=torch.Generator().manual_seed(1)), dim=-1)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return F.normalize(centres[labels] + spread * noise, dim=-1), labels


def run_head(head: ClassHead, embeds: torch.Tensor, count: int) -> torch.Tensor:
    """Logits (B, C) of embeddings (B, E)."""
    return HeadLogits(head.kind, head.tensors, head.logit_weight, count)(embeds)


TEXTS = F.normalize(torch.randn(3, 12, generator=torch.Generator().manual_seed(4)), dim=-1)


# fitting


def test_gda_is_its_formula():
    embeds, labels = clusters(15, 2)
    weight, bias = gda(embeds, labels, TEXTS)
    means = torch.stack([embeds[labels == c].mean(dim=0) for c in range(3)])
    scatter = sum(torch.outer(x - means[y], x - means[y]) for x, y in zip(embeds, labels, strict=True))
    inverse = 12 * torch.linalg.inv(scatter + scatter.trace() / 14 * torch.eye(12))
    torch.testing.assert_close(weight, means @ inverse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, torch.stack([-m @ inverse @ m / 2 for m in means]), rtol=1e-4, atol=1e-4)


def test_gda_separates_what_class_means_do_not():
    """One channel varies much within classes and says nothing, which the covariance knows and means do not."""
    embeds, labels = clusters(300, 2)
    loud = 2 * torch.randn(300, 1, generator=torch.Generator().manual_seed(3))
    noisy, test = torch.cat([embeds, loud], dim=1), slice(12, None)
    weight, bias = gda(noisy[:12], labels[:12], F.pad(TEXTS, (0, 1)))
    by_means = torch.cdist(noisy[test], class_means(noisy[:12], labels[:12], 3)).argmin(dim=1)
    right = [
        (found == labels[test]).float().mean() for found in (by_means, F.linear(noisy[test], weight, bias).argmax(1))
    ]
    assert right[0] < 0.7 and right[1] > 0.9


def test_probe_is_the_least_of_its_objective():
    embeds, labels = clusters(15, 2, spread=0.5)
    weight, bias = probe(embeds, labels, TEXTS, penalty=0.1)
    assert torch.equal(bias, torch.zeros(3))
    means = class_means(embeds, labels, 3)

    def objective(w):
        rest = w / 10 - means  # alpha is what makes the rest, delta, smallest: the projection on the text
        alpha = (rest * TEXTS).sum(dim=1, keepdim=True)
        return F.cross_entropy(embeds @ w.T, labels) + 0.1 * (rest - alpha * TEXTS).square().sum()

    least = objective(weight)
    for seed in range(20):
        step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        assert objective(weight + 0.1 * step) > least
    assert objective(10 * (means + TEXTS)) > least + 0.1  # where it starts


def test_residual_is_the_least_of_its_objective_and_its_penalty_suits_other_images():
    """Beside texts that are right there is little to add, beside texts that are wrong much."""
    embeds, labels = clusters(30, 2, spread=0.5)
    right = 10.0 * F.one_hot(labels, 3)
    wrong = right[:, [1, 2, 0]]
    weight = residual(embeds, labels, wrong, penalty=0.01)

    def objective(w):
        return F.cross_entropy(wrong + embeds @ w.T, labels) + 0.01 * (w / 10).square().sum()

    for seed in range(20):
        step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        assert objective(weight + 0.1 * step) > objective(weight)
    little, much = (best_residual(embeds, labels, logits).norm() for logits in (right, wrong))
    assert little < 0.1 * much
    others, other_labels = clusters(300, 3, spread=0.5)
    losses = [
        F.cross_entropy(10.0 * F.one_hot(other_labels, 3)[:, [1, 2, 0]] + others @ w.T, other_labels)
        for w in (residual(embeds, labels, wrong, 1e-4), best_residual(embeds, labels, wrong))
    ]
    assert losses[1] <= losses[0]


def test_the_mean_of_prototypes_and_gda_is_both_of_them():
    embeds, labels = clusters(15, 2, spread=0.5)
    others, zero_shot = clusters(6, 3)[0], embeds @ TEXTS.T
    prototypes = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    head = fit_head("prototypes-gda", embeds, labels, TEXTS, zero_shot, prototype_weights=prototypes)
    expected = (others @ prototypes.T + run_head(fit_head("gda", embeds, labels, TEXTS, zero_shot), others, 3)) / 2
    torch.testing.assert_close(run_head(head, others, 3), expected)
    with raises("A prototypes-gda head needs prototype_weights, which it averages with GDA."):
        fit_head("prototypes-gda", embeds, labels, TEXTS, zero_shot)


def test_cache_is_its_formula_and_training_it_helps():
    embeds, labels = clusters(15, 2, spread=0.6)
    others, other_labels = clusters(6, 3)
    found = cache_logits(others, embeds, labels, 3)
    for x, row in zip(others, found, strict=True):
        for c in range(3):
            expected = sum(torch.exp(-5.5 * (1 - x @ key)) for key, y in zip(embeds, labels, strict=True) if y == c)
            torch.testing.assert_close(row[c], expected)
    zero_shot = torch.zeros(15, 3)
    keys = tip_adapter_keys(embeds, labels, zero_shot, 1.0)
    others, other_labels = clusters(300, 3, spread=0.6)
    before, after = (F.cross_entropy(cache_logits(others, k, labels, 3), other_labels) for k in (embeds, keys))
    assert after < before - 0.02
    assert torch.equal(tip_adapter_keys(embeds, labels, zero_shot, 1.0, steps=0), embeds)


@pytest.mark.parametrize("kind", ["gda", "probe"])
def test_the_weight_follows_how_good_zero_shot_is(kind):
    embeds, labels = clusters(24, 2, spread=0.5)
    right = 20.0 * F.one_hot(labels, 3)
    strong, weak = (fit_head(kind, embeds, labels, TEXTS, z).logit_weight for z in (right[:, [1, 2, 0]], right))
    assert strong > weak
    assert fit_head(kind, embeds, labels, TEXTS, right, logit_weight=0.7).logit_weight == 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_a_class(kind):
    embeds, labels = clusters(3, 2)
    head = fit_head(
        kind, embeds, labels, TEXTS, 10 * embeds @ TEXTS.T, text_logits=torch.zeros(3, 3), prototype_weights=embeds
    )
    logits = run_head(head, embeds, 3)
    assert logits.isfinite().all() and (logits.argmax(dim=1) == labels).all()


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_all_alike_give_finite_numbers(kind):
    embeds, labels = TEXTS[[0, 0, 0, 0, 0, 0]], torch.arange(6) % 3
    logits = 10 * embeds @ TEXTS.T
    head = fit_head(kind, embeds, labels, TEXTS, logits, text_logits=logits, prototype_weights=TEXTS)
    assert all(value.isfinite().all() for value in head.tensors.values())


def test_mistakes_in_fitting():
    embeds, labels = clusters(6, 2)
    with raises(
        "The kind of a head must be one of gda, probe, prototypes-gda, residual, tip-adapter-f, but got 'GDA'."
    ):
        fit_head("GDA", embeds, labels, TEXTS, embeds @ TEXTS.T)
    with raises("A head needs an image of every class, but has none of classes [1]."):
        fit_head("gda", embeds[labels != 1], labels[labels != 1], TEXTS, embeds[labels != 1] @ TEXTS.T)
    with raises("A residual head needs text_logits, beside which it is trained."):
        fit_head("residual", embeds, labels, TEXTS, embeds @ TEXTS.T)


# heads as data

GOOD = {"weight": torch.ones(3, 12), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("kind", "tensors", "weight", "message"),
    [
        ("mine", GOOD, 1.0, "The kind of a head must be one of gda, probe, prototypes-gda, residual, "
         "tip-adapter-f, but got 'mine'."),
        ("gda", {"weight": torch.ones(3, 12)}, 1.0, "A gda head has weight and bias, but got ['weight']."),
        ("gda", GOOD | {"bias": torch.ones(2)}, 1.0, "weight and bias of a gda head must have shapes (count, embedding "
         "size) and (count,), but got (3, 12) and (2,)."),
        ("gda", GOOD | {"bias": torch.ones(3).long()}, 1.0, "bias of a gda head must be floating-point numbers, but "
         "got torch.int64."),
        ("tip-adapter-f", {"keys": torch.ones(3, 2), "labels": torch.ones(3)}, 1.0, "labels of a tip-adapter-f head "
         "must be class indices, but got torch.float32."),
        ("probe", GOOD | {"weight": torch.full((3, 12), torch.nan)}, 1.0, "weight of a probe head must be finite, but "
         "some values are not."),
        ("gda", GOOD, 0.0, "logit_weight must be above 0 and finite, but got 0.0."),
        ("gda", GOOD, True, "logit_weight must be above 0 and finite, but got True."),
        ("gda", GOOD, "1", "logit_weight must be above 0 and finite, but got '1'."),
        ("gda", GOOD, 1001, "logit_weight must be at most 1000, but got 1001."),
    ],
)  # fmt: skip
def test_mistakes_in_a_head(kind, tensors, weight, message):
    with raises(message):
        ClassHead(kind, tensors, weight)


def test_a_head_belongs_to_its_classes():
    classes = partial(TaskClasses, CLASSES, (TEMPLATES,), tuple("abcd"))
    with raises("A head of 3 classes does not fit 4 class names."):
        classes(head=ClassHead("gda", GOOD, 1.0))
    cache = {"keys": torch.ones(3, 24), "labels": torch.tensor([0, 4, 1])}
    with raises("labels of a tip-adapter-f head must be between 0 and 3, but some are not."):
        classes(head=ClassHead("tip-adapter-f", cache, 1.0))
    head = ClassHead("gda", {"weight": torch.ones(4, 24), "bias": torch.zeros(4)}, 1.0)
    with raises("Prototypes and a gda head cannot both predict. Keep one of them."):
        classes(prototypes=torch.ones(4, 24), prototype_logit_weight=1.0, head=head)
    with raises(
        "The gda head of the classes reads 12 entries, but the model's embeddings have 24: it was made with another "
        "base model."
    ):
        narrow = ClassHead("gda", {"weight": torch.ones(4, 12), "bias": torch.zeros(4)}, 1.0)
        logits_of(make_classifier(classes(head=narrow), None))


# in a classifier


@functools.cache
def fitted(kind: str) -> SEPClassifier:
    """The same object for all who ask; nobody may change it."""
    classes = TaskClasses(CLASSES, (TEMPLATES,), tuple("abcd"))
    return make_classifier(classes, None).keep_prototypes(kind=kind, batches=BATCHES)


def kept(kind: str) -> SEPClassifier:
    return copy.deepcopy(fitted(kind))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_the_texts_and_of_the_head(kind):
    classifier = kept(kind)
    plain = make_classifier().eval()
    v, v0 = plain.image_embeds(IMAGES)
    t, t0 = plain.image_embeds(TRAIN)
    weights = plain.encoder.weights(training=False)
    zero_shot = plain.model.logit_scale.exp() * t0 @ weights.frozen_text_embeds.T
    texts = plain(TRAIN).logits
    prototypes = 50 * F.normalize(plain.prototypes, dim=1)  # the default weight times the scale of their loss
    head = fit_head(
        kind, (t + t0) / 2, TRAIN_LABELS, weights.text_embeds, zero_shot, None, texts, prototype_weights=prototypes
    )
    assert classifier.classes.head.logit_weight == pytest.approx(head.logit_weight)
    added = run_head(head, (v + v0) / 2, 4)
    assert added.abs().max() > 0.1
    torch.testing.assert_close(logits_of(classifier), logits_of(plain) + added, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_head_predicts_alone_in_a_batch_and_exported(kind):
    classifier = kept(kind)
    together = logits_of(classifier)
    rows = torch.cat([classifier(IMAGES[i : i + 1]).logits for i in range(5)])
    torch.testing.assert_close(rows, together, rtol=1e-4, atol=1e-4)
    scorer = ImageScorer(classifier).eval()
    torch.testing.assert_close(scorer(IMAGES), together.softmax(dim=-1))
    program = torch.export.export(scorer, (IMAGES,), strict=False)
    torch.testing.assert_close(program.module()(IMAGES), together.softmax(dim=-1))
    ranked = predict_batch(
        classifier.vision_tower, {"pixel_values": IMAGES}, [Task(None, classifier.encoder)] * 5, Answers(1)
    )
    assert [row[0]["label"] for row in ranked] == ["abcd"[i] for i in together.argmax(dim=1)]


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, tmp_path):
    classifier = kept(kind)
    classifier.save_pretrained(tmp_path)
    assert FILE in contents(tmp_path) and "sep_prototypes.safetensors" not in contents(tmp_path)
    assert json.loads((tmp_path / "sep_classes.json").read_text())["format_version"] == 2
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    assert torch.equal(logits_of(loaded), logits_of(classifier))
    loaded.load_task(tmp_path, "task")
    with torch.no_grad():
        embeds = F.normalize(IMAGES[:, 0, 0], dim=-1)
        task, own = (encoder.weights(training=False).head for encoder in (loaded.tasks["task"].encoder, loaded.encoder))
        assert torch.equal(task(embeds), own(embeds))
    loaded.save_pretrained(tmp_path / "again", save_dtype=torch.bfloat16)
    rounded = SEPClassifier.from_pretrained(tmp_path / "again", model=make_clip())
    torch.testing.assert_close(logits_of(rounded), logits_of(classifier), rtol=0.05, atol=0.5)


def test_files_of_another_save_do_not_stay(tmp_path):
    """`push_folder` would share what was learned from other images."""
    heads = {FILE, "sep_prototypes.safetensors"}
    for classifier, own in [
        (with_prototypes(), {"sep_prototypes.safetensors"}),
        (kept("gda"), {FILE}),
        (make_classifier(), set()),
    ]:
        classifier.save_pretrained(tmp_path)
        assert heads & set(contents(tmp_path)) == own


def test_files_without_a_head_are_as_before(tmp_path):
    with_prototypes().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "sep_classes.json").read_text())
    assert data["format_version"] == 1 and "head" not in data


def test_damaged_files(tmp_path):
    kept("gda").save_pretrained(tmp_path)
    load = partial(SEPClassifier.from_pretrained, tmp_path, model=make_clip())
    classes, file = tmp_path / "sep_classes.json", tmp_path / FILE
    whole, data = load_file(file), json.loads(classes.read_text())
    save_file(whole | {"bias": torch.full((4,), torch.inf)}, file)
    with raises(
        f"{file} holds numbers that are not finite or larger than 65504 in bias. Train with a lower learning rate, or "
        "take an earlier save."
    ):
        load()
    save_file({"weight": whole["weight"]}, file)
    with raises(f"{classes}: A gda head has weight and bias, but got ['weight']."):
        load()
    save_file(whole, file)
    classes.write_text(json.dumps(data | {"head": "gda"}))
    with raises(f"{classes}: head of the class list must have a kind and a logit_weight, but got 'gda'."):
        load()
    classes.write_text(json.dumps(data))
    file.unlink()
    with raises(f"{file} does not exist, but sep_classes.json says that it should. Copy or download it again."):
        load()


def test_a_head_is_silent_without_its_adapter_in_training_and_for_other_classes():
    plain, classifier = make_classifier(), kept("gda")
    with plain.model.disable_adapter(), classifier.model.disable_adapter():
        assert torch.equal(logits_of(classifier), logits_of(plain))
    assert torch.equal(classifier.train()(IMAGES, LABELS).logits, plain.train()(IMAGES, LABELS).logits)
    trained = classifier.classes
    classifier.set_classes(TaskClasses(CLASSES, (TEMPLATES,), tuple("efgh")))
    assert torch.equal(logits_of(classifier), logits_of(plain))
    assert torch.equal(logits_of(classifier.set_classes(trained)), logits_of(kept("gda")))


def test_heads_take_the_place_of_prototypes_and_give_it_back():
    classifier = make_classifier().keep_prototypes(2.0)
    expected = logits_of(classifier)
    classifier.keep_prototypes(kind="gda", batches=BATCHES)
    assert classifier.classes.prototypes is None and classifier.classes.prototype_logit_weight == 0
    classifier.keep_prototypes(2.0)
    assert classifier.classes.head is None and torch.equal(logits_of(classifier), expected)


def test_a_head_needs_no_prototypes_in_the_loss_and_leaves_the_mode_alone():
    classifier = SEPClassifier(make_model(), CLASSES, TEMPLATES, prototype_weight=0.0).train()
    classifier.keep_prototypes(0.5, kind="probe", batches=BATCHES)
    assert classifier.training and classifier.model.training
    assert classifier.classes.head.logit_weight == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "GDA", "batches": BATCHES},
         "kind must be one of prototypes, gda, probe, prototypes-gda, residual, tip-adapter-f, but got 'GDA'."),
        ({"kind": "gda"}, "batches of the training images are needed for kind='gda'."),
        ({"kind": "gda", "batches": []},
         "batches of the training images are needed for kind='gda', but there are none."),
        ({"kind": "gda", "batches": BATCHES[2:]},
         "A head needs an image of every class, but has none of classes [0, 1]."),
        ({"kind": "gda", "batches": BATCHES, "logit_weight": 0},
         "logit_weight must be above 0 and finite, but got 0."),
        ({"kind": "gda", "batches": [{"pixel_values": TRAIN}]},
         "A batch of training images needs labels beside them, but has ['pixel_values'] alone."),
        ({"kind": "residual", "batches": [{"pixel_values": TRAIN * math.inf, "labels": TRAIN_LABELS}]},
         "Embeddings of the training images are not finite, so there is nothing to learn from them. Train with a lower "
         "learning rate."),
        ({"batches": BATCHES},
         'batches must be left out for kind="prototypes", which were trained with the adapter.'),
    ],
)  # fmt: skip
def test_mistakes_in_keeping(options, message):
    classifier = make_classifier()
    before = classifier.classes
    with raises(message):
        classifier.keep_prototypes(**options)
    assert classifier.classes is before
