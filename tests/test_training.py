"""The loop and `fit`: every door gives the same losses, killed training goes on, mistakes are found before anything."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bundled import shallow_clip
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.training import (
    EpochCallback,
    EpochSampler,
    LabelledImages,
    Recipe,
    fit,
    make_optimizer,
    make_schedule,
)
from sep_peft.training.epochs import share_out
from sep_peft.training.folders import read_folder
from sep_peft.training.optimizer import count_steps, trainable


EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["butterfly", "lamp", "pizza"]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(shallow_clip())


@pytest.fixture(scope="module")
def folder():
    return read_folder(EXAMPLES / "assets/caltech101", shots=16, seed=1)


@pytest.fixture(scope="module")
def samples(folder):
    """Three images of each of three classes."""
    return [sample for name in NAMES for sample in [s for s in folder.train if s[1] == name][:3]]


@pytest.fixture
def make(processor):
    def make(names=NAMES, recipe=None, layers=4, **config) -> SEPClassifier:
        set_seed(1)
        model = get_peft_model(AutoModel.from_pretrained(shallow_clip(layers)), SEPConfig(**config))
        return SEPClassifier.from_class_names(model, processor, names, recipe=recipe)

    return make


def raises(message: str, error: type[Exception] = ValueError):
    """The whole message."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


class Enough(Exception):
    """Ends training after as many steps as were asked for."""


def record(classifier: torch.nn.Module, steps: int | None = None) -> list[float]:
    """The losses of the classifier's training steps from here on; one more than `steps` raises `Enough`."""
    losses: list[float] = []

    def note(module, args, output):
        if module.training and output.loss is not None:
            if len(losses) == steps:
                raise Enough
            losses.append(output.loss.item())

    classifier.register_forward_hook(note)
    return losses


def state(classifier: SEPClassifier) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(classifier).items()}


# doors


def by_hand(classifier, samples, recipe, processor, folder) -> None:
    """As the head of `sep_peft.training` has it."""
    plain = LabelledImages(samples, classifier.class_names, processor)
    classifier.reset_prototypes(DataLoader(plain, recipe.batch_size))
    images = LabelledImages(samples, classifier.class_names, processor, recipe)
    loader = DataLoader(images, recipe.batch_size, sampler=EpochSampler(images, recipe.seed))
    optimizer = make_optimizer(classifier, recipe)
    schedule = make_schedule(optimizer, recipe, len(loader))
    classifier.train()
    for _ in range(recipe.epochs):
        for batch in loader:
            classifier(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def by_trainer(classifier, samples, recipe, processor, folder, **options) -> None:
    plain = LabelledImages(samples, classifier.class_names, processor)
    classifier.reset_prototypes(DataLoader(plain, recipe.batch_size))
    images = LabelledImages(samples, classifier.class_names, processor, recipe)
    optimizer = make_optimizer(classifier, recipe)
    schedule = make_schedule(optimizer, recipe, -(-len(images) // recipe.batch_size))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        max_grad_norm=0.0,
        seed=recipe.seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    Trainer(classifier, arguments, train_dataset=images, optimizers=(optimizer, schedule), **options).train()


def by_fit(classifier, samples, recipe, processor, folder) -> None:
    fit(classifier, samples, recipe, quiet=True)


def by_few_shot(classifier, samples, recipe, processor, folder) -> None:
    sys.path.insert(0, str(EXAMPLES / "few_shot"))
    from accelerate import Accelerator
    from methods import Method
    from protocols import Plan
    from readers import ImageSet, Sample
    from sampling import Draw
    from training import fit as few_shot_fit

    from sep_peft.classifier.images import read_image

    names = tuple(classifier.class_names)
    train = [Sample(str(path), names.index(name)) for path, name in samples]
    data = ImageSet("caltech101", names, {"train": train, "val": [], "test": []}, read_image)
    plan = Plan(data, Draw(train, [], []), [])
    method = Method("sep", "sep", recipe=recipe)
    few_shot_fit(classifier, method, plan, processor, Accelerator(cpu=True), folder, recipe.seed, workers=0)


def test_all_doors_give_the_losses_of_the_quickstarts_first_epoch(make, folder, processor, tmp_path):
    """Own loop, Trainer, `fit` and few_shot, on the quickstart's images, each stopped in its second epoch of 30.

    The model is the quickstart's with two of its layers: how deep it is makes no difference between doors.
    """
    base = folder.names[: (len(folder.names) + 1) // 2]
    samples = [sample for sample in folder.train if sample[1] in base]
    assert (len(base), len(samples)) == (10, 160)
    recipe, found = Recipe(), {}
    for door in (by_hand, by_trainer, by_fit, by_few_shot):
        classifier = make(base, recipe, layers=2)
        losses = record(classifier, steps=6)
        (tmp_path / door.__name__).mkdir()
        with pytest.raises(Enough):
            door(classifier, samples, recipe, processor, tmp_path / door.__name__)
        found[door.__name__] = losses
    assert len(set(found["by_hand"])) == 6  # an epoch has five steps
    for door, losses in found.items():
        assert losses == pytest.approx(found["by_hand"], rel=1e-5), door


def test_trainer_shows_the_epochs_of_fit(make, samples, processor, tmp_path):
    """Order and augmentation of later epochs too, with and without the callback that many processes need."""
    recipe = Recipe(epochs=3, batch_size=4, calibration_folds=0)
    found = []
    for door in (by_fit, by_trainer, partial(by_trainer, callbacks=[EpochCallback()])):
        classifier = make(recipe=recipe)
        losses = record(classifier)
        door(classifier, samples, recipe, processor, tmp_path)
        found.append(losses)
    assert len(found[0]) == 9
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_the_callback_tells_the_epoch_where_trainer_does_not(samples, processor):
    images = LabelledImages(samples, NAMES, processor, Recipe())
    callback, loader = EpochCallback(), DataLoader(images, 2)
    assert isinstance(callback, TrainerCallback)
    for epoch, expected in ((0, 0), (1.0, 1), (2.5, 2)):  # resumed in the middle of an epoch
        state = type("State", (), {"epoch": epoch})
        callback.on_epoch_begin(None, state, None, train_dataloader=loader)
        assert images.epoch == expected


# the loop


def test_learning_rates():
    weight = torch.nn.Parameter(torch.ones(1))
    for recipe, expected in (
        (Recipe(2, learning_rate=1.0, warmup_epochs=1), [0, 0.25, 0.5, 0.75, 1, 0.8536, 0.5, 0.1464]),
        (Recipe(1, learning_rate=1.0, warmup_epochs=0), [1, 0.8536, 0.5, 0.1464]),
        (Recipe(9, learning_rate=1.0, warmup_epochs=0, max_steps=2), [1, 0.5]),
        (Recipe(1, learning_rate=1.0, warmup_epochs=0, max_steps=99), [1, 0.8536, 0.5, 0.1464]),
    ):
        optimizer = make_optimizer({"weight": weight}, recipe)
        schedule, rates = make_schedule(optimizer, recipe, 4), []
        assert count_steps(recipe, 4) == len(expected)
        for _ in expected:
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx(expected, abs=1e-4)


def test_weight_decay_of_the_recipe():
    weight = torch.nn.Parameter(torch.ones(1))
    (group,) = make_optimizer({"weight": weight}, Recipe(weight_decay=0.2)).param_groups
    assert (group["weight_decay"], group["eps"]) == (0.2, 1e-8)


@pytest.mark.parametrize(("count", "batch", "processes"), [(10, 5, 2), (7, 4, 3), (4, 4, 1), (9, 4, 4)])
def test_shares_are_the_whole(count, batch, processes):
    order = torch.randperm(count).tolist()
    shared = [share_out(order, batch, process, processes) for process in range(processes)]
    seen = []
    for step in range(-(-count // batch)):
        parts = [(indices[step], *sizes[step]) for indices, sizes in shared]
        assert {whole for _, _, whole in parts} == {sum(own for _, own, _ in parts)}
        assert all(len(indices) == max(own, 1) for indices, own, _ in parts)
        seen += [index for indices, own, _ in parts for index in indices[:own]]
    assert sorted(seen) == list(range(count))


def test_what_is_told_of_each_epoch(make, samples):
    recipe = Recipe(epochs=3, batch_size=4, calibration_folds=0, max_steps=7, learning_rate=0.01)
    classifier = make(recipe=recipe)
    losses = record(classifier)
    entries = fit(classifier, samples, quiet=True)
    assert [entry["epoch"] for entry in entries] == [1, 2, 3] and len(losses) == 7
    sizes = [4, 4, 1]
    assert entries[1]["loss"] == pytest.approx(sum(a * b for a, b in zip(losses[3:6], sizes, strict=True)) / 9)
    assert entries[2]["loss"] == pytest.approx(losses[6])
    assert all(0 <= entry["accuracy"] <= 100 for entry in entries)
    assert entries[-1]["lr"] == 0


# fit


def in_order(prediction: list[dict]) -> list[dict]:
    """Of the classes, not of their scores."""
    return sorted(prediction, key=lambda entry: NAMES.index(entry["label"]))


def test_fit_ends_in_evaluation_with_prototypes_that_predict(make, samples):
    classifier = make(["crab", *NAMES], Recipe(epochs=1)).set_classes(NAMES)
    fit(classifier, samples, quiet=True)
    assert not classifier.training
    assert classifier.classes.prototype_logit_weight == 5 and classifier.classes.zero_shot_margin == 0
    assert classifier.predict(samples[0][0], top_k=1)[0]["label"] == "butterfly"
    images = torch.stack([LabelledImages(samples, NAMES, classifier.processor)[0]["pixel_values"]])
    scores = classifier(images).logits.softmax(dim=-1)[0].tolist()  # no call of eval() in between
    assert scores == pytest.approx([entry["score"] for entry in in_order(classifier.predict(samples[0][0]))], abs=1e-5)


def test_the_recipe_of_fit_becomes_the_classifiers(make, samples):
    classifier, recipe = make(), Recipe.published(epochs=1)
    fit(classifier, samples, recipe, quiet=True)
    assert classifier.recipe is recipe
    assert classifier.classes.prototypes is None and classifier.prototypes is not None
    assert classifier.set_classes(["crab"]).classes.zero_shot_margin == 0
    fit(classifier.set_classes(NAMES), samples, Recipe(epochs=1, prototype_weight=0.0), quiet=True)
    assert classifier.prototypes is None and classifier.classes.prototypes is None


#: Views, cache and `start_layer` without a trunk.
FROM_0 = ((3, None, 0), (3, "memory", 0))


def test_a_view_for_each_epoch_in_the_cache_is_training_without_one(make, samples, tmp_path):
    """With one view less the last epoch shows the first one's images."""
    found = []
    for views, cache, start_layer in ((3, None, 3), (3, "memory", 3), (2, "memory", 3), (2, tmp_path, 3), *FROM_0):
        classifier = make(start_layer=start_layer)
        losses = record(classifier)
        recipe = Recipe(epochs=3, batch_size=4, calibration_folds=0, views=views)
        fit(classifier, samples, recipe, quiet=True, cache=cache)
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2][:6] == pytest.approx(found[0][:6], rel=1e-4)
    assert found[2][6] != pytest.approx(found[0][6], rel=1e-3)
    assert found[3] == pytest.approx(found[2], rel=1e-4)
    assert list(tmp_path.glob("*.safetensors"))
    assert found[5] == pytest.approx(found[4], rel=1e-4)


def frozen(classifier: SEPClassifier) -> SEPClassifier:
    classifier.model.requires_grad_(False)
    return classifier


def switched_off(classifier: SEPClassifier) -> SEPClassifier:
    """Without prompts in the image tower."""
    classifier.vision_tower.delete_adapter("default")
    return classifier


FROZEN = (
    "There is nothing to train: every parameter of the model is frozen. A loaded adapter is trained on with "
    "SEPClassifier.from_pretrained(..., is_trainable=True)."
)
MISTAKES = {
    "no samples": (None, [], {}, "There are no images to train on."),
    "unknown": (None, [("a.jpg", "ant")], {}, "The classifier has no classes ant; it has butterfly, lamp, pizza."),
    "integers": (
        *(None, [("a.jpg", "lamp"), ("b.jpg", 1)], {}),
        "A sample is an image and the name of its class, but sample 1 has 1 in the place of a name. Take it from "
        "classifier.class_names.",
    ),
    "frozen": (frozen, [("a.jpg", "lamp")], {}, FROZEN),
    "nothing to cache": (
        *(switched_off, [("a.jpg", "lamp")], {"cache": "memory"}),
        "There is nothing to cache: no active adapter has prompts in the vision tower. Train without a cache.",
    ),
    "no processor": (
        *(lambda classifier: setattr(classifier, "processor", None) or classifier, [("a.jpg", "lamp")], {}),
        "This classifier has no processor to read images. Pass processor=AutoProcessor.from_pretrained(...).",
    ),
}


@pytest.mark.parametrize(("change", "given", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_anything_changes(change, given, options, message, make):
    classifier = (change or (lambda same: same))(make())
    before, recipe, prototypes = state(classifier), classifier.recipe, classifier.prototypes
    with raises(message):
        fit(classifier, given, Recipe.published(), **options)
    assert classifier.recipe is recipe and classifier.prototypes is prototypes and classifier.training
    assert all(torch.equal(p, before[name]) for name, p in state(classifier).items())


def test_a_loaded_adapter_is_frozen(make, samples, tmp_path):
    make().save_pretrained(tmp_path)
    with raises(FROZEN):
        fit(SEPClassifier.from_pretrained(AutoModel.from_pretrained(shallow_clip()), tmp_path), samples)


def test_no_recipe(make, samples):
    with raises("recipe must be a sep_peft.training.Recipe, but got {'epochs': 1}.", TypeError):
        fit(make(), samples, {"epochs": 1})
