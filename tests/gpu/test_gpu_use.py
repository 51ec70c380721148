"""How models are used on GPUs: threads and streams, parts on several devices, loaders, quantized bases, memory."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from gpu_devices import devices_of
from peft import LoraConfig, get_peft_model
from shallow_classifier import TRAIN, VAL, classifier_maker
from small_classifier import CLASSES, IMAGES, LABELS, TEMPLATES, make_classifier, make_model
from small_clip import make_clip, make_images, make_texts, perturb
from transformers import BitsAndBytesConfig, CLIPModel

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.training import LabelledImages, Recipe, evaluate, fit
from sep_peft.training.epochs import Epochs


pytestmark = pytest.mark.gpu


def test_everything_moves(device, put):
    """Also what is no parameter: texts, cached embeddings, and those of a sample of classes."""
    classifier = make_classifier(recipe=Recipe(class_sample=2)).train()
    classifier(IMAGES, LABELS).loss.backward()
    put(classifier)
    assert devices_of(classifier) == {device.type}
    loss = classifier(put(IMAGES), put(LABELS)).loss
    loss.backward()
    assert loss.device.type == device.type
    classifier.to("cpu")
    assert devices_of(classifier) == {"cpu"}
    assert classifier(IMAGES, LABELS).loss.isfinite()


def test_a_sample_of_classes_is_the_same_on_every_device(put):
    """On a GPU its texts are as many as there are indices, on the CPU each is there once; the step is the same."""

    def step(move) -> tuple[torch.Tensor, list[torch.Tensor]]:
        classifier = move(make_classifier(recipe=Recipe(class_sample=2))).train()
        losses = []
        for _ in range(3):
            losses.append(classifier(move(IMAGES), move(LABELS)).loss)
        sum(losses).backward()
        gradients = [p.grad.cpu() for p in classifier.parameters() if p.grad is not None]
        return torch.stack(losses).detach().cpu(), gradients

    expected, found = step(lambda x: x), step(put)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


@torch.no_grad()
def test_threads_with_streams_of_their_own(device, put):
    """Each gets the logits of its own images."""
    classifier = put(make_classifier()).eval()
    batches = [put(make_images(4, seed=seed)) for seed in range(6)]
    expected = [classifier(images).logits for images in batches]
    if device.type == "cuda":
        torch.cuda.synchronize()
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
        with stream, torch.no_grad():
            for _ in range(5):
                logits = classifier(batches[index]).logits
            found[index] = logits.cpu()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, logits in enumerate(expected):
        torch.testing.assert_close(found[index], logits.cpu(), rtol=1e-3, atol=1e-4)


def test_a_model_on_two_devices(device, tmp_path, put):
    """The text tower's weights stay on the CPU, or on disk, and are brought when they are needed."""
    place = 0 if device.type == "cuda" else "cpu"
    device_map = {"text_model": "disk", "vision_model": place, "visual_projection": place}
    device_map |= {"text_projection": place, "logit_scale": place}
    main = device if device.type == "cuda" else "cpu"
    split = dispatch_model(make_clip(), device_map, main_device=main, offload_dir=str(tmp_path))
    expected = put(SEPClassifier(make_model(), CLASSES, TEMPLATES)).train()
    classifier = SEPClassifier(make_model(clip=split), CLASSES, TEMPLATES).train()
    losses = [c(put(IMAGES), put(LABELS)).loss for c in (expected, classifier)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1].to(losses[0].device), rtol=1e-4, atol=1e-5)
    for one, other in zip(expected.parameters(), classifier.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad.to(one.device), rtol=1e-3, atol=1e-5)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps the precision of a process, and refuses another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_fit(precision, device, fresh_accelerate):
    """From files to an accuracy, with batches that are pinned for a GPU."""
    if precision == "fp16" and device.type != "cuda":
        pytest.skip("a CPU has no fp16 training")
    recipe = Recipe(epochs=2, batch_size=3, calibration_folds=0)
    classifier = classifier_maker(recipe)().to(device)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    history = fit(classifier, TRAIN, recipe, eval_samples=VAL, accelerator=accelerator, quiet=True, workers=1)
    assert len(history) == 2 and all(0 <= row["val_accuracy"] <= 100 for row in history)
    assert devices_of(classifier) == {device.type}
    answers = classifier.predict([path for path, _ in VAL], top_k=1)
    right = [answer[0]["label"] == name for answer, (_, name) in zip(answers, VAL, strict=True)]
    assert evaluate(classifier, VAL).accuracy == pytest.approx(100 * sum(right) / len(right))


def test_batches_are_pinned(cuda, fresh_accelerate):
    recipe = Recipe(epochs=1, batch_size=3)
    classifier = classifier_maker(recipe)().to(cuda)
    images = LabelledImages(TRAIN, classifier.class_names, classifier.processor, recipe)
    run = Epochs(classifier, images, recipe, Accelerator(), workers=1)
    images.set_epoch(0)
    for batch, _, _ in run._batches(2):
        assert all(value.is_pinned() for value in batch.values())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_bases(bits, cuda, tmp_path, put):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make_clip().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = get_peft_model(
        CLIPModel.from_pretrained(tmp_path, quantization_config=config, device_map="cuda"), SEPConfig()
    )
    perturb(model)
    classifier = SEPClassifier(model, put(CLASSES), put(TEMPLATES)).train()
    loss = classifier(put(IMAGES), put(LABELS)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_peak_memory(cuda, put):
    """A step of SEP takes no more than a step of LoRA on the same images and as many texts, and leaves nothing."""
    sizes = {"text_layers": 6, "vision_layers": 6}
    images, texts = put(make_images(64)), put(make_texts([7] * 8))
    labels = torch.arange(64, device=cuda) % 8

    def lora_step(model):
        text = model.get_text_features(**texts).pooler_output
        image = model.get_image_features(pixel_values=images).pooler_output
        torch.nn.functional.cross_entropy(image @ text.T, labels).backward()

    def peak(make, step) -> int:
        model = make()
        for _ in range(2):
            step(model)
            model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model)
        model.zero_grad()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before
        return torch.cuda.max_memory_allocated() - before

    targets = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    lora = peak(lambda: put(get_peft_model(make_clip(**sizes), targets)), lora_step)
    sep = peak(
        lambda: put(SEPClassifier(get_peft_model(make_clip(**sizes), SEPConfig()), texts, prototype_weight=0.0)),
        lambda classifier: classifier(images, labels).loss.backward(),
    )
    assert sep <= 1.25 * lora
