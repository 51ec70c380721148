"""One recipe: what it may hold, and what a classifier takes from it, before and after training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from small_clip import make_clip, make_images, make_texts
from transformers import PreTrainedTokenizerFast

from sep_peft import SEPClassifier, SEPConfig, TaskClasses, TokenFusion
from sep_peft.classifier.calibration import Calibration
from sep_peft.method.losses import sep_loss
from sep_peft.method.recipe import Recipe


IMAGES, LABELS = make_images(4), torch.tensor([0, 1, 2, 1])
BASE, NEW = ["cat", "dog", "cow"], ["ant", "bee"]


def raises(message: str):
    """The whole message."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# values


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("epochs", [0, -1, 1.0, True, None, "3"], "an integer of at least 1"),
        ("batch_size", [0, 2.5], "an integer of at least 1"),
        ("views", [0], "an integer of at least 1"),
        ("warmup_epochs", [-1, 0.5], "an integer of at least 0"),
        ("max_steps", [0, 1.0], "None or an integer of at least 1"),
        ("calibration_folds", [1, -1, 2.0, True, None], "0 or an integer of at least 2"),
        ("seed", [-1, 2**31, 1.0], "an integer from 0 to 2147483647"),
        ("learning_rate", [0, float("nan"), float("inf"), "0.1", None], "a finite number above 0"),
        ("adam_epsilon", [0.0, -1e-8], "a finite number above 0"),
        ("prototype_learning_rate", [-1e-3, float("nan")], "None or a finite number of at least 0"),
        ("smallest_crop", [0, 1.1, float("nan")], "a number above 0 and at most 1"),
        ("text_weight", [-1, float("nan"), None], "a finite number of at least 0"),
        ("vision_weight", [True], "a finite number of at least 0"),
        ("prototype_weight", [float("inf")], "a finite number of at least 0"),
        ("prototype_logit_weight", [-5.0], "a finite number of at least 0"),
        ("zero_shot_margin", [-1.5], "a finite number of at least 0"),
        ("class_sample", [-1, 2.5, True, "all"], "None or an integer of at least 0"),
        ("weight_decay", ["none"], "a finite number of at least 0"),
        ("average_center", [0, 1.1, -0.5, True, float("nan"), "0.5"], "None or a number above 0 and at most 1"),
        ("average_width", [0, -1, None, float("inf")], "a finite number above 0"),
    ],
)
def test_values_that_are_not_allowed(name, values, allowed):
    for value in values:
        for make in (Recipe, Recipe.published, Recipe.compact):
            with raises(f"{name} must be {allowed}, but got {value!r}."):
                make(**{name: value})


def test_limits_are_allowed():
    zeros = ("warmup_epochs", "weight_decay", "text_weight", "vision_weight", "prototype_weight", "zero_shot_margin")
    zeros = (*zeros, "calibration_folds")
    recipe = Recipe(1, 1, 1, prototype_learning_rate=0, smallest_crop=1, max_steps=1, **dict.fromkeys(zeros, 0))
    zero = {"text_weight": 0, "vision_weight": 0, "prototype_weight": 0}
    assert recipe.loss_weights == {"classification_weight": 1, **zero}


def test_the_papers_recipe():
    recipe = Recipe.published()
    published = {"classification_weight": 1, "text_weight": 8, "vision_weight": 6, "prototype_weight": 0.5}
    assert recipe.loss_weights == published
    assert (recipe.epochs, recipe.learning_rate, recipe.adam_epsilon, recipe.smallest_crop) == (50, 2.5e-3, 1e-3, 0.08)
    assert (recipe.prototype_learning_rate, recipe.prototype_logit_weight, recipe.zero_shot_margin) == (None, 0, 0)
    assert Recipe.published().calibration_folds == 0
    assert Recipe.published().class_sample == 0
    assert Recipe.published(epochs=3).epochs == 3


def test_in_words():
    assert str(Recipe()) == (
        "30 epochs of batches of 32, AdamW with learning rate 0.005 (0.001 for the prototypes), eps 1e-08, warm-up for "
        "one epoch, cosine; consistency weights 4 and 0; prototypes predict with weight 5; random crops from 50% of "
        "the area and flips"
    )
    assert str(Recipe.published(max_steps=9, warmup_epochs=2, weight_decay=0.1)) == (
        "9 steps of batches of 32, AdamW with learning rate 0.0025, eps 0.001, weight decay 0.1, warm-up for 2 epochs, "
        "cosine; consistency weights 8 and 6; prototypes predict with weight 0; random crops from 8% of the area and "
        "flips"
    )


def test_an_average_in_words():
    assert str(Recipe(average_center=0.75)).endswith("and flips; averaged over epochs around 75% of them")


def test_a_recipe_needs_no_torch():
    """Nor do those that it stands on: package and room are there without what they import themselves."""
    code = (
        "import importlib, sys, types\n"
        "for name, path in (('bare', sys.argv[1]), ('bare.method', sys.argv[1] + '/method')):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "module = importlib.import_module('bare.method.recipe')\n"
        "assert 'torch' not in sys.modules; print(module.Recipe().epochs)"
    )
    folder = Path(sys.modules[Recipe.__module__].__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code, folder], text=True) == "30\n"


@pytest.mark.parametrize("published", [False, True])
def test_fusions_have_the_sizes_of_the_configuration(published):
    config = SEPConfig.published() if published else SEPConfig()
    fusion = TokenFusion.published(128) if published else TokenFusion(128)
    same = TokenFusion(128, mlp_size=config.fusion_hidden_size, rank=config.fusion_rank)
    assert {n: p.shape for n, p in fusion.named_parameters()} == {n: p.shape for n, p in same.named_parameters()}
    assert fusion.fc1.out_features == (256 if published else 32)


# what a classifier takes from it


@pytest.fixture(scope="module")
def tokenizer():
    """Words of one token each, between BOS and EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["[PAD]", ".", "a", "photo", "of", *BASE, *NEW])} | {"<b>": 61, "<e>": 62}
    inner = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<b> $A <e>", special_tokens=[("<b>", 61), ("<e>", 62)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
    )


@pytest.fixture
def make(tokenizer):
    def make(names=BASE, **options) -> SEPClassifier:
        torch.manual_seed(0)
        model = get_peft_model(make_clip(), SEPConfig(num_text_prompts=2, num_vision_prompts=2))
        return SEPClassifier.from_class_names(model, tokenizer, names, **options)

    return make


def train_a_step(classifier: SEPClassifier) -> None:
    classifier.train()(IMAGES, LABELS).loss.backward()
    torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], 0.1).step()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (4, 0, 0.5)),
        ({"recipe": Recipe.published()}, (8, 6, 0.5)),
        ({"recipe": Recipe.compact()}, (2, 1.5, 0.5)),
        ({"recipe": Recipe.published(), "vision_weight": 1}, (8, 1, 0.5)),
        ({"text_weight": 0, "vision_weight": 0.0, "prototype_weight": 2}, (0, 0, 2)),
    ],
    ids=["default", "published", "compact", "one of its own", "all of its own"],
)
def test_weights_of_the_loss(options, weights, make):
    classifier = make(**options)
    output = classifier(IMAGES, LABELS)
    text, frozen_text, *_ = classifier.encoder.weights(training=True)
    image, frozen_image = classifier.image_embeds(IMAGES)
    expected = sep_loss(
        *(output.logits, LABELS, image, frozen_image, text, frozen_text, classifier.prototypes),
        **dict(zip(("text_weight", "vision_weight", "prototype_weight"), weights, strict=True)),
    )
    torch.testing.assert_close(tuple(output.parts), tuple(expected))


def test_a_weight_that_is_not_allowed(make):
    with raises("text_weight must be a finite number of at least 0, but got -1.0."):
        make(text_weight=-1.0)


@pytest.mark.parametrize(("recipe", "weight"), [(Recipe(), 5), (Recipe(prototype_logit_weight=2.0), 2)])
def test_weight_of_kept_prototypes(recipe, weight, make):
    assert make(recipe=recipe).keep_prototypes().classes.prototype_logit_weight == weight
    assert make(recipe=recipe).keep_prototypes(7.0).classes.prototype_logit_weight == 7


def test_the_papers_recipe_keeps_no_prototypes(make):
    classifier = make(recipe=Recipe.published())
    with raises("prototype_logit_weight must be above 0 and finite, but got 0.0."):
        classifier.keep_prototypes()
    assert classifier.finish_training().classes.prototypes is None
    assert not classifier.training


# the margin of zero-shot: for classes that were not trained, and for no others


def margin(classifier: SEPClassifier) -> float:
    return classifier.classes.zero_shot_margin


@pytest.mark.parametrize(
    ("recipe", "expected"), [(None, 1.0), (Recipe(zero_shot_margin=3), 3), (Recipe.published(), 0)]
)
def test_other_classes_have_the_recipes_margin(recipe, expected, make):
    classifier = make(recipe=recipe)
    assert margin(classifier) == 0
    assert margin(classifier.set_classes(NEW)) == expected
    assert margin(classifier.set_classes(NEW, zero_shot_margin=0.5)) == 0.5


@pytest.mark.parametrize("finish", ["keep_prototypes", "finish_training"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(prototype_logit_weight=0.0), Recipe(prototype_weight=0.0)])
def test_trained_classes_are_not_held_back(recipe, finish, make):
    if finish == "keep_prototypes" and not (recipe.prototype_logit_weight and recipe.prototype_weight):
        pytest.skip("there is nothing to keep")
    classifier = make(NEW, recipe=recipe).set_classes(BASE)
    assert margin(classifier) == 1.0
    train_a_step(classifier)
    getattr(classifier, finish)()
    assert margin(classifier) == 0
    expected = classifier.eval()(IMAGES).logits
    kept = classifier.classes.prototypes

    assert margin(classifier.set_classes(NEW)) == 1.0 and classifier.classes.prototypes is None
    assert margin(classifier.set_classes([*BASE, *NEW])) == 1.0
    assert margin(classifier.set_classes(BASE[:2])) == 0
    torch.testing.assert_close(classifier(IMAGES).logits, expected[:, :2])
    classifier.set_classes(BASE)
    assert margin(classifier) == 0
    assert torch.equal(classifier(IMAGES).logits, expected)
    assert classifier.classes.prototypes is kept


@pytest.mark.parametrize("kind", ["prototypes", "gda", "prototypes-gda", "tip-adapter-f"])
def test_some_of_the_trained_names_keep_their_logits_and_temperature(kind, make):
    """In whatever order they are named; where one is missing, nothing is known of other images and of sets."""
    whole = Calibration(4.0, 2.5, 12, "cross-fitting", 50.0, -1.0, (0.2, 0.7))
    classifier, batches = make().eval(), [{"pixel_values": IMAGES, "labels": LABELS}]
    classifier.keep_prototypes(2.0, kind=kind, batches=None if kind == "prototypes" else batches).calibrate(whole)
    expected = classifier(IMAGES).logits
    classifier.set_classes(["cow", "cat"])
    torch.testing.assert_close(classifier(IMAGES).logits, expected[:, [2, 0]])
    assert classifier.classes.calibration == Calibration(4.0, 2.5, 12, "cross-fitting")
    assert margin(classifier) == 0
    classifier.set_classes(BASE[::-1])
    torch.testing.assert_close(classifier(IMAGES).logits, expected.flip(1))
    assert classifier.classes.calibration == whole
    assert classifier.set_classes(["cow", "cat"], template="of {}.").classes.calibration == whole.for_new_classes()
    assert classifier.set_classes(BASE, template="a photo of a {}.").classes.calibration == whole


def test_other_templates_bring_no_prototypes_back(make):
    classifier = make().keep_prototypes()
    assert classifier.set_classes(BASE, template="of a {}.").classes.prototypes is None
    assert margin(classifier) == 0


@pytest.mark.parametrize("recipe", [Recipe(zero_shot_margin=3.0), Recipe.published()])
def test_a_loaded_adapter_has_the_margin_of_its_recipe(recipe, make, tokenizer, tmp_path):
    classifier = make(recipe=recipe)
    train_a_step(classifier)
    classifier.finish_training().save_pretrained(tmp_path)
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip(), processor=tokenizer)
    assert torch.equal(loaded(IMAGES).logits, classifier(IMAGES).logits)
    assert margin(loaded) == 0
    assert margin(loaded.set_classes(NEW)) == recipe.zero_shot_margin
    assert torch.equal(loaded.set_classes(BASE)(IMAGES).logits, classifier(IMAGES).logits)
    loaded.set_classes(NEW).save_pretrained(tmp_path)
    again = SEPClassifier.from_pretrained(tmp_path, model=make_clip(), processor=tokenizer)
    assert margin(again) == margin(again.set_classes(BASE)) == recipe.zero_shot_margin


def test_an_adapter_that_names_no_recipe_predicts_as_before(make, tokenizer, tmp_path):
    classifier = make().keep_prototypes().eval()
    classifier.save_pretrained(tmp_path)
    file = tmp_path / "sep_classes.json"
    data = json.loads(file.read_text())
    assert data.pop("new_class_margin") == 1.0
    file.write_text(json.dumps(data))
    loaded = SEPClassifier.from_pretrained(tmp_path, model=make_clip(), processor=tokenizer)
    assert torch.equal(loaded(IMAGES).logits, classifier(IMAGES).logits)
    assert torch.equal(loaded.set_classes(BASE)(IMAGES).logits, classifier(IMAGES).logits)
    assert margin(loaded.set_classes(NEW)) == 1.5


def test_a_margin_for_new_classes_out_of_range():
    with raises("new_class_margin must be at least 0 and finite, but got -1.0."):
        TaskClasses(make_texts([3, 4]), new_class_margin=-1.0)
