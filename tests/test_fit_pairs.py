"""Training on images with captions: the losses are the models' own, in one process or two, at once or in chunks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bundled import shallow_clip
from families import CASES
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_classifier import raises
from small_clip import perturb
from small_pairs import gradients, make_model, make_pairs, make_processor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel
from transformers.models.clip.modeling_clip import CLIPAttention

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.embeddings import embed_texts
from sep_peft.method.contrastive import own_texts, sigmoid_loss, softmax_loss
from sep_peft.training import Pair, PairsRecipe, TrainingInterrupted, evaluate_pairs, fit_pairs, pair_model
from sep_peft.training.captions import Captions
from sep_peft.training.checkpoint import CHECKPOINT_FILE
from sep_peft.training.pair_images import NEGATIVE_NUMBER, OWN_NUMBERS, TEXT, TEXT_NUMBER, PairedImages
from sep_peft.training.pair_model import PairModel
from sep_peft.training.pair_step import PairStep
from sep_peft.training.steps import Share
from sep_peft.tuner.model import find_towers


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def step_of(model, batch, recipe=None, chunk_size=None, count=None):
    """What a step of one process found, after its gradients."""
    vision = find_towers(model)["vision"]
    count = count or len(batch[TEXT_NUMBER])
    step = PairStep(vision, recipe or PairsRecipe())
    return step(PairModel(model, chunk_size).train(), batch, Share(count, count), Accelerator(device_placement=False))


def make_batch(model, processor, pairs, recipe=None, epoch=0) -> dict[str, torch.Tensor]:
    images = PairedImages(pairs, Captions(model, processor, pairs), processor, recipe or PairsRecipe())
    images.set_epoch(epoch)
    return torch.utils.data.default_collate([images[index] for index in range(len(pairs))])


# losses


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_is_the_models_own(name):
    """What transformers computes with `return_loss=True` of the same model with its adapter."""
    case = CASES[name]
    model = get_peft_model(case.model(case.config()).eval(), SEPConfig(num_text_prompts=2, num_vision_prompts=2))
    perturb(model)
    texts, pixels = case.text([5, 4, 7]), case.image(3)
    with torch.no_grad():
        expected = model(**texts, **pixels, return_loss=True).loss
    numbers = torch.arange(3)
    batch = {f"{TEXT}{key}": value for key, value in texts.items()} | pixels
    batch |= {TEXT_NUMBER: numbers, OWN_NUMBERS: numbers[:, None]}
    found = step_of(model, batch, PairsRecipe(text_weight=0, vision_weight=0))
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    other = {"clip": "sigmoid", "siglip": "softmax"}[name]
    assert step_of(model, batch, PairsRecipe(text_weight=0, vision_weight=0, loss=other)).loss != found.loss


def by_hand(logits, own, columns, sigmoid):
    """Every comparison by itself."""
    count, terms = len(logits), []
    for i in range(count):
        counted = [j for j in range(columns) if j == i or not own[i][j]]
        if sigmoid:
            terms += [-torch.log(torch.sigmoid(logits[i, j] if i == j else -logits[i, j])) for j in counted]
        else:
            terms.append((logits[i, counted].exp().sum().log() - logits[i, i]) / 2)
            rows = [k for k in range(count) if k == i or not own[k][i]]
            terms.append((logits[rows, i].exp().sum().log() - logits[i, i]) / 2)
    return sum(terms) / count


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_texts_that_are_the_images_own_are_no_negatives_of_it(loss):
    """Image 0 and 2 have one caption in common, and column 4 is a hard negative that is a caption of image 1."""
    image_texts = torch.tensor([[5, 7], [6, -1], [5, 8], [9, -1]])
    texts = torch.tensor([5, 6, 5, 9, 6, 4])
    own = own_texts(image_texts, texts)
    assert own.nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [1, 4], [2, 0], [2, 2], [3, 3]]
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = by_hand(logits, own.tolist(), 6, loss is sigmoid_loss)
    assert loss(logits, own).item() == pytest.approx(expected.item(), rel=1e-9)


def test_consistency_with_the_frozen_model(processor):
    pairs = make_pairs(4)
    found = {}
    for weights in ((0.0, 0.0), (2.0, 0.0), (0.0, 300.0)):
        model = make_model()
        recipe = PairsRecipe(text_weight=weights[0], vision_weight=weights[1])
        batch = make_batch(model, processor, pairs)
        found[weights] = step_of(model, batch, recipe).loss.item()
        with torch.no_grad():
            embeds = PairModel(model.eval())(**batch)
    text = 2 * (1 - (embeds.text * embeds.frozen_text).sum(dim=1).mean()).item()
    vision = 300 * (1 - (embeds.image * embeds.frozen_image).sum(dim=1).mean()).item()
    assert text > 0.1 and vision > 0.1
    assert found[2.0, 0.0] - found[0.0, 0.0] == pytest.approx(text, rel=1e-4)
    assert found[0.0, 300.0] - found[0.0, 0.0] == pytest.approx(vision, rel=1e-4)


def test_hard_negatives_join_the_captions(processor):
    """Images without one have a placeholder, which must not count."""
    model, pairs = make_model(), make_pairs(5, negatives=True)
    recipe = PairsRecipe(text_weight=0, vision_weight=0)
    batch = make_batch(model, processor, pairs)
    assert batch[NEGATIVE_NUMBER].ge(0).tolist() == [False, True, False, True, False]
    with torch.no_grad():
        embeds = PairModel(model.eval())(**batch)
        scale = model.base_model.model.logit_scale.exp()
        texts = torch.cat([embeds.text, embeds.negative[1:4:2]])
        expected = softmax_loss(scale * embeds.image @ texts.T, torch.eye(5, 7, dtype=torch.bool))
    assert step_of(model, batch, recipe).loss.item() == pytest.approx(expected.item(), rel=1e-5)


# chunks


class Allocated(TorchDispatchMode):
    """Counts bytes of tensors that operations make and that live, and the most of them."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def test_chunks_have_the_gradients_of_the_whole_batch_in_the_memory_of_one(processor):
    pairs, found = make_pairs(16), {}
    for name, count, size in (("whole", 16, None), ("chunks", 16, 2), ("small", 2, None)):
        model = make_model()
        batch = {key: value[:count] for key, value in make_batch(model, processor, pairs).items()}
        with Allocated() as allocated:
            outcome = step_of(model, batch, chunk_size=size)
        found[name] = outcome.loss, gradients(model), allocated.most
    check_same(found["chunks"], found["whole"])
    assert found["chunks"][2] < 1.3 * found["small"][2] and found["chunks"][2] < 0.6 * found["whole"][2]


def check_same(chunks, whole):
    assert chunks[0].item() == pytest.approx(whole[0].item(), rel=1e-6)
    assert (chunks[1] - whole[1]).norm() < 1e-5 * whole[1].norm() and whole[1].norm() > 0.01


def test_chunks_share_nothing_below_the_first_prompts(processor):
    """With `start_layer` above 0 both passes have the layers below in common, which a chunk runs for each."""
    found = []
    for size in (2, None):
        model = make_model(start_layer=1)
        outcome = step_of(model, make_batch(model, processor, make_pairs(5)), chunk_size=size)
        found.append((outcome.loss, gradients(model)))
    check_same(*found)


def test_a_chunk_is_computed_again_with_its_own_dropout(processor, monkeypatch):
    model = make_model()
    for module in model.modules():
        if isinstance(module, CLIPAttention):
            module.dropout = 0.5
    batch, found = make_batch(model, processor, make_pairs(4)), []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(pair_model, "checkpoint", lambda embed, use_reentrant, **chunk: embed(**chunk))
        model.zero_grad()
        torch.manual_seed(0)
        found.append((step_of(model, batch, chunk_size=2).loss, gradients(model)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert step_of(model, batch, chunk_size=2).loss != found[0][0]  # dropout is on


# the loop


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


#: Batches of 3, 3 and 1 images, of which a second process has none of the last.
RECIPE = PairsRecipe(epochs=2, batch_size=3, learning_rate=0.01)


def train_and_write(folder: Path, processor, accelerator: Accelerator) -> None:
    """Train, and write what was trained and the rows of the history into files named by the number of processes."""
    model, pairs = make_model(), make_pairs(negatives=True)
    options = {"processor": processor, "eval_pairs": pairs, "accelerator": accelerator, "quiet": True}
    passes: list[int] = []
    for tower in find_towers(model).values():
        tower.base_layer.register_forward_hook(lambda *_: passes.append(1))
    chunk_size = None if accelerator.num_processes == 1 else 1
    history = fit_pairs(model, pairs, RECIPE, chunk_size=chunk_size, **options)
    (folder / f"passes-{accelerator.process_index}.txt").write_text(f"{len(passes)}")
    if accelerator.is_main_process:
        save_file(trained(model), folder / f"{accelerator.num_processes}.safetensors")
        (folder / f"{accelerator.num_processes}.json").write_text(json.dumps(history.rows))


def work(rank: int, port: int, folder: Path, processor) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process that this one was forked from
    accelerator = Accelerator(cpu=True)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, 2)
    train_and_write(folder, processor, accelerator)


def test_two_processes_train_as_one(processor, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train_and_write(tmp_path, processor, Accelerator(device_placement=False))
    context = multiprocessing.get_context("fork")
    arguments = [(rank, port, tmp_path, processor) for rank in range(2)]
    processes = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    # processes that hold layers together need each other for every pass
    assert len({(tmp_path / f"passes-{rank}.txt").read_text() for rank in range(2)}) == 1
    one, two = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2))
    before = trained(make_model())
    moved = sum((one[name] - before[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert moved > 0.1 and apart < 1e-3 * moved
    rows = [json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2)]
    for first, second in zip(*rows, strict=True):
        assert second == pytest.approx(first, rel=1e-4)


class Killed(Exception):
    """In the place of a kill."""


def after(epochs, act, history):
    if len(history) == epochs:
        act()


def kill():
    raise Killed


@pytest.fixture(scope="module")
def unbroken(processor):
    """The rows of an unbroken training and what it trained."""
    model, pairs = make_model(), make_pairs()
    history = fit_pairs(model, pairs, RECIPE, processor=processor, eval_pairs=pairs, quiet=True)
    return history, trained(model)


def test_a_killed_training_goes_on_bit_for_bit(unbroken, processor, tmp_path):
    pairs = make_pairs()
    options = {"processor": processor, "eval_pairs": pairs, "folder": tmp_path, "quiet": True}
    with pytest.raises(Killed):
        fit_pairs(make_model(), pairs, RECIPE, callbacks=[partial(after, 1, kill)], **options)
    with raises(
        f"{tmp_path} has a training that ended after 1 of 2 epochs. Pass resume=True to go on with it, or remove "
        f"{CHECKPOINT_FILE} there to begin anew.",
        FileExistsError,
    ):
        fit_pairs(make_model(), pairs, RECIPE, **options)
    other = [*pairs[1:], replace(pairs[0], captions=("another",))]
    with pytest.raises(ValueError, match="is a checkpoint of another training \\(samples differ\\)"):
        fit_pairs(make_model(), other, RECIPE, resume=True, **options)
    model = make_model()
    history = fit_pairs(model, pairs, RECIPE, resume=True, **options)
    assert history == unbroken[0]
    assert all(torch.equal(value, unbroken[1][name]) for name, value in trained(model).items())
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["images"], settings["captions"]) == ({"training": 7, "validation": 7}, 13)
    names = (tmp_path / "run/log.csv").read_text().splitlines()[0].split(",")
    assert {"val_recall", "val_image_to_text_1", "val_text_to_image_10", "frozen_image_to_text_5"} <= set(names)


def test_ctrl_c_leaves_what_was_trained(unbroken, processor, tmp_path):
    model, pairs, seen = make_model(), make_pairs(), []

    def interrupt():
        seen.append(trained(model))
        os.kill(os.getpid(), signal.SIGINT)

    options = {"processor": processor, "folder": tmp_path, "quiet": True, "keep": "last"}
    with pytest.raises(TrainingInterrupted) as interruption:
        fit_pairs(model, pairs, RECIPE, callbacks=[partial(after, 1, interrupt)], **options)
    assert (interruption.value.history.stopped, len(interruption.value.history)) == ("Ctrl-C", 1)
    assert not model.training and all(torch.equal(value, seen[0][name]) for name, value in trained(model).items())
    assert (tmp_path / CHECKPOINT_FILE).exists()


def test_what_is_told_of_an_epoch(unbroken, processor):
    history = unbroken[0]
    assert [row["epoch"] for row in history] == [1, 2] and all(0 <= row["accuracy"] <= 100 for row in history)
    model = make_model()
    found = evaluate_pairs(model, make_pairs(), processor, batch_size=3)
    with model.disable_adapter():
        base = evaluate_pairs(model, make_pairs(), processor)
    assert found.frozen == base.adapted and found.frozen != found.adapted
    assert history.zero_shot == pytest.approx(base.adapted.mean)
    assert {f"frozen_{name}": share for name, share in base.adapted.named().items()} == {
        name: share for name, share in history[0].items() if name.startswith("frozen_")
    }
    assert history[-1]["val_recall"] == pytest.approx(
        sum(share for name, share in history[-1].items() if name.startswith(("val_image", "val_text"))) / 6
    )


def test_an_epoch_shows_one_caption_of_each_image(processor):
    model, pairs = make_model(), make_pairs(7, negatives=True)
    batches = [make_batch(model, processor, pairs, epoch=epoch) for epoch in range(6)]
    again = make_batch(model, processor, pairs, epoch=3)
    assert all(torch.equal(value, batches[3][name]) for name, value in again.items())
    drawn = torch.stack([batch[TEXT_NUMBER] for batch in batches])  # (epochs, images)
    assert (batches[0][OWN_NUMBERS][:, :, None] == drawn.T[:, None]).any(dim=1).all()
    assert [len(set(column)) for column in drawn.T.tolist()] == [1, *[2] * 6]
    other = make_batch(model, processor, pairs, PairsRecipe(seed=2))
    assert not torch.equal(other[TEXT_NUMBER], batches[0][TEXT_NUMBER])


# files


def test_an_adapter_without_classes_loads_and_embeds(processor, tmp_path):
    model = make_model()
    fit_pairs(model, make_pairs(4), replace(RECIPE, epochs=1), processor=processor, quiet=True)
    model.save_pretrained(tmp_path)
    expected = embed_texts(model, processor, ["a red thing"])
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(shallow_clip(2)), tmp_path)
    assert torch.allclose(embed_texts(loaded, processor, ["a red thing"]), expected, atol=1e-6)
    classifier = SEPClassifier.from_class_names(loaded, processor, ["red", "green"])
    assert torch.allclose(classifier.embed_texts(["a red thing"]), expected, atol=1e-6)


# mistakes


def changed(config=None, change=None):
    model = make_model(**(config or {}))
    return model if change is None else (change(model), model)[1]


def scale_trains(model):
    model.base_model.model.logit_scale.requires_grad_(True)


LONG = "word " * 90
MISTAKES = {
    "no pairs": ({}, [], {}, "There are no images with captions to train on."),
    "no pairs to validate on": ({}, None, {"eval_pairs": []}, "There are no images with captions to validate on."),
    "blank": (
        *({}, [("a.jpg", "cat"), ("b.jpg", ["dog", " "])], {}),
        "One of the captions of pair 1 ('b.jpg') is blank. Write what the image shows, or leave it out.",
    ),
    "surrogate": (
        *({}, [("a.jpg", "cat \ud800")], {}),
        "One of the captions of pair 0 ('a.jpg') is no text that UTF-8 can hold: 'cat \\ud800'. Leave it out.",
    ),
    "no caption": ({}, [("a.jpg", [])], {}, "Pair 0 ('a.jpg') has no caption."),
    "long": (
        *({}, [("a.jpg", "cat"), ("b.jpg", LONG)], {}),
        "1 of 2 captions is longer than the 71 tokens that the text tower has room for beside the prompts (BOS and "
        f"EOS included). The first is '{LONG.strip()[:97]}...{LONG.strip()[-98:]}' of pair 1 ('b.jpg'), with 92. "
        'Shorten them, use fewer prompts (num_text_prompts), or pass long_captions="cut"; on the command line '
        "--text-prompts and --cut.",
    ),
    "unknown choice": (
        *({}, [("a.jpg", "cat")], {"long_captions": "drop"}),
        'long_captions must be "refuse" or "cut", but got \'drop\'.',
    ),
    "chunk": (
        *({}, [("a.jpg", "cat")], {"chunk_size": 0}),
        "chunk_size must be a whole number of at least 1, but got 0.",
    ),
    "patience": (
        *({}, [("a.jpg", "cat")], {"patience": 2}),
        "patience=2 needs eval_pairs, on which the model gets better or does not.",
    ),
    "frozen": (
        *({"change": lambda model: model.requires_grad_(False)}, [("a.jpg", "cat")], {}),
        "There is nothing to train: every parameter of the adapter is frozen. A loaded adapter is trained on with "
        "PeftModel.from_pretrained(..., is_trainable=True).",
    ),
    "scale": (
        *({"change": scale_trains}, [("a.jpg", "cat")], {}),
        "logit_scale of CLIPModel requires gradients, but it stays as the model has it: no adapter holds it. Call "
        "requires_grad_(False) on it.",
    ),
    "coupled": (
        *({"config": {"batch_coupled": True}}, [("a.jpg", "cat")], {}),
        "An adapter with batch_coupled=True embeds an image by the others beside it, so it cannot be trained on images "
        "with captions. Make one with batch_coupled=False.",
    ),
}


@pytest.mark.parametrize(("model", "pairs", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_anything_is_loaded(model, pairs, options, message, processor):
    with raises(message):
        fit_pairs(changed(**model), [("a.jpg", "cat")] if pairs is None else pairs, processor=processor, **options)


def test_long_captions_are_cut_with_a_warning(processor):
    pairs = [replace(pair, captions=(LONG,)) if index == 1 else pair for index, pair in enumerate(make_pairs(3))]
    model = make_model()
    with pytest.warns(UserWarning, match="1 of 4 captions is longer than 71 tokens; its end is not read."):
        captions = Captions(model, processor, pairs, "cut")
    assert captions.inputs["input_ids"].shape == (4, 71)


def test_wrong_types(processor):
    model, call = make_model(), partial(fit_pairs, processor=processor)
    with raises("recipe must be a sep_peft.training.PairsRecipe, but got 5.", TypeError):
        call(model, make_pairs(), 5)
    with raises(
        "Pairs must be a list of images with captions, but got 'pairs.jsonl'. Read a file or a folder with "
        "sep_peft.training.read_pairs.",
        TypeError,
    ):
        call(model, "pairs.jsonl")
    with raises("A pair is an image and its captions, but pair 0 is 'a.jpg'.", TypeError):
        call(model, ["a.jpg"])
    with raises("The captions of pair 0 ('a.jpg') must be texts, but one is 5.", TypeError):
        call(model, [("a.jpg", ["cat", 5])])
    with raises("'cat' is both a caption and a negative of pair 0 ('a.jpg'). Keep one of them."):
        call(model, [Pair("a.jpg", ("cat",), ("cat",))])
    with raises(
        "The model needs a SEP adapter on a text and an image tower, but has none. Make one with "
        "peft.get_peft_model(model, SEPConfig())."
    ):
        call(torch.nn.Linear(2, 2), make_pairs())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("loss", "hinge", "None or one of softmax, sigmoid"),
        ("mirror", 1, "True or False"),
        ("text_weight", -1, "a finite number of at least 0"),
        ("batch_size", 0, "an integer of at least 1"),
    ],
)
def test_what_a_recipe_may_be(name, value, allowed):
    with raises(f"{name} must be {allowed}, but got {value!r}."):
        PairsRecipe(**{name: value})
