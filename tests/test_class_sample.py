"""Training steps that encode a sample of the class texts: by hand, in turn, and however they are shared out."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from epoch_images import Images
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from small_classifier import IMAGES, make_classifier, mix, raises
from small_clip import make_clip, make_texts
from transformers import Trainer, TrainerCallback, TrainingArguments

from sep_peft import SEPClassifier, SEPTrainer
from sep_peft.method.losses import prototype_loss
from sep_peft.method.recipe import Recipe
from sep_peft.training import EpochCallback, History, make_optimizer, make_schedule, train
from sep_peft.training.checkpoint import CHECKPOINT_FILE
from sep_peft.training.data import epoch_order
from sep_peft.training.optimizer import trainable
from sep_peft.tuner.model import find_towers


COUNT, SIZE = 9, 3
NAMES, TEMPLATES = make_texts([5, 3, 7, 4, 6, 5, 3, 4, 5]), make_texts([9, 7, 11, 8, 10, 9, 7, 8, 9], seed=5)
LABELS = torch.tensor([3, 0, 2, 2, 1])


def make(size: int | None = SIZE, **options) -> SEPClassifier:
    recipe = Recipe(class_sample=size, text_weight=3.0, vision_weight=2.0, prototype_weight=0.7)
    return make_classifier(NAMES, TEMPLATES, recipe=recipe, **options)


def gradients(classifier: SEPClassifier) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}


def by_hand(classifier: SEPClassifier, drawn: list[int], kept: torch.Tensor | None = None) -> torch.Tensor:
    """The loss, image by image and class by class."""
    towers = find_towers(classifier.model)
    frozen_text = F.normalize(towers["text"].embed_frozen(**TEMPLATES), dim=-1)
    text = mix(towers["text"].embed_prompted(**NAMES), frozen_text, 0.5)
    prompted, frozen_image = towers["vision"].embed(pixel_values=IMAGES)
    images, frozen_image = mix(prompted, frozen_image, 0.5), F.normalize(frozen_image, dim=-1)
    known = text.detach() if kept is None else kept

    def counted(c: int) -> torch.Tensor:
        """The class's embedding, whose gradient counts C / S times, or none where it was not drawn."""
        if c not in drawn:
            return known[c]
        return text[c].detach() + COUNT / len(drawn) * (text[c] - text[c].detach())

    scale = classifier.model.get_base_model().logit_scale.exp()
    losses = []
    for image, label in zip(images, LABELS.tolist(), strict=True):
        logits = [scale * image @ (text[c] if c == label else counted(c)) for c in range(COUNT)]
        losses.append(F.cross_entropy(torch.stack(logits), torch.tensor(label)))
    texts = sum(1 - counted(c) @ frozen_text[c] for c in range(COUNT)) / COUNT
    vision = 1 - (images * frozen_image).sum(-1).mean()
    anchors = [prototype_loss(each, classifier.prototypes, LABELS) for each in (images, frozen_image)]
    return sum(losses) / len(losses) + 3 * texts + 2 * vision + 0.7 * sum(anchors)


@pytest.mark.parametrize("config", [{}, {"start_layer": 1}], ids=str)
def test_a_step_by_hand(config):
    classifier, reference = make(config=config), make(config=config)
    output = classifier(IMAGES, LABELS)
    drawn = classifier.encoder.sample.draw(SIZE, 1)
    expected = by_hand(reference, drawn)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    expected.backward()
    found, wanted = gradients(classifier), gradients(reference)
    assert found.keys() == wanted.keys() and found
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def training(classifier: SEPClassifier, steps: int, rate: float = 0.05):
    """Trains for some steps; gives the loss of each, and the classes that were drawn."""
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=rate)
    losses, drawn = [], []
    for _ in range(steps):
        loss = classifier(IMAGES, LABELS).loss
        drawn.append(classifier.encoder.sample.draw(SIZE, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, drawn


def test_others_take_part_by_their_last_embeddings():
    """After some steps the loss is that by hand, with the embeddings as they were drawn or made last."""
    classifier = make()
    text, kept = find_towers(classifier.model)["text"], None
    for step in range(4):
        now = classifier.encoder.weights(training=True).text_embeds.detach()
        kept = now.clone() if kept is None else kept
        before = kept.clone()
        output = classifier(IMAGES, LABELS)
        drawn = classifier.encoder.sample.draw(SIZE, 1)
        kept[drawn] = now[drawn]
        torch.testing.assert_close(output.loss, by_hand(classifier, drawn, kept))
        assert step == 0 or not torch.allclose(before, now, atol=1e-4)  # they are old
        output.loss.backward()
        with torch.no_grad():
            optimizer = torch.optim.SGD(text.parameters(), lr=0.05)
            optimizer.step()
        classifier.zero_grad()


def test_all_classes_drawn_are_a_step_without_drawing():
    """Every class drawn, by the way of the sample, is the full step, loss and gradients."""
    sampled, full = make(), make(0)
    weights = sampled.encoder.sampled_weights(LABELS, COUNT, 1)
    found, expected = weights.text_embeds, full.encoder.weights(training=True).text_embeds
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights.own.embeds, expected[LABELS], rtol=0, atol=1e-6)
    for classifier, size in ((sampled, COUNT - 1), (full, 0)):
        classifier.recipe = replace(classifier.recipe, class_sample=size)
    sampled.recipe = replace(sampled.recipe, class_sample=COUNT)  # which is the full step itself
    losses = [classifier(IMAGES, LABELS).loss for classifier in (sampled, full)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert all(torch.equal(value, gradients(full)[name]) for name, value in gradients(sampled).items())


def test_gradients_are_those_of_all_classes_in_the_mean():
    """With fixed parameters: the loss of every draw is the full loss, and a round's mean gradient the full gradient."""
    full, sampled = make(0), make()
    expected = full(IMAGES, LABELS).loss
    expected.backward()
    for step in range(COUNT // SIZE):
        sampled.encoder.sample.take_state(
            {"embeds": full.encoder.weights(training=True).text_embeds.detach(), "steps": torch.tensor(step)}
        )
        loss = sampled(IMAGES, LABELS).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
    for name, value in gradients(full).items():
        mean = gradients(sampled)[name] / (COUNT // SIZE)
        torch.testing.assert_close(mean, value, rtol=1e-3, atol=1e-5, msg=name)


def test_classes_are_drawn_in_turn():
    """Every class once in a round, in another order in the next, and only as the optimizer makes steps."""
    _, drawn = training(make(), 6)
    for turn in (drawn[:3], drawn[3:]):
        assert sorted(itertools.chain(*turn)) == list(range(COUNT))
    assert drawn[:3] != drawn[3:]
    classifier = make(4)  # of nine classes: three parts that are as even as can be
    assert [len(classifier.encoder.sample.draw(4, 1))] == [3]
    classifier(IMAGES, LABELS).loss.backward()
    before = classifier.encoder.sample.draw(4, 1)
    classifier(IMAGES[:2], LABELS[:2]).loss.backward()  # another micro-batch
    torch.optim.SGD([classifier.prototypes], lr=0.1).step()  # of what class texts do not depend on
    assert classifier.encoder.sample.draw(4, 1) == before


def test_a_step_encodes_the_drawn_and_its_own():
    classifier = make(2)
    classifier(IMAGES, LABELS)
    rows = []
    layer = find_towers(classifier.model)["text"].base_layer.encoder.layers[0]
    layer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    classifier(IMAGES, LABELS)
    assert sum(rows) == len({*classifier.encoder.sample.draw(2, 1), 0, 1, 2, 3})
    rows.clear()
    classifier(IMAGES)  # without labels all are needed
    assert sum(rows) == COUNT


def changes():
    def of_loading(classifier):
        state = {name: value + 0.1 for name, value in get_peft_model_state_dict(classifier.model).items()}
        set_peft_model_state_dict(classifier.model, state)

    def of_data(classifier):
        for parameter in find_towers(classifier.model)["text"].parameters():
            parameter.data += 0.1

    def of_adapter(classifier):
        classifier.model.add_adapter("second", classifier.model.peft_config["default"])
        classifier.model.set_adapter("second")

    def of_state(classifier):
        classifier.load_state_dict({name: p + 0.1 for name, p in trainable(classifier).items()}, strict=False)

    return [of_loading, of_data, of_adapter, of_state]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_embeddings_of_other_parameters_are_not_kept(change):
    classifier = make()
    training(classifier, 3)
    change(classifier)
    loss = classifier(IMAGES, LABELS).loss
    classifier.recipe = replace(classifier.recipe, class_sample=0)
    torch.testing.assert_close(loss, classifier(IMAGES, LABELS).loss)


def test_other_classes_begin_anew():
    classifier = make()
    training(classifier, 3)
    classifier.set_classes(replace(classifier.classes, names=tuple("abcdefghi")))
    assert classifier.encoder.sample.state() == {}


# the same through all doors


RECIPE = Recipe(epochs=3, batch_size=2, learning_rate=0.01, class_sample=SIZE, calibration_folds=0)


def by_hand_loop(classifier, folder) -> None:
    images, optimizer = Images(), make_optimizer(classifier, RECIPE)
    schedule = make_schedule(optimizer, RECIPE, 3)
    for epoch in range(RECIPE.epochs):
        images.set_epoch(epoch)
        batches = torch.tensor(epoch_order(len(images), RECIPE.seed, epoch)).split(RECIPE.batch_size)
        for indices in batches:
            batch = torch.utils.data.default_collate([images[int(index)] for index in indices])
            classifier(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def by_loop(classifier, folder, **options) -> History:
    return train(classifier, Images(), RECIPE, checkpoint=folder / CHECKPOINT_FILE, quiet=True, **options)


def arguments(folder) -> TrainingArguments:
    options = {"save_strategy": "steps", "save_steps": 4, "report_to": "none", "use_cpu": True, "max_grad_norm": 0.0}
    options |= {"dataloader_pin_memory": False, "disable_tqdm": True, "seed": RECIPE.seed}
    return TrainingArguments(str(folder), num_train_epochs=3, per_device_train_batch_size=2, **options)


def by_trainer(classifier, folder, resume=None, callbacks=()) -> None:
    optimizer = make_optimizer(classifier, RECIPE)
    optimizers = optimizer, make_schedule(optimizer, RECIPE, 3)
    callbacks = [EpochCallback(), *callbacks]
    trainer = Trainer(classifier, arguments(folder), train_dataset=Images(), optimizers=optimizers, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)


def by_sep_trainer(classifier, folder, resume=None, **options) -> None:
    SEPTrainer(classifier, arguments(folder), train_dataset=Images(), **options).train(resume_from_checkpoint=resume)


def make_new() -> SEPClassifier:
    classifier = make()
    classifier.recipe = RECIPE
    return classifier


def trained(door, folder, **options) -> dict[str, torch.Tensor]:
    classifier = make_new()
    door(classifier, folder, **options)
    return {name: p.detach().clone() for name, p in trainable(classifier).items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(by_hand_loop, tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize("door", [by_loop, by_trainer, by_sep_trainer], ids=lambda door: door.__name__)
def test_every_door_trains_the_same(door, expected, tmp_path):
    found = trained(door, tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("killed")


def stop(history: History) -> None:
    if len(history) == 2:
        history.stop("enough")


@pytest.mark.parametrize("door", [by_loop, by_trainer, by_sep_trainer], ids=lambda door: door.__name__)
def test_training_goes_on_bit_for_bit(door, tmp_path):
    """`train` after two epochs; Trainer in the middle of an epoch, where embeddings are of different ages."""
    whole = trained(door, tmp_path / "whole")
    if door is by_loop:
        by_loop(make_new(), tmp_path, callbacks=[stop])
        found = trained(by_loop, tmp_path)
    else:
        with pytest.raises(RuntimeError, match="killed"):
            trained(door, tmp_path, callbacks=[KillAt()])
        found = trained(door, tmp_path, resume=True)
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_what_is_kept_is_in_checkpoints_and_not_in_adapters(tmp_path):
    classifier = make_new()
    by_trainer(classifier, tmp_path)
    state = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(state) == {*trainable(classifier), "encoder.sample.embeds", "encoder.sample.steps"}
    assert state["encoder.sample.steps"] == 4
    classifier.save_pretrained(tmp_path / "adapter")
    names = {name for file in (tmp_path / "adapter").glob("*.safetensors") for name in load_file(file)}
    assert names and not any("sample" in name or "embeds" in name for name in names)
    assert set(dict(classifier.named_buffers())) == set(dict(make(0).named_buffers()))


def test_a_state_of_other_classes_or_models():
    classifier = make()
    message = (
        "The kept class texts must be embeds (9, embedding size) and steps (), but got {'embeds': (8, 24), 'steps': "
        "()}. Begin the training anew."
    )
    with raises(message):
        classifier.take_steps_state({"embeds": torch.zeros(8, 24), "steps": torch.tensor(2)})
    assert classifier.steps_state() == {}
    classifier.take_steps_state({"embeds": torch.zeros(9, 20), "steps": torch.tensor(2)})
    message = (
        "The kept class texts have the shape (9, 20), but the model's embeddings of the classes (9, 24): they were "
        "made with another base model. Begin the training anew."
    )
    with raises(message):
        classifier(IMAGES, LABELS)


# with what else changes a step


def test_activation_checkpoints_and_autocast():
    """The same gradients where activations are computed again, and nearly the same in bf16."""
    found = []
    for way in ("plain", "chunks", "checkpointed", "autocast"):
        classifier = make(kept_tokens=0, chunk_size=2) if way == "chunks" else make()
        if way == "checkpointed":
            classifier.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = classifier(IMAGES, LABELS).loss
        loss.backward()
        found.append(torch.cat([g.flatten() for g in gradients(classifier).values()]))
    for other in found[1:3]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-5)
    assert F.cosine_similarity(found[3], found[0], dim=0) > 0.98


def test_a_compiled_step():
    """Loss, draws and what is kept are those of a step that is not compiled."""
    found = []
    for compiled in (False, True):
        clip = make_clip(text_layers=1, vision_layers=1)  # the compiler's time grows with the layers
        classifier = make(config={"clip": clip})
        call = torch.compile(classifier, backend="eager", dynamic=False) if compiled else classifier
        optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            loss = call(IMAGES, LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((loss, classifier.steps_state()))
    torch.testing.assert_close(found[1], found[0])


def test_a_copy_goes_its_own_way():
    classifier = make()
    training(classifier, 2)
    copied = deepcopy(classifier)
    assert training(copied, 3) == training(classifier, 3)


def test_batch_coupled_adapters_need_all_classes():
    message = (
        "class_sample=3 cannot be used with batch_coupled=True, where every class text sees every other. Pass a recipe "
        "with class_sample=0."
    )
    with raises(message):
        make(config={"batch_coupled": True})(IMAGES, LABELS)


def test_the_default_draws_where_there_are_many_classes():
    assert [Recipe().drawn_classes(count) for count in (2, 256, 257, 21_000)] == [2, 256, 64, 64]
    assert [Recipe(class_sample=20).drawn_classes(count) for count in (10, 20, 100)] == [10, 20, 20]
    assert Recipe.published().drawn_classes(1000) == 1000
