"""The texts of the classes: chunks, padding, lengths, and what cannot be a class text."""

from __future__ import annotations

import pytest
import torch
from small_classifier import (
    CLASSES,
    IMAGES,
    LABELS,
    LENGTHS,
    TEMPLATES,
    logits_of,
    make_classifier,
    make_model,
    mix,
    raises,
)
from small_clip import EOS, TEXT_POSITIONS, make_clip, make_texts

from sep_peft import SEPClassifier
from sep_peft.tuner.model import find_towers


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
        weights = classifier.encoder.weights(training=False)
        expected = mix(tower.embed_prompted(input_ids=padded), weights.frozen_text_embeds, 0.5)
    torch.testing.assert_close(weights.text_embeds, expected)


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


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.zeros(5), "torch.float32"),
        (torch.ones(5, dtype=torch.bool), "torch.bool"),
        (["cup"] * 5, "list"),
        ("cup", "str"),
    ],
    ids=["floats", "bool", "names", "name"],
)
def test_labels_that_are_no_indices(labels, kind):
    message = f"Labels must be a tensor of integers (B,), which count in the order of the classes, but got {kind}."
    with raises(message, TypeError):
        make_classifier()(IMAGES, labels)


@pytest.mark.parametrize("training", [True, False])
def test_label_out_of_range(training):
    classifier = make_classifier().train(training)
    with raises("Labels must be between 0 and 3 for 4 classes, but got [-1, 4, 9]."):
        classifier(IMAGES, torch.tensor([9, 0, -1, 4, 4]))
    with raises("Labels must be between 0 and 3 for 4 classes, but got [4]."):
        classifier.reset_prototypes([{"pixel_values": IMAGES, "labels": torch.tensor([0, 0, 4, 1, 2])}])
