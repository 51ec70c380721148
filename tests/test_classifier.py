"""`SEPClassifier`: loss, class texts and their cache, prediction, files, training."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from PIL import Image
from safetensors import safe_open
from small_clip import EOS, TEXT_POSITIONS, make_clip, make_images, make_texts, perturb
from transformers import AutoProcessor, CLIPModel, Trainer, TrainingArguments, image_utils

from sep_peft import SEPClassifier, SEPConfig, TaskClasses
from sep_peft.method.losses import sep_loss
from sep_peft.tuner.model import find_towers


ASSETS = Path(__file__).parents[1] / "examples/assets"
SMALL = {"num_text_prompts": 3, "num_vision_prompts": 2}
LENGTHS = [5, 3, 7, 4]
CLASSES = make_texts(LENGTHS)
TEMPLATES = make_texts([9, 7, 11, 8], seed=5)
OTHER_TEMPLATES = make_texts([6, 4, 8, 5], seed=6)
IMAGES = make_images(5)
LABELS = torch.tensor([3, 0, 2, 2, 1])


def make_model(adapter: str = "default", seed: int = 3, dtype: torch.dtype = torch.float32, **config) -> PeftModel:
    clip = make_clip().to(dtype)
    torch.manual_seed(seed)
    model = get_peft_model(clip, SEPConfig.published(**(SMALL | config)), adapter)
    perturb(model, adapter, seed=seed)
    return model


def make_classifier(class_inputs=CLASSES, template_inputs=TEMPLATES, *, config=None, **options) -> SEPClassifier:
    """Four classes over the tiny CLIP; in training mode, as new."""
    return SEPClassifier(make_model(**(config or {})), class_inputs, template_inputs, **options)


@torch.no_grad()
def logits_of(classifier: SEPClassifier) -> torch.Tensor:
    """In evaluation."""
    return classifier.eval()(IMAGES).logits


def raises(message: str, error: type[Exception] = ValueError):
    """The whole message."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


# loss


def mix(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float) -> torch.Tensor:
    prompted, frozen = F.normalize(prompted, dim=-1), F.normalize(frozen, dim=-1)
    return F.normalize(frozen_weight * frozen + (1 - frozen_weight) * prompted, dim=-1)


@pytest.mark.parametrize("frozen_weight", [0.5, 0.0, 0.8])
@pytest.mark.parametrize("templates", [TEMPLATES, [TEMPLATES, OTHER_TEMPLATES], None], ids=["one", "two", "none"])
def test_loss_and_logits_by_hand(templates, frozen_weight):
    weights = {"text_weight": 3.0, "vision_weight": 2.0, "prototype_weight": 0.7}
    classifier = make_classifier(template_inputs=templates, config={"frozen_weight": frozen_weight}, **weights)
    towers = find_towers(classifier.model)
    read = [CLASSES] if templates is None else [templates] if templates is TEMPLATES else templates
    frozen_text = torch.stack([F.normalize(towers["text"].embed_frozen(**inputs), dim=-1) for inputs in read])
    frozen_text = F.normalize(frozen_text.mean(dim=0), dim=-1)
    text = mix(towers["text"].embed_prompted(**CLASSES), frozen_text, frozen_weight)
    prompted, frozen_image = towers["vision"].embed(pixel_values=IMAGES)
    image = mix(prompted, frozen_image, frozen_weight)
    logits = classifier.model.get_base_model().logit_scale.exp() * image @ text.T
    expected = sep_loss(logits, LABELS, image, frozen_image, text, frozen_text, frozen_text, **weights)

    output = classifier.train()(IMAGES, LABELS)
    torch.testing.assert_close(output.logits, logits)
    assert output.loss is output.parts.total
    torch.testing.assert_close(tuple(output.parts), tuple(expected))

    output = classifier.eval()(IMAGES, LABELS)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, LABELS))
    assert output.parts is None


@pytest.mark.parametrize("training", [True, False])
def test_without_labels_there_is_no_loss(training):
    output = make_classifier().train(training)(IMAGES)
    assert (output.loss, output.parts) == (None, None)
    assert output.logits.shape == (5, 4)


GRADIENT_CONFIGS = [
    {},
    {"fusion_rank": 2},
    {"share_fusion": True, "start_layer": 1},
    {"fusion": "none"},
    {"batch_coupled": True},
    {"num_text_prompts": 0},
    {"num_vision_prompts": 0},
]


@pytest.mark.parametrize("config", GRADIENT_CONFIGS, ids=str)
def test_gradients_reach_the_adapter_and_the_prototypes_and_nothing_else(config):
    classifier = make_classifier(config=config)
    classifier(IMAGES, LABELS).loss.backward()
    with_gradient = {name for name, p in classifier.named_parameters() if p.grad is not None}
    adapter = {name for name, _ in classifier.named_parameters() if ".sep_" in name}
    assert with_gradient == adapter | {"prototypes"}
    for name, parameter in classifier.named_parameters():
        assert parameter.requires_grad == (name in with_gradient), name
        # a softmax does not change when all keys move alike, so the gradient of their bias is 0 in theory
        if parameter.requires_grad and "attention.key." not in name.removesuffix("weight"):
            assert parameter.grad.abs().max() > 0, name


def test_prototypes_start_at_the_frozen_texts_or_at_the_mean_frozen_image_of_each_class():
    classifier = make_classifier()
    towers = find_towers(classifier.model)
    text = F.normalize(towers["text"].embed_frozen(**TEMPLATES), dim=-1)
    torch.testing.assert_close(classifier.prototypes.data, text)
    assert classifier.prototypes.requires_grad

    labels = torch.tensor([3, 0, 3, 3, 0])  # classes 1 and 2 have no image
    batches = [{"pixel_values": IMAGES[:2], "labels": labels[:2]}, {"pixel_values": IMAGES[2:], "labels": labels[2:]}]
    classifier.reset_prototypes(batches)
    image = F.normalize(towers["vision"].embed_frozen(pixel_values=IMAGES), dim=-1)
    expected = torch.stack([image[[1, 4]].mean(0), text[1], text[2], image[[0, 2, 3]].mean(0)])
    torch.testing.assert_close(classifier.prototypes.data, expected)
    assert classifier.prototypes.requires_grad


def test_without_prototype_weight_there_are_no_prototypes():
    classifier = make_classifier(prototype_weight=0.0)
    assert classifier.prototypes is None
    assert classifier(IMAGES, LABELS).parts.prototypes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_base_model_of_another_dtype(dtype):
    """The adapter stays in fp32, the loss is finite, and the gradients are."""
    classifier = make_classifier(config={"dtype": dtype})
    assert {p.dtype for name, p in classifier.named_parameters() if ".sep_" in name} == {torch.float32}
    for training in (True, False):
        output = classifier.train(training)(IMAGES.to(dtype), LABELS)
        assert output.logits.dtype in (torch.float32, torch.float64)
        assert output.loss.isfinite()
    classifier.reset_prototypes([{"pixel_values": IMAGES.to(dtype), "labels": LABELS}])
    classifier.train()(IMAGES.to(dtype), LABELS).loss.backward()
    assert all(p.grad.isfinite().all() for p in classifier.parameters() if p.requires_grad)


# class texts


@pytest.mark.parametrize("config", [{}, {"start_layer": 1}, {"fusion": "none"}], ids=str)
@pytest.mark.parametrize("kept_tokens", [0, 1000])
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_change_neither_loss_nor_gradient(chunk_size, kept_tokens, config):
    texts = make_texts([5, 3, 7, 4, 6, 3, 8]), make_texts([7, 5, 9, 6, 8, 5, 10], seed=8)
    results = []
    for options in ({}, {"chunk_size": chunk_size, "kept_tokens": kept_tokens}):
        classifier = make_classifier(*texts, config=config, **options)
        with torch.no_grad():
            evaluated = classifier.eval()(IMAGES).logits
        output = classifier.train()(IMAGES, LABELS)
        output.loss.backward()
        results.append((evaluated, output.logits, output.loss, [p.grad for p in classifier.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kept_tokens", "runs"),
    # names of 3, 4 | 5, 7 tokens beside 3 prompts: 2 (4 + 3) + 2 (7 + 3) = 34 tokens in two chunks
    [(34, 2), (33, 4)],
)
def test_few_text_tokens_are_kept_and_many_computed_again(kept_tokens, runs):
    classifier = make_classifier(chunk_size=16, kept_tokens=kept_tokens)
    first = find_towers(classifier.model)["text"]._inner[0]
    prompted = []

    def note(module, args, output):
        if torch.is_grad_enabled():
            prompted.append(args[0].shape)

    first.register_forward_hook(note)
    classifier(IMAGES, LABELS).loss.backward()
    assert len(prompted) == runs and {shape[1] for shape in prompted} == {4, 7}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    """A layer that runs again in the backward pass must compute what it computed."""
    gradients = []
    for checkpointed in (False, True):
        classifier = make_classifier()
        if checkpointed:
            base = classifier.model.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        classifier(IMAGES, LABELS).loss.backward()
        gradients.append([p.grad for p in classifier.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_coupled", [False, True])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("pad", [0, EOS, 7])
def test_padding_of_the_texts_does_not_matter(pad, masked, batch_coupled):
    """Neither its length nor its id; coupled, the texts are padded as the released code pads them."""
    results = []
    for total, pad_id in ((None, 0), (TEXT_POSITIONS, pad)):
        texts = [make_texts(LENGTHS, total, pad_id), make_texts([9, 7, 11, 8], total, pad_id, seed=5)]
        if not masked:
            for inputs in texts:
                del inputs["attention_mask"]
        classifier = make_classifier(*texts, config={"batch_coupled": batch_coupled})
        results.append((logits_of(classifier), classifier.train()(IMAGES, LABELS).loss))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_coupled_class_texts_are_padded_with_zeros():
    """Even names shorter than the prompts, whose selection runs past all of them, and even past the longest text."""
    lengths, count = [3, 4], 7
    config = {"batch_coupled": True, "num_text_prompts": count}
    classifier = make_classifier(make_texts(lengths, pad=EOS), make_texts([5, 6], seed=5), config=config).eval()
    tower = find_towers(classifier.model)["text"]
    padded = make_texts(lengths, 1 + count, pad=0)["input_ids"]
    with torch.no_grad():
        text, frozen = classifier.encoder()
        expected = mix(tower.embed_prompted(input_ids=padded), frozen, 0.5)
    torch.testing.assert_close(text, expected)


def test_coupled_classes_are_never_chunked():
    coupled = {"batch_coupled": True}
    expected = logits_of(make_classifier(config=coupled))
    torch.testing.assert_close(logits_of(make_classifier(config=coupled, chunk_size=1)), expected)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (
            [3, 18],
            "A text of 18 tokens does not fit: the text tower has 20 positions and 3 are taken by prompts, so 17 "
            "tokens are left (BOS and EOS included). Shorten the text or use fewer prompts (num_text_prompts).",
        ),
        ([3, 17], None),
    ],
)
def test_longest_class_text(lengths, message):
    inputs = make_texts(lengths, TEXT_POSITIONS)
    if message is None:
        assert logits_of(make_classifier(inputs, None)).shape == (5, 2)
    else:
        with raises(message):
            make_classifier(inputs, None)


def test_templates_may_fill_all_positions():
    """The frozen branch has no prompts."""
    assert logits_of(make_classifier(template_inputs=make_texts([TEXT_POSITIONS] * 4))).isfinite().all()


def test_bad_kept_tokens():
    with raises("kept_tokens must be at least 0, but got -1."):
        make_classifier(kept_tokens=-1)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_size(chunk_size):
    with raises(f"chunk_size must be at least 1, but got {chunk_size}."):
        make_classifier(chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("config", "found"), [(None, "none"), ({"target_modules": ["vision_model"]}, "['vision']")], ids=str
)
def test_model_without_adapter_on_both_towers(config, found):
    model = make_clip() if config is None else make_model(**config)
    message = (
        f"The model needs a SEP adapter on a text and an image tower, but has {found}. Make one with "
        "peft.get_peft_model(model, SEPConfig())."
    )
    with raises(message):
        SEPClassifier(model, CLASSES)


def test_disabled_adapter_is_plain_zero_shot():
    classifier = make_classifier().eval()
    with torch.no_grad():
        expected = make_clip()(pixel_values=IMAGES, **TEMPLATES).logits_per_image
    adapted = logits_of(classifier)
    with classifier.model.disable_adapter():
        torch.testing.assert_close(logits_of(classifier), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(classifier), adapted)
    assert (adapted - expected).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_label_out_of_range(training):
    classifier = make_classifier().train(training)
    with raises("Labels must be between 0 and 3 for 4 classes, but got [-1, 4, 9]."):
        classifier(IMAGES, torch.tensor([9, 0, -1, 4, 4]))
    with raises("Labels must be between 0 and 3 for 4 classes, but got [4]."):
        classifier.reset_prototypes([{"pixel_values": IMAGES, "labels": torch.tensor([0, 0, 4, 1, 2])}])


# the cache of class texts


class EncoderCalls:
    """Counts the runs of the text tower's first encoder layer."""

    def __init__(self, classifier: SEPClassifier):
        self.count = 0
        layers = find_towers(classifier.model)["text"].base_layer.encoder.layers
        layers[0].register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    def take(self) -> int:
        """Runs since the last call."""
        count, self.count = self.count, 0
        return count


def uncached_logits(classifier: SEPClassifier) -> torch.Tensor:
    """What a new classifier with the same model, weights and classes says."""
    return logits_of(SEPClassifier(classifier.model, classifier.classes))


def optimizer_step(classifier: SEPClassifier) -> None:
    parameters = [p for p in classifier.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.05).step()


def load_state_dict(classifier: SEPClassifier) -> None:
    classifier.model.load_state_dict(make_model(seed=4).state_dict(), strict=False)


def replace_data(classifier: SEPClassifier) -> None:
    prompts = find_towers(classifier.model)["text"].sep_prompts["default"]
    prompts.data = prompts.data + 0.5


def add_and_set_adapter(classifier: SEPClassifier) -> None:
    classifier.model.add_adapter("other", SEPConfig.published(**SMALL))
    perturb(classifier.model, "other", seed=7)
    classifier.model.set_adapter("other")


def delete_and_add_adapter(classifier: SEPClassifier) -> None:
    """Another adapter of the same name."""
    classifier.model.add_adapter("other", SEPConfig.published(**SMALL))
    classifier.model.delete_adapter("default")
    torch.manual_seed(8)
    classifier.model.add_adapter("default", SEPConfig.published(**SMALL))
    classifier.model.set_adapter("default")


def train_mode(classifier: SEPClassifier) -> None:
    classifier.train().eval()


@torch.no_grad()
def change_projection(classifier: SEPClassifier) -> None:
    classifier.model.get_base_model().text_projection.weight.mul_(-2)


@torch.no_grad()
def change_frozen_tower(classifier: SEPClassifier) -> None:
    find_towers(classifier.model)["text"].base_layer.embeddings.token_embedding.weight.mul_(2)


def set_classes(classifier: SEPClassifier) -> None:
    classifier.set_classes(TaskClasses(OTHER_TEMPLATES, (CLASSES,)))


#: what happens, whether the frozen texts are encoded anew as well, whether the logits change
EVENTS = [
    (optimizer_step, False, True),
    (load_state_dict, True, True),
    (replace_data, False, True),
    (add_and_set_adapter, False, True),
    (delete_and_add_adapter, False, True),
    (change_projection, True, True),
    (change_frozen_tower, True, True),
    (set_classes, True, True),
    (train_mode, True, False),
]


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
@pytest.mark.parametrize(("event", "frozen", "changes"), EVENTS, ids=lambda item: getattr(item, "__name__", ""))
def test_texts_are_encoded_once_until_something_changes(event, frozen, changes):
    classifier = make_classifier().eval()
    calls = EncoderCalls(classifier)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return classifier(IMAGES).logits

    before = logits()
    assert calls.take() == 2  # both branches
    assert all(torch.equal(logits(), before) for _ in range(5))
    assert calls.take() == 0
    event(classifier)
    after = logits()
    assert calls.take() == 1 + frozen
    assert all(torch.equal(logits(), after) for _ in range(5))
    assert calls.take() == 0
    torch.testing.assert_close(after, uncached_logits(classifier), rtol=1e-5, atol=1e-5)
    assert changes != torch.equal(after, before)


def test_the_scale_of_the_logits_is_never_cached():
    classifier = make_classifier()
    before = logits_of(classifier)
    classifier.model.get_base_model().logit_scale.data += 1
    torch.testing.assert_close(logits_of(classifier), before * torch.e)


@pytest.mark.parametrize("training", [True, False])
def test_caching_in_inference_mode_does_not_hinder_training(training):
    """What is cached there takes part in the graph of the next step, without a change of mode in between."""
    classifier, fresh = make_classifier().train(training), make_classifier().train(training)
    with torch.inference_mode():
        classifier(IMAGES)
    losses = [c(IMAGES, LABELS).loss for c in (classifier, fresh)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(classifier.named_parameters(), fresh.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


def test_made_in_inference_mode():
    """As a server may do; such tensors count no versions."""
    with torch.inference_mode():
        logits = make_classifier().eval()(IMAGES).logits
    torch.testing.assert_close(logits, logits_of(make_classifier()))


# images; the bundled small CLIP and images

NAMES = ["barrel", "cougar_face", "pizza", "sunflower"]
IMAGES = [sorted((ASSETS / "caltech101/test" / name).iterdir())[0] for name in NAMES]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ASSETS / "clip-small")


@pytest.fixture(scope="module")
def small_model() -> PeftModel:
    """Tests must not change it."""
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(ASSETS / "clip-small"), SEPConfig.published(**SMALL))
    perturb(model, scale=0.02)
    return model


@pytest.fixture
def imaged(small_model, processor) -> SEPClassifier:
    return SEPClassifier.from_class_names(small_model, processor, NAMES).eval()


def scores_of(prediction: list[dict], names: list[str] = NAMES) -> list[float]:
    """In the order of the classes."""
    scores = {entry["label"]: entry["score"] for entry in prediction}
    return [scores[name] for name in names]


def test_predictions_are_sorted_probabilities(imaged, processor):
    predictions = imaged.predict(IMAGES)
    pixel_values = processor(images=[Image.open(path).convert("RGB") for path in IMAGES], return_tensors="pt")
    with torch.no_grad():
        expected = imaged(**pixel_values).logits.softmax(dim=-1)
    for prediction, row in zip(predictions, expected.tolist(), strict=True):
        scores = [entry["score"] for entry in prediction]
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert scores_of(prediction) == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("kind", [str, Path, Image.open, lambda path: Image.open(path).convert("RGBA")])
@pytest.mark.parametrize("several", [list, tuple])
def test_what_a_image_may_be(kind, several, imaged):
    expected = imaged.predict([str(path) for path in IMAGES[:2]])
    single = imaged.predict(kind(IMAGES[0]))
    assert scores_of(single) == pytest.approx(scores_of(expected[0]), abs=1e-5)
    together = imaged.predict(several(kind(path) for path in IMAGES[:2]))
    for prediction, other in zip(together, expected, strict=True):
        assert scores_of(prediction) == pytest.approx(scores_of(other), abs=1e-5)


def test_no_images(imaged):
    assert imaged.predict([]) == []


@pytest.mark.parametrize("top_k", [1, 3, 4, None])
def test_top_k(top_k, imaged):
    everything = imaged.predict(IMAGES[0])
    assert imaged.predict(IMAGES[0], top_k=top_k) == everything[:top_k]
    assert imaged.predict([IMAGES[0]], top_k=top_k) == [everything[:top_k]]


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_bad_top_k(top_k, imaged):
    with raises(f"top_k must be between 1 and 4, the number of classes, but got {top_k}."):
        imaged.predict(IMAGES[0], top_k=top_k)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_size_of_the_batches_does_not_matter(batch_size, imaged):
    expected = imaged.predict(IMAGES)
    for prediction, other in zip(imaged.predict(IMAGES, batch_size=batch_size), expected, strict=True):
        assert scores_of(prediction) == pytest.approx(scores_of(other), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_keeps_the_mode_and_makes_no_graph(training, imaged):
    imaged.train(training)
    modes = [module.training for module in imaged.modules()]
    imaged.predict(IMAGES[0])
    assert [module.training for module in imaged.modules()] == modes
    assert all(p.grad is None for p in imaged.parameters())


def write_truncated(path: Path) -> None:
    content = IMAGES[0].read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_huge(path: Path) -> None:
    """A header that promises 60000 x 60000 pixels, which Pillow refuses as a decompression bomb."""
    Image.new("L", (1, 1)).save(path, format="bmp")
    content = bytearray(path.read_bytes())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write",
    [
        None,
        Path.mkdir,
        lambda path: path.write_text("no image"),
        lambda path: path.write_bytes(b""),
        write_truncated,
        write_huge,
    ],
    ids=["missing", "folder", "text", "empty", "truncated", "huge"],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_unreadable_image(kind, write, tmp_path, imaged):
    path = tmp_path / "broken.jpg"
    if write is not None:
        write(path)
    image = kind(path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'The image {image!r} cannot be read: ')}.+"):
        imaged.predict([IMAGES[0], image])


def test_address_that_does_not_answer(imaged, monkeypatch):
    class ConnectionFailed(Exception):
        """As the errors of httpx, which are no OSError."""

    def get(*args, **kwargs):
        raise ConnectionFailed("no route to host")

    monkeypatch.setattr(image_utils.httpx, "get", get)
    with raises("The image 'http://example.com/cat.jpg' cannot be read: no route to host"):
        imaged.predict("http://example.com/cat.jpg")


def test_array_is_no_image(imaged):
    with pytest.raises(ValueError, match=r"^The image tensor\(\[\[0\.\]\]\) cannot be read: .+"):
        imaged.predict([torch.zeros(1, 1)])


NO_PROCESSOR = "This classifier has no processor {}. Pass processor=AutoProcessor.from_pretrained(...)."


@pytest.mark.parametrize("part", [None, "tokenizer"])
def test_prediction_without_processor(part, small_model, processor):
    part = part and getattr(processor, part)
    classes = TaskClasses.from_names(NAMES, processor)
    with raises(NO_PROCESSOR.format("to read images")):
        SEPClassifier(small_model, classes, processor=part).predict(IMAGES[0])


@pytest.mark.parametrize("part", [None, "image_processor"])
def test_names_without_processor(part, small_model, processor):
    part = part and getattr(processor, part)
    classifier = SEPClassifier(small_model, TaskClasses.from_names(NAMES, processor), processor=part)
    with raises(NO_PROCESSOR.format("to read class names")):
        classifier.set_classes(["cup"])
    assert classifier.class_names == NAMES


# other classes


def test_set_classes_swaps_them_without_training(imaged):
    """Among the old names the new probabilities are the old ones but for a factor."""
    state = {key: value.clone() for key, value in imaged.model.state_dict().items()}
    before = imaged.predict(IMAGES)
    names = ["umbrella", *reversed(NAMES)]
    assert imaged.set_classes(names, zero_shot_margin=0.0) is imaged
    assert not imaged.encoder.training
    assert imaged.class_names == names
    assert imaged.prototypes.shape[0] == 5
    for prediction, old in zip(imaged.predict(IMAGES), before, strict=True):
        scores = scores_of(prediction)
        assert sum(scores) < 1
        assert [score / sum(scores) for score in scores] == pytest.approx(scores_of(old), abs=1e-4)
    for key, value in imaged.model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("template", ["a {}.", ["a {}.", "the {}."]], ids=["one", "two"])
def test_set_classes_keeps_the_template_unless_told_otherwise(template, small_model, processor):
    classifier = SEPClassifier.from_class_names(small_model, processor, NAMES, template)
    templates = (template,) if isinstance(template, str) else tuple(template)
    assert classifier.set_classes(["cup", "lamp"]).classes.templates == templates
    assert classifier.set_classes(["cup"], template="one {}").classes.templates == ("one {}",)
    assert classifier.set_classes(["lamp"]).classes.templates == ("one {}",)


def test_set_classes_equals_a_new_classifier(imaged, small_model, processor):
    names = ["crab", "cup", "lamp"]
    pixel_values = make_images(2).new_zeros(2, 3, 64, 64).normal_(generator=torch.Generator().manual_seed(0))
    fresh = SEPClassifier.from_class_names(small_model, processor, names)
    imaged.set_classes(names, zero_shot_margin=0.0)
    for training in (True, False):
        logits = [c.train(training)(pixel_values).logits for c in (imaged, fresh)]
        torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "The class list is empty"),
        (["cup", "cup"], "Class names must differ"),
        ("cup", "Class names must be a list of names, but got the single string 'cup'."),
        (["cup", "word " * 72], "A text of 75 tokens does not fit: the text tower has 77 positions and 3 are taken by"),
        # the bare name has 74 tokens and fits beside 3 prompts, the template has 78
        (["cup", "word " * 71], "A text of 78 tokens does not fit: the text tower has 77 positions (BOS and EOS incl"),
    ],
    ids=lambda item: str(item)[:20],
)
def test_bad_classes_leave_the_old_ones(names, message, imaged):
    before = imaged.predict(IMAGES[0])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        imaged.set_classes(names)
    assert imaged.class_names == NAMES
    assert imaged.predict(IMAGES[0]) == before


# files

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "sep_classes.json"]


def contents(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> bytes, of all files; empty folders count as well."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "saved"
    make_classifier().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_saved(kind, adapter, tmp_path):
    """Only safetensors, JSON and the model card; of one adapter, without prototypes."""
    classifier = make_classifier(config={"adapter": adapter})
    classifier.model.add_adapter("unused", SEPConfig.published(**SMALL))
    classifier.save_pretrained(kind(tmp_path / "a" / "b"))
    assert sorted(contents(tmp_path / "a")) == ["b", *(f"b/{name}" for name in FILES)]
    with safe_open(tmp_path / "a/b/adapter_model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    expected = {
        f"{name.removeprefix('model.')}".replace(f".{adapter}", ""): tuple(p.shape)
        for name, p in classifier.named_parameters()
        if ".sep_" in name and f".{adapter}" in name
    }
    assert shapes == expected


@pytest.mark.parametrize(("adapter", "target"), [("default", "other"), ("mine", "default")])
@pytest.mark.parametrize("second", [False, True], ids=["fresh", "second"])
@pytest.mark.parametrize("config", [{}, {"batch_coupled": True}, {"fusion_rank": 2, "start_layer": 1}], ids=str)
def test_round_trip(config, second, target, adapter, tmp_path):
    """Bit for bit, into a fresh model, or as a second adapter into a model that has another one."""
    classifier = make_classifier(template_inputs=[TEMPLATES, OTHER_TEMPLATES], config={"adapter": adapter} | config)
    expected = logits_of(classifier)
    classifier.save_pretrained(tmp_path)
    model = make_model("first", seed=9, num_text_prompts=2) if second else make_clip()
    loaded = SEPClassifier.from_pretrained(model, tmp_path, adapter_name=target)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(IMAGES).logits, expected)
    assert torch.equal(logits_of(classifier), expected)
    assert loaded.model.active_adapter == target
    assert (loaded.model is model) == second
    assert loaded.class_names == classifier.class_names


def test_a_second_adapter_leaves_the_first_one_as_it_was(saved):
    model = make_model("first", seed=9)
    first = SEPClassifier(model, CLASSES, TEMPLATES)
    expected = logits_of(first)
    second = SEPClassifier.from_pretrained(model, saved, adapter_name="second")
    assert torch.equal(logits_of(second), logits_of(make_classifier()))
    model.set_adapter("first")
    assert torch.equal(logits_of(first), expected)


@pytest.mark.parametrize("second", [False, True], ids=["fresh", "second"])
def test_loaded_for_use_everything_is_frozen(second, saved):
    model = make_model("first", seed=9) if second else make_clip()
    loaded = SEPClassifier.from_pretrained(model, saved)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.prototypes is None


@pytest.mark.parametrize("second", [False, True], ids=["fresh", "second"])
def test_loaded_to_train_on(second, saved):
    model = make_model("first", seed=9) if second else make_clip()
    loaded = SEPClassifier.from_pretrained(model, saved, adapter_name="again", is_trainable=True)
    assert all(module.training for module in loaded.modules())
    loaded(IMAGES, LABELS).loss.backward()
    with_gradient = {name for name, p in loaded.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in loaded.named_parameters() if p.requires_grad}
    adapter = {name for name, _ in loaded.named_parameters() if ".sep_" in name and ".again" in name}
    assert with_gradient == adapter | {"prototypes"}


def test_options_reach_the_loaded_classifier(saved):
    options = {"text_weight": 1.0, "prototype_weight": 2.0, "chunk_size": 3}
    loaded = SEPClassifier.from_pretrained(make_clip(), saved, options=options)
    assert loaded.loss_weights == {"text_weight": 1.0, "vision_weight": 3.0, "prototype_weight": 2.0}
    assert loaded.encoder.chunk_size == 3
    assert loaded.prototypes is not None


def test_load_from_a_subfolder(saved):
    loaded = SEPClassifier.from_pretrained(make_clip(), saved.parent, subfolder=saved.name)
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))


def test_names_and_templates_survive(imaged, processor, tmp_path):
    """What is loaded predicts and swaps classes as what was saved."""
    names = ["café", *NAMES[1:]]
    imaged.set_classes(names, template=["a {}.", "the {}."]).save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(ASSETS / "clip-small")
    loaded = SEPClassifier.from_pretrained(model, tmp_path, processor=processor)
    assert loaded.class_names == names
    assert loaded.predict(IMAGES) == imaged.predict(IMAGES)
    assert loaded.set_classes(["cup"]).classes.templates == ("a {}.", "the {}.")


def test_saving_again_replaces_the_files(saved):
    other = make_classifier(make_texts([4, 3]), None, config={"seed": 6, "num_text_prompts": 1})
    other.save_pretrained(saved)
    assert sorted(contents(saved)) == FILES
    loaded = SEPClassifier.from_pretrained(make_clip(), saved)
    assert torch.equal(logits_of(loaded), logits_of(other))


def test_saving_again_keeps_what_the_user_wrote_into_the_model_card(saved):
    """As PEFT's own `save_pretrained` does; other files in the folder are nobody's business."""
    card = (saved / "README.md").read_text()
    (saved / "README.md").write_text(card + "\nTrained on my own images.\n")
    (saved / "notes.txt").write_text("mine")
    make_classifier().save_pretrained(saved)
    assert "Trained on my own images." in (saved / "README.md").read_text()
    assert (saved / "notes.txt").read_text() == "mine"


class DiskFull(OSError):
    """What the broken functions below raise."""


def break_json_dump(monkeypatch, folder: Path) -> None:
    def dump(*args, **kwargs):
        raise DiskFull

    monkeypatch.setattr(json, "dump", dump)


def break_peft(monkeypatch, folder: Path) -> None:
    def save_pretrained(self, path, **kwargs):
        (Path(path) / "adapter_model.safetensors").write_bytes(b"half of")
        raise DiskFull

    monkeypatch.setattr(PeftModel, "save_pretrained", save_pretrained)


def break_replace(name: str):
    """Fail once, when the file of this name is to take its place."""

    def breaks(monkeypatch, folder: Path) -> None:
        replace, failed = os.replace, []

        def broken(source, target, **kwargs):
            if Path(target) == folder / name and not failed:
                failed.append(name)
                raise DiskFull
            return replace(source, target, **kwargs)

        monkeypatch.setattr(os, "replace", broken)

    breaks.__name__ = f"replace {name}"
    return breaks


BREAKS = [break_json_dump, break_peft, *map(break_replace, FILES)]


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda item: item.__name__)
@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_failure_while_saving_leaves_what_was_there(adapter, breaks, saved, monkeypatch):
    before = contents(saved)
    other = make_classifier(make_texts([4, 3]), None, config={"adapter": adapter, "seed": 6, "num_text_prompts": 1})
    with monkeypatch.context() as patch:
        breaks(patch, saved)
        with pytest.raises(DiskFull):
            other.save_pretrained(saved)
    assert contents(saved) == before  # and no temporary folder
    loaded = SEPClassifier.from_pretrained(make_clip(), saved)
    assert torch.equal(logits_of(loaded), logits_of(make_classifier()))
    other.save_pretrained(saved)
    assert torch.equal(logits_of(SEPClassifier.from_pretrained(make_clip(), saved)), logits_of(other))


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda item: item.__name__)
def test_a_failure_while_saving_for_the_first_time_leaves_nothing(breaks, tmp_path, monkeypatch):
    breaks(monkeypatch, tmp_path)
    with pytest.raises(DiskFull):
        make_classifier().save_pretrained(tmp_path)
    assert contents(tmp_path) == {}


def test_saving_into_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with raises(f"{path} is a file; a folder is needed to save into.", NotADirectoryError):
        make_classifier().save_pretrained(path)
    assert path.read_text() == "mine"


def test_saving_needs_a_peft_model(tmp_path):
    model = inject_adapter_in_model(SEPConfig.published(**SMALL), make_clip())
    classifier = SEPClassifier(model, CLASSES, TEMPLATES)
    assert classifier(IMAGES, LABELS).loss.isfinite()
    message = (
        "Saving needs a PeftModel, but the model is a CLIPModel. Wrap it with peft.get_peft_model, or save its adapter "
        "with its own save_pretrained."
    )
    with raises(message, TypeError):
        classifier.save_pretrained(tmp_path / "folder")
    assert contents(tmp_path) == {}


VERSION = "{{file}} has format version {}, but this version of sep_peft reads 1. Upgrade sep_peft."
NO_JSON = "{file} is no valid JSON ("


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{file} does not exist, so there are no classes to load. Save with SEPClassifier.save_pretrained, or "),
        (b"", NO_JSON),
        (b'{"format_version": 1, "names": ["a", ', NO_JSON),
        (b"\xff\xfe\x00", NO_JSON),
        (b'{"format_version": 2}', VERSION.format(2)),
        (b'{"names": ["a"]}', VERSION.format(None)),
        (b"[]", VERSION.format(None)),
        (
            b'{"format_version": 1, "names": ["a"], "templates": []}',
            "The class list lacks class_inputs, template_inputs.",
        ),
    ],
    ids=["missing", "empty", "cut short", "binary", "newer", "no version", "a list", "entries missing"],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_broken_class_file(adapted, content, message, saved):
    """Found out before the model is touched."""
    file = saved / "sep_classes.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    model = make_model("first") if adapted else make_clip()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(file=file))}"):
        SEPClassifier.from_pretrained(model, saved, adapter_name="other")
    assert [(name, type(module)) for name, module in model.named_modules()] == before


# training and threads


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_trainer(save_strategy, tmp_path):
    classifier = make_classifier()
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy=save_strategy,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )

    def compute_metrics(prediction) -> dict:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        classifier, arguments, train_dataset=Images(), eval_dataset=Images(), compute_metrics=compute_metrics
    )
    result = trainer.train()
    assert result.global_step == 2
    assert torch.tensor(result.training_loss).isfinite()
    changed = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in classifier.named_parameters() if p.requires_grad}

    metrics = trainer.evaluate()
    logits = logits_of(classifier)
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), abs=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == LABELS).float().mean().item())
    torch.testing.assert_close(torch.tensor(trainer.predict(Images()).predictions), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_two_threads_predict_at_once(training, imaged):
    jobs = [IMAGES[:2], IMAGES[1:]]
    expected = [imaged.predict(job) for job in jobs]
    imaged.train(training).encoder.train(training)  # drops the cache
    results: list[list] = [[], []]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        for _ in range(4):
            results[index].append(imaged.predict(jobs[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for runs, predictions in zip(results, expected, strict=True):
        assert len(runs) == 4  # no thread has failed
        for run in runs:
            for prediction, other in zip(run, predictions, strict=True):
                assert scores_of(prediction) == pytest.approx(scores_of(other), abs=1e-5)
    assert imaged.training == training
