"""Prototypes that are kept take part in predictions: of the classes that they were trained on, and of no others."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from bundled import scores_of
from safetensors import SafetensorError
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
from small_clip import make_clip

from sep_peft import ImageScorer, SEPClassifier, TaskClasses
from sep_peft.classifier.prediction import predict_batch
from sep_peft.method.recipe import Recipe
from sep_peft.training import make_optimizer


FILE = "sep_prototypes.safetensors"


def trainable(classifier: SEPClassifier) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in classifier.named_parameters() if p.requires_grad}


@torch.no_grad()
def reference(classifier: SEPClassifier, weight: float) -> torch.Tensor:
    """Logits by texts alone, and the prototypes' one by one."""
    added = [
        [10 * weight * sum(F.cosine_similarity(x, w, dim=0).item() for x in (v, v0)) / 2 for w in classifier.prototypes]
        for v, v0 in zip(*classifier.eval().image_embeds(IMAGES), strict=True)
    ]
    return logits_of(classifier) + torch.tensor(added)


@pytest.mark.parametrize("weight", [0.1, 2, 30.0])
def test_logits_with_kept_prototypes(weight):
    expected = reference(with_prototypes(None), weight)
    torch.testing.assert_close(logits_of(with_prototypes(weight)), expected)


def test_until_they_are_kept_prototypes_do_not_predict():
    classifier = with_prototypes(None)
    expected = logits_of(classifier)
    classifier.prototypes.data.neg_()
    assert torch.equal(logits_of(classifier), expected)


def test_what_is_kept_does_not_follow_later_training():
    classifier = with_prototypes()
    expected = logits_of(classifier)
    classifier.prototypes.data.neg_()
    assert torch.equal(logits_of(classifier), expected)
    assert not torch.allclose(logits_of(classifier.keep_prototypes(1.5)), expected, atol=0.1)


def test_the_loss_of_training_stays_that_of_the_paper():
    before, after = with_prototypes(None)(IMAGES, LABELS), with_prototypes()(IMAGES, LABELS)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_without_the_adapter_they_are_silent():
    plain, classifier = make_classifier(), with_prototypes()
    with plain.model.disable_adapter(), classifier.model.disable_adapter():
        assert torch.equal(logits_of(classifier), logits_of(plain))


def test_other_classes_have_none():
    classifier, others = with_prototypes(), TaskClasses(CLASSES, (TEMPLATES,), tuple("abcd"))
    trained = classifier.classes
    classifier.set_classes(others)
    assert torch.equal(logits_of(classifier), logits_of(make_classifier()))
    torch.testing.assert_close(classifier.prototypes.data, classifier.encoder.frozen_embeds())
    assert torch.equal(logits_of(classifier.set_classes(trained)), logits_of(with_prototypes()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(dtype):
    classifier = SEPClassifier(make_model(dtype=dtype), CLASSES, TEMPLATES)
    plain = classifier.eval()(IMAGES.to(dtype)).logits
    with_them = classifier.keep_prototypes(1.0)(IMAGES.to(dtype)).logits
    assert with_them.dtype == plain.dtype
    assert (with_them - plain).abs().max() > 0.01


def test_chunks_of_a_batch_give_the_same():
    classifier = with_prototypes().eval()
    rows = torch.cat([classifier(IMAGES[i : i + 2]).logits for i in (0, 2, 4)])
    torch.testing.assert_close(rows, logits_of(classifier))


def test_files(tmp_path):
    classifier = with_prototypes()
    classifier.save_pretrained(tmp_path)
    assert FILE in contents(tmp_path)
    kept = load_file(tmp_path / FILE)["prototypes"]
    torch.testing.assert_close(kept, F.normalize(classifier.prototypes.data, dim=-1))
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    assert torch.equal(loaded(IMAGES).logits, logits_of(classifier))
    assert loaded.prototypes is None
    torch.testing.assert_close(ImageScorer(loaded)(IMAGES), logits_of(classifier).softmax(dim=-1))


def test_training_goes_on_from_what_was_kept(tmp_path):
    with_prototypes().save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip(), is_trainable=True)
    torch.testing.assert_close(loaded.prototypes.data, load_file(tmp_path / FILE)["prototypes"])


def test_a_task_brings_its_prototypes(tmp_path):
    trained = with_prototypes()
    trained.save_pretrained(tmp_path)
    classifier = SEPClassifier(make_model("first", seed=9), CLASSES, TEMPLATES).eval()
    classifier.load_task(tmp_path, "task")
    weights = classifier.tasks["task"].encoder.weights(training=False)
    torch.testing.assert_close(weights.prototypes, trained.encoder.weights(training=False).prototypes)
    tasks = classifier.tasks.of_samples("task", len(IMAGES))
    with torch.no_grad():
        found = predict_batch(classifier.vision_tower, {"pixel_values": IMAGES}, tasks, None)
    expected = logits_of(trained).softmax(dim=-1)
    for prediction, scores in zip(found, expected.tolist(), strict=True):
        assert scores_of(prediction, trained.class_names) == pytest.approx(scores, abs=1e-5)


def test_a_scorer_made_while_training():
    classifier = with_prototypes().train()
    scorer = ImageScorer(classifier).eval()
    torch.testing.assert_close(scorer(IMAGES), logits_of(classifier).softmax(dim=-1))


# errors


def test_there_is_nothing_to_keep():
    with raises("There are no prototypes to keep: the classifier was made with prototype_weight=0."):
        make_classifier(prototype_weight=0.0).keep_prototypes()


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weights_that_are_not_allowed(weight):
    classifier = with_prototypes()
    expected = logits_of(classifier)
    with raises(f"prototype_logit_weight must be above 0 and finite, but got {weight!r}."):
        classifier.keep_prototypes(weight)
    assert torch.equal(logits_of(classifier), expected)


def test_prototypes_that_training_has_broken():
    classifier = make_classifier()
    classifier.prototypes.data[1, 1] = float("nan")
    with raises("prototypes must be finite, but some values are not. Train with a lower learning rate."):
        classifier.keep_prototypes()


def test_prototypes_of_another_number():
    with raises("prototypes must have shape (4, embedding size), but got (3, 24)."):
        TaskClasses(CLASSES, prototypes=torch.ones(3, 24), prototype_logit_weight=1.0)


def test_prototypes_of_another_model():
    classes = TaskClasses(CLASSES, prototypes=torch.ones(4, 9), prototype_logit_weight=1.0)
    message = (
        "The prototypes of the classes have 9 entries, but the model's embeddings 24: they were made with another "
    )
    with raises(message + "base model."):
        SEPClassifier(make_model(), classes, prototype_weight=0.0)


def test_files_that_are_missing_or_cut_short(tmp_path):
    with_prototypes().save_pretrained(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-10])
    with pytest.raises(SafetensorError):
        SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    (tmp_path / FILE).unlink()
    message = f"{tmp_path / FILE} does not exist, but sep_classes.json says that it should. Copy or download it again."
    with raises(message):
        SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    save_file({"prototypes": torch.ones(3, 24)}, tmp_path / FILE)
    message = (
        f"{tmp_path / FILE} must hold prototypes alone, one for each name in sep_classes.json, but holds "
        "{'prototypes': (3, 24)}. Copy or download it again."
    )
    with raises(message):
        SEPClassifier.from_pretrained(tmp_path, model=make_clip())


def test_a_class_list_without_them_reads_as_before(tmp_path):
    make_classifier().save_pretrained(tmp_path)
    file = tmp_path / "sep_classes.json"
    data = json.loads(file.read_text())
    del data["prototype_logit_weight"]
    file.write_text(json.dumps(data))
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip())
    assert torch.equal(loaded(IMAGES).logits, logits_of(make_classifier()))


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        (Recipe(learning_rate=0.1), [0.1, 1e-3]),
        (Recipe(learning_rate=0.1, prototype_learning_rate=0.0), [0.1, 0.0]),
        (Recipe.published(), [2.5e-3, 2.5e-3]),
    ],
    ids=["default", "zero", "published"],
)
def test_prototypes_have_their_own_learning_rate(recipe, rates):
    classifier = with_prototypes(None)
    optimizer = make_optimizer(trainable(classifier), recipe)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    adapter, prototypes = (group["params"] for group in optimizer.param_groups)
    assert prototypes[0] is classifier.prototypes
    expected = [p for p in classifier.parameters() if p.requires_grad]
    assert sorted(map(id, adapter + prototypes)) == sorted(map(id, expected))


def test_without_prototypes_the_optimizer_has_the_adapter_alone():
    classifier = make_classifier(prototype_weight=0.0)
    (group,) = make_optimizer(trainable(classifier), Recipe()).param_groups
    assert len(group["params"]) == sum(p.requires_grad for p in classifier.parameters())
