"""Methods as files, and the baselines after them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from baselines import LinearProbe, TipAdapter
from bundled import shallow_clip
from coupling import couple, uncouple
from methods import build_classifier, read_method
from transformers import AutoProcessor

from sep_peft import SEPConfig
from sep_peft.method.fit_heads import fit_head
from sep_peft.training import Recipe
from sep_peft.training.optimizer import trainable
from sep_peft.tuner.model import find_towers


NAMES = ("butterfly", "lamp", "pizza")


@pytest.fixture
def build():
    model = str(shallow_clip(6))  # of all its text layers; some methods' prompts enter late
    processor = AutoProcessor.from_pretrained(model)

    def make(method, classes=NAMES):
        torch.manual_seed(0)
        return build_classifier(method, model, processor, classes, "a photo of a {}.")

    return make


@pytest.fixture
def write(tmp_path):
    def make(**entries):
        (tmp_path / "mine.json").write_text(json.dumps(entries))
        return tmp_path / "mine.json"

    return make


def shipped(scripts):
    return sorted((scripts / "methods").glob("*.json"))


def test_every_shipped_method_classifies(scripts, build):
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    files = shipped(scripts)
    assert {"zero-shot", "coop", "kgcoop", "vpt", "joint", "lora", "sep", "sep-published", "sep-coupled"} <= {
        file.stem for file in files
    }
    trained = []
    for file, method in sorted(
        ((file, read_method(file)) for file in files), key=lambda pair: pair[1].head is not None
    ):
        assert method.description, file
        if (training := replace(method, name="", description="", head=None)) in trained:
            assert method.head is not None, f"{file} is another method by another name"
            continue
        trained.append(training)
        classifier = build(method)
        assert bool(trainable(classifier)) == method.trains, file
        if method.trains:
            output = classifier.train()(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0]))
            assert output.logits.shape == (4, 3)
            output.loss.backward()
            silent = [name for name, p in trainable(classifier).items() if p.grad is None]
            assert not silent, (file, silent)


def test_recipe_and_overrides(write):
    file = write(learner="sep", recipe={"epochs": 3, "learning_rate": 0.1})
    assert read_method(file).recipe == Recipe(epochs=3, learning_rate=0.1)
    assert read_method(file, epochs=1).recipe == Recipe(epochs=1, learning_rate=0.1)
    assert read_method(write(learner="sep")).recipe == Recipe()
    assert read_method(write(learner="sep", recipe={"like": "compact"})).recipe == Recipe.compact()
    file = write(learner="sep", recipe={"like": "published", "epochs": 3})
    assert read_method(file).recipe == Recipe.published(epochs=3)
    assert read_method(write(learner="zero-shot"), epochs=3).recipe is None


def test_sep_is_the_package_with_its_defaults(scripts):
    """The rows "SEP, default" and "SEP, compact" of the table."""
    for name, config, recipe in (
        ("sep", SEPConfig(), Recipe()),
        ("sep-compact", SEPConfig.compact(), Recipe.compact()),
    ):
        method = read_method(scripts / "methods" / f"{name}.json")
        assert SEPConfig(**method.config).to_dict() == config.to_dict()
        assert method.recipe == recipe


def test_a_variant_says_only_what_differs(write, tmp_path):
    base = {"learner": "sep", "config": {"start_layer": 1}, "recipe": {"like": "compact", "epochs": 3}, "cached": True}
    (tmp_path / "base.json").write_text(json.dumps(base))
    file = write(like="base", description="mine", config={"frozen_weight": 0.0}, recipe={"views": 4})
    method = read_method(file)
    assert method.name == "mine" and method.learner == "sep" and method.description == "mine"
    assert method.config == {"start_layer": 1, "frozen_weight": 0.0}
    assert method.recipe == Recipe.compact(epochs=3, views=4) and method.cached


def test_a_variant_of_what_is_shipped(write, scripts):
    """From a file that lies elsewhere; one of the same name beside it comes first."""
    file = write(like="sep-compact", recipe={"epochs": 3})
    assert read_method(file).recipe == Recipe.compact(epochs=3)
    (file.parent / "sep-compact.json").write_text(json.dumps({"learner": "sep"}))
    assert read_method(file).recipe == Recipe(epochs=3)


def test_a_variant_of_nothing(write, tmp_path, scripts):
    file = write(like="base")
    with pytest.raises(FileNotFoundError) as error:
        read_method(file)
    message = f"{file}: it is \"like\" 'base', but there is no base.json beside it or in {scripts / 'methods'}."
    assert str(error.value) == message
    (tmp_path / "base.json").write_text(json.dumps({"like": "sep"}))
    with pytest.raises(ValueError) as error:
        read_method(file)
    assert str(error.value) == f"{file}: base.json is itself like another method; name that one, 'sep'."


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"learner": "sep", "lr": 1}, "{file}: unknown entries ['lr']; these are allowed: "
         "cached, config, coupled, description, first_stage, head, learner, recipe, selection."),
        ({"learner": "sep", "recipe": {"lr": 1}}, "{file}: unknown entries ['lr']; these are allowed: adam_epsilon, "
         "agreement_weight, average_center, average_width, batch_size, class_sample, classification_weight, epochs, "
         "geometry_weight, learning_rate, like, max_steps, prototype_learning_rate, "
         "prototype_logit_weight, prototype_weight, smallest_crop, text_distance_weight, text_weight, views, "
         "vision_distance_weight, vision_weight, warmup_epochs, weight_decay, zero_shot_margin."),
        ({"learner": "sep", "recipe": {"like": "mine"}}, "{file}: a recipe may be \"like\" default, compact, "
         "published, but this is like 'mine'."),
        ({"learner": "sep", "recipe": {"epochs": 0}}, "{file}: epochs must be an integer of at least 1, but got 0."),
        ({"learner": "svm"}, "{file}: learner must be one of zero-shot, sep, lora, linear-probe, tip-adapter, "
         "but is 'svm'."),
        ({"learner": "sep", "selection": "all"}, '{file}: selection must be "representative" or "random", '
         "but is 'all'."),
        ({"learner": "lora", "selection": "random"}, '{file}: selection is for learner "sep", but this is \'lora\'.'),
        ({"learner": "tip-adapter", "recipe": {}}, '{file}: recipe is for learners "sep" and "lora", but this is '
         "'tip-adapter'."),
        ({"learner": "sep", "head": "svm"}, "{file}: head must be one of gda, probe, prototypes-gda, residual, "
         "tip-adapter-f, but is 'svm'."),
        ({"learner": "tip-adapter", "head": "gda"}, "{file}: head is for learners that compare images with texts, but "
         "this is 'tip-adapter'."),
        ({"learner": "sep", "first_stage": 0.5}, "{file}: first_stage must be above 0 and below 1, of a method that "
         "trains and has a head, but is 0.5."),
        ({"learner": "sep", "first_stage": 1.0, "head": "gda"}, "{file}: first_stage must be above 0 and below 1, of a "
         "method that trains and has a head, but is 1.0."),
        ({"learner": "sep", "coupled": True}, '{file}: coupled is for learner "sep" with "fusion": "independent".'),
        ({"learner": "lora", "cached": True}, '{file}: cached is for learner "sep", but this is \'lora\'.'),
        ({"learner": "sep", "recipe": {"prototype_weight": 0.0, "prototype_learning_rate": 0.0}},
         "{file}: prototype_learning_rate is for methods whose loss has prototypes."),
        ({"learner": "sep", "config": {"fusion_rnk": 1}}, "{file}: SEPConfig.__init__() got an unexpected keyword "
         "argument 'fusion_rnk'"),
        ({"learner": "tip-adapter", "config": {"r": 1}}, '{file}: config is for learners "sep" and "lora", but this is '
         "'tip-adapter'."),
        ({"learner": "lora"}, "{file}: LoRA has no consistency losses; set text_weight and vision_weight to 0."),
    ],
)  # fmt: skip
def test_mistakes_in_a_method(write, entries, message):
    file = write(**entries)
    with pytest.raises(ValueError) as error:
        read_method(file)
    assert str(error.value) == message.format(file=file)


def test_coupled_prompts_are_projected_and_stay_as_they_are(scripts, build):
    """MaPLe: the image tower has no prompts of its own until training ends, and then the projected ones."""
    classifier = build(read_method(scripts / "methods" / "maple.json"))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before, parameters = classifier.eval()(pixels).logits, trainable(classifier)
    assert sum(name.endswith("linear.weight") for name in parameters) == 6
    assert not any("vision" in name and not name.endswith(("weight", "bias")) for name in parameters)
    text = find_towers(classifier.model)["text"].sep_prompts["default"]
    with torch.no_grad():
        text.add_(1.0)
    projected = classifier(pixels).logits
    assert not torch.allclose(projected, before, atol=1e-3)
    uncouple(classifier.model)
    assert torch.equal(classifier(pixels).logits, projected)
    assert not any("linear" in name for name in trainable(classifier))
    with torch.no_grad():
        text.sub_(1.0)
    vision = find_towers(classifier.model)["vision"].sep_prompts["default"]
    assert vision.requires_grad and vision.shape == (2, 192)


def test_prompts_that_cannot_be_coupled(scripts, build):
    method = read_method(scripts / "methods" / "maple.json")
    with pytest.raises(ValueError) as error:
        build(replace(method, config=method.config | {"num_vision_prompts": 3}))
    assert str(error.value) == (
        "Coupled prompts need as many of the text tower as of the image tower, but there are [2, 2, 2, 2, 2, 2] and "
        "[3, 3, 3, 3, 3, 3] of them, layer by layer."
    )
    fused = build(replace(method, coupled=False, config={}))
    with pytest.raises(ValueError) as error:
        couple(fused.model)
    assert str(error.value) == 'Coupled prompts need a config with fusion="independent", but these prompts are fused.'


def test_random_selection_changes_sep_and_can_be_repeated(scripts, build):
    method = read_method(scripts / "methods" / "ablation-random-tokens.json")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, again, usual = build(method).eval(), build(method).eval(), build(replace(method, selection="representative"))
    with torch.no_grad():
        logits = first(pixel_values=pixels).logits
        assert torch.equal(again(pixel_values=pixels).logits, logits)
        assert not torch.allclose(usual.eval()(pixel_values=pixels).logits, logits, atol=1e-4)
        assert not torch.allclose(first(pixel_values=pixels).logits, logits, atol=1e-4)  # drawn anew


def test_zero_shot_is_the_model(scripts, build, assets):
    classifier = build(read_method(scripts / "methods" / "zero-shot.json")).eval()
    processor = AutoProcessor.from_pretrained(assets / "clip-small")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = processor.tokenizer([f"a photo of a {name}." for name in NAMES], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = classifier.model(pixel_values=pixels, **texts).logits_per_image
        assert torch.allclose(classifier(pixel_values=pixels).logits, expected, atol=1e-4)


def features(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def test_tip_adapter_is_its_formula(scripts, build):
    classifier = build(read_method(scripts / "methods" / "tip-adapter.json")).eval()
    assert isinstance(classifier, TipAdapter)
    keys, labels, queries = features(6, 128, 1), torch.tensor([0, 0, 1, 1, 2, 2]), features(4, 128, 2)
    chosen = classifier.fit(keys, labels, features(9, 128, 3), torch.arange(9) % 3)
    text = classifier.text_embeds()
    for query, found in zip(queries, classifier.logits(queries), strict=True):
        for c in range(3):
            cached = sum(
                torch.exp(-chosen["beta"] * (1 - query @ key)) for key, y in zip(keys, labels, strict=True) if y == c
            )
            expected = classifier.model.logit_scale.exp() * query @ text[c] + chosen["alpha"] * cached
            assert torch.allclose(found[c], expected, atol=1e-4)
    classifier.set_classes(("crab", "chair"))
    expected = classifier.model.logit_scale.exp() * queries @ classifier.text_embeds().T
    assert torch.allclose(classifier.logits(queries), expected, atol=1e-5)


def test_linear_probe_learns_and_knows_its_classes(scripts, build):
    classifier = build(read_method(scripts / "methods" / "linear-probe.json"))
    assert isinstance(classifier, LinearProbe)
    centres = features(3, 128, 1)
    labels = torch.arange(30) % 3
    noisy = [torch.nn.functional.normalize(centres[labels] + 0.3 * features(30, 128, seed), dim=-1) for seed in (2, 3)]
    chosen = classifier.fit(noisy[0], labels, noisy[1], labels)
    assert chosen["validation accuracy"] == 100
    assert (classifier.logits(noisy[1]).argmax(dim=1) == labels).all()
    assert classifier.can_classify(list(NAMES)) and not classifier.can_classify(["crab", "chair"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_with_all_that_sep_has_beside_itself(build, write):
    """Prototypes in the loss and in predictions, and zero-shot beside it, against their equations."""
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    recipe = {"text_weight": 0, "vision_weight": 0}
    classifier = build(read_method(write(learner="lora", config=config, recipe=recipe)))
    plain = build(read_method(write(learner="lora", config=config, recipe=recipe | {"prototype_weight": 0})))
    zero_shot = build(read_method(write(learner="zero-shot")))
    pixels, labels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0, 2])
    cosine = torch.nn.functional.cosine_similarity
    v, v0 = plain.image_embeds(pixels), zero_shot.image_embeds(pixels)
    assert not torch.allclose(v, v0, atol=1e-3)

    classifier.reset_prototypes([{"pixel_values": pixels, "labels": labels}])
    prototypes = torch.stack([v0[1], zero_shot.text_embeds()[1], (v0[0] + v0[2]) / 2])
    torch.testing.assert_close(classifier.prototypes.data, prototypes)
    output = classifier.train()(pixel_values=pixels, labels=labels)
    terms = [cosine(x[:, None], prototypes[None], dim=-1) for x in (v, v0)]
    parts = [torch.nn.functional.cross_entropy(10 * term, labels) for term in terms]
    torch.testing.assert_close(output.loss, plain(pixels, labels).loss + 0.5 * sum(parts))
    output.loss.backward()
    assert all(p.grad is not None for p in trainable(classifier).values())

    logits = plain.eval()(pixels).logits
    torch.testing.assert_close(classifier.eval()(pixels).logits, logits)
    classifier.keep_prototypes(3.0)
    torch.testing.assert_close(classifier(pixels).logits, logits + 15 * (terms[0] + terms[1]))
    others = ("cup", "crab")
    both = classifier.set_classes(others, zero_shot_margin=1.5)(pixels).logits
    p, p0 = (model.set_classes(others).eval()(pixels).logits.softmax(dim=1) for model in (plain, zero_shot))
    torch.testing.assert_close(both, torch.maximum(p, 1.5 * p0).log())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_on_lora_and_on_the_frozen_model(build, write):
    """It reads the mean of both embeddings, is weighed against the frozen model, and knows its own classes only."""
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    recipe = {"text_weight": 0, "vision_weight": 0, "prototype_weight": 0}
    lora = build(read_method(write(learner="lora", config=config, recipe=recipe))).eval()
    frozen = build(read_method(write(learner="zero-shot"))).eval()
    pixels, labels = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
    others = ("cup", "crab")
    with torch.no_grad():
        for classifier in (lora, frozen):
            v, v0 = classifier.image_embeds(pixels), frozen.image_embeds(pixels)
            texts, zero_shot, new = (classifier(pixels).logits, frozen(pixels).logits, classifier.set_classes(others))
            new = new(pixels).logits
            text_embeds = classifier.set_classes(NAMES).text_embeds()
            head = fit_head("gda", (v + v0) / 2, labels, text_embeds, zero_shot)
            batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(4), slice(4, 9))]
            assert classifier.keep_head("gda", batches) == head.logit_weight
            added = head.logit_weight * ((v + v0) / 2 @ head.tensors["weight"].T + head.tensors["bias"])
            torch.testing.assert_close(classifier(pixels).logits, texts + added, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(classifier.set_classes(others)(pixels).logits, new)
            torch.testing.assert_close(classifier.set_classes(NAMES).train()(pixels).logits, texts)
            frozen.head = None
            frozen.eval()
