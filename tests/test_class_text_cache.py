"""Class texts are encoded once, until something changes that they depend on."""

from __future__ import annotations

import pytest
import torch
from small_classifier import (
    CLASSES,
    IMAGES,
    LABELS,
    OTHER_TEMPLATES,
    SMALL,
    EncoderCalls,
    logits_of,
    make_classifier,
    make_model,
)
from small_clip import perturb

from sep_peft import SEPClassifier, SEPConfig, TaskClasses
from sep_peft.tuner.model import find_towers


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


def write_to_prompts_by_data(classifier: SEPClassifier) -> None:
    """Torch counts no version of it."""
    prompts = find_towers(classifier.model)["text"].sep_prompts["default"]
    before = prompts._version
    prompts.data.add_(0.5)
    assert prompts._version == before


def average_by_data(classifier: SEPClassifier) -> None:
    """As moving averages of weights do."""
    for parameter in find_towers(classifier.model)["text"].sep_fusion["default"].parameters():
        parameter.data.mul_(0.9).add_(torch.full_like(parameter, 0.1))


def negate_projection_by_data(classifier: SEPClassifier) -> None:
    classifier.model.get_base_model().text_projection.weight.data.neg_()


def scale_frozen_tower_by_data(classifier: SEPClassifier) -> None:
    find_towers(classifier.model)["text"].base_layer.encoder.layers[1].base_layer.mlp.fc2.weight.data.mul_(2)


def read_data(classifier: SEPClassifier) -> None:
    """Nothing is written, so nothing is encoded anew."""
    assert all(parameter.data.isfinite().all() for parameter in classifier.parameters())


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
    (write_to_prompts_by_data, False, True),
    (average_by_data, False, True),
    (negate_projection_by_data, True, True),
    (scale_frozen_tower_by_data, True, True),
    (read_data, False, False),
    (add_and_set_adapter, False, True),
    (delete_and_add_adapter, False, True),
    (change_projection, True, True),
    (change_frozen_tower, True, True),
    (set_classes, True, True),
    (train_mode, False, False),
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
    assert calls.take() == 1  # the prompted branch; the prototypes have begun at the frozen one
    assert all(torch.equal(logits(), before) for _ in range(5))
    assert calls.take() == 0
    event(classifier)
    after = logits()
    assert calls.take() == changes + frozen
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
