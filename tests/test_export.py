"""From pixels to embeddings or probabilities in one graph: torch.export and ONNX, with a batch of any size."""

from __future__ import annotations

import pytest
import torch
from families import CASES
from peft import get_peft_model
from small_classifier import IMAGES, logits_of, make_classifier, make_model, raises
from small_clip import make_clip, make_images, perturb

from sep_peft import ImageEmbedder, ImageScorer, SEPConfig


CONFIGS = [{}, {"start_layer": 1}, {"frozen_weight": 0.0}, {"fusion": "none"}, {"fusion_rank": 2, "share_fusion": True}]
BATCH = {"pixel_values": {0: torch.export.Dim("batch")}}


def make_module(kind: type, config: dict) -> torch.nn.Module:
    """Of two layers, since the time of an export grows with them."""
    classifier = make_classifier(config=config | {"clip": make_clip(text_layers=2, vision_layers=2)}).eval()
    return (ImageEmbedder(classifier.model) if kind is ImageEmbedder else ImageScorer(classifier)).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_what_the_modules_compute(config):
    classifier = make_classifier(config=config).eval()
    image, _ = classifier.image_embeds(IMAGES)
    assert torch.equal(ImageEmbedder(classifier.model)(IMAGES), image)
    features = torch.nn.functional.normalize(classifier.model.get_image_features(IMAGES).pooler_output, dim=-1)
    torch.testing.assert_close(image, features)
    scorer = ImageScorer(classifier)
    torch.testing.assert_close(scorer(IMAGES), logits_of(classifier).softmax(dim=-1))
    assert scorer.class_names == classifier.class_names
    assert scorer.eval().text_embeds.shape == (4, 24)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def config(request) -> dict:
    return request.param


@pytest.fixture(scope="module", params=[ImageEmbedder, ImageScorer])
def exported(request, config) -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    """A module, and what `torch.export` makes of it."""
    module = make_module(request.param, config)
    with torch.no_grad():
        return module, torch.export.export(module, (IMAGES[:2],), dynamic_shapes=BATCH)


@torch.no_grad()
def test_torch_export(exported):
    module, program = exported[0], exported[1].module()
    for count in (1, 3, 5):
        torch.testing.assert_close(program(IMAGES[:count]), module(IMAGES[:count]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=str, indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@torch.no_grad()
def test_onnx(exported, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install sep_peft[export]")
    import onnxruntime

    (module, program), file = exported, str(tmp_path / "model.onnx")
    torch.onnx.export(program, (IMAGES[:2],), file, dynamo=True, output_names=["result"], verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3, 5):
        (found,) = session.run(["result"], {"pixel_values": IMAGES[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(IMAGES[:count]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "bert and dinov2", "flava"])
@torch.no_grad()
def test_other_families(name):
    case = CASES[name]
    model = get_peft_model(case.build(), SEPConfig.published(num_text_prompts=2, num_vision_prompts=2))
    perturb(model)
    module, images = ImageEmbedder(model).eval(), case.image(5)["pixel_values"]
    program = torch.export.export(module, (images[:2],), dynamic_shapes=BATCH).module()
    torch.testing.assert_close(program(images), module(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scores_are_those_of_the_moment():
    """Later classes and adapters do not reach into what was made before, as in a file."""
    classifier = make_classifier().eval()
    scorer = ImageScorer(classifier)
    expected = scorer(IMAGES)
    classifier.set_classes(make_classifier(config={"seed": 6}).classes)
    with torch.no_grad():
        next(p for name, p in classifier.named_parameters() if "text_model.sep_prompts" in name).mul_(3)
    assert torch.equal(scorer(IMAGES), expected)
    assert not torch.equal(logits_of(classifier).softmax(dim=-1), expected)


def test_a_model_without_prompts_in_its_image_tower():
    message = "The model needs a SEP adapter on an image tower. Make one with peft.get_peft_model(model, SEPConfig())."
    for model in (make_clip(), make_model(target_modules=["text_model"])):
        with raises(message):
            ImageEmbedder(model)


def test_a_bare_image_tower():
    case = CASES["clip vision"]
    model = get_peft_model(case.build(), SEPConfig.published(num_text_prompts=0)).eval()
    embeds = ImageEmbedder(model)(make_images(2))
    torch.testing.assert_close(torch.linalg.vector_norm(embeds, dim=-1), torch.ones(2))
