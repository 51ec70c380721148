"""`SEPClassifier.predict`, with the bundled small CLIP and images."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from bundled import IMAGE_FILES, NAMES, NO_PROCESSOR, scores_of
from PIL import Image
from small_classifier import raises
from transformers import image_utils

from sep_peft import SEPClassifier, TaskClasses


def test_predictions_are_sorted_probabilities(imaged, processor):
    predictions = imaged.predict(IMAGE_FILES)
    pixel_values = processor(images=[Image.open(path).convert("RGB") for path in IMAGE_FILES], return_tensors="pt")
    with torch.no_grad():
        expected = imaged(**pixel_values).logits.softmax(dim=-1)
    for prediction, row in zip(predictions, expected.tolist(), strict=True):
        scores = [entry["score"] for entry in prediction]
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert scores_of(prediction) == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("kind", [str, Path, Image.open, lambda path: Image.open(path).convert("RGBA")])
@pytest.mark.parametrize("several", [list, tuple])
def test_what_an_image_may_be(kind, several, imaged):
    expected = imaged.predict([str(path) for path in IMAGE_FILES[:2]])
    single = imaged.predict(kind(IMAGE_FILES[0]))
    assert scores_of(single) == pytest.approx(scores_of(expected[0]), abs=1e-5)
    together = imaged.predict(several(kind(path) for path in IMAGE_FILES[:2]))
    for prediction, other in zip(together, expected, strict=True):
        assert scores_of(prediction) == pytest.approx(scores_of(other), abs=1e-5)


def test_no_images(imaged):
    assert imaged.predict([]) == []


@pytest.mark.parametrize("top_k", [1, 3, 4, None])
def test_top_k(top_k, imaged):
    everything = imaged.predict(IMAGE_FILES[0])
    assert imaged.predict(IMAGE_FILES[0], top_k=top_k) == everything[:top_k]
    assert imaged.predict([IMAGE_FILES[0]], top_k=top_k) == [everything[:top_k]]


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_bad_top_k(top_k, imaged):
    with raises(f"top_k must be between 1 and 4, the number of classes, but got {top_k}."):
        imaged.predict(IMAGE_FILES[0], top_k=top_k)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_size_of_the_batches_does_not_matter(batch_size, imaged):
    expected = imaged.predict(IMAGE_FILES)
    for prediction, other in zip(imaged.predict(IMAGE_FILES, batch_size=batch_size), expected, strict=True):
        assert scores_of(prediction) == pytest.approx(scores_of(other), abs=1e-5)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "8", None])
def test_bad_batch_size(batch_size, imaged):
    with raises(f"batch_size must be a whole number of at least 1, but got {batch_size!r}."):
        imaged.predict(IMAGE_FILES, batch_size=batch_size)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_keeps_the_mode_and_makes_no_graph(training, imaged):
    imaged.train(training)
    modes = [module.training for module in imaged.modules()]
    imaged.predict(IMAGE_FILES[0])
    assert [module.training for module in imaged.modules()] == modes
    assert all(p.grad is None for p in imaged.parameters())


def write_truncated(path: Path) -> None:
    content = IMAGE_FILES[0].read_bytes()
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
    with pytest.raises(ValueError, match=f"^{re.escape(f'The image {str(path)!r} cannot be read: ')}.+"):
        imaged.predict([IMAGE_FILES[0], image])


def test_address_that_does_not_answer(imaged, monkeypatch):
    class ConnectionFailed(Exception):
        """As the errors of httpx, which are no OSError."""

    def get(*args, **kwargs):
        raise ConnectionFailed("no route to host")

    monkeypatch.setattr(image_utils.httpx, "get", get)
    with raises("The image 'http://example.com/cat.jpg' cannot be read: no route to host"):
        imaged.predict("http://example.com/cat.jpg")


@pytest.mark.parametrize("part", [None, "tokenizer"])
def test_prediction_without_processor(part, small_model, processor):
    part = part and getattr(processor, part)
    classes = TaskClasses.from_names(NAMES, processor)
    with raises(NO_PROCESSOR.format("to read images")):
        SEPClassifier(small_model, classes, processor=part).predict(IMAGE_FILES[0])


@pytest.mark.parametrize("part", [None, "image_processor"])
def test_names_without_processor(part, small_model, processor):
    part = part and getattr(processor, part)
    classifier = SEPClassifier(small_model, TaskClasses.from_names(NAMES, processor), processor=part)
    with raises(NO_PROCESSOR.format("to read class names")):
        classifier.set_classes(["cup"])
    assert classifier.class_names == NAMES


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_two_threads_predict_at_once(training, imaged):
    jobs = [IMAGE_FILES[:2], IMAGE_FILES[1:]]
    expected = [imaged.predict(job) for job in jobs]
    imaged.train(training).set_classes(imaged.classes)  # drops the cache
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
