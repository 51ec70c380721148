"""`SEPClassifier`'s loss, by hand; its gradients and its prototypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_classifier import CLASSES, IMAGES, LABELS, OTHER_TEMPLATES, TEMPLATES, make_classifier, mix

from sep_peft.method.losses import sep_loss
from sep_peft.tuner.model import find_towers


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
