"""Whitened embeddings: their formula against generalized eigenvectors, their files, and what trains for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from bundled import IMAGE_FILES
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.linalg import eigh
from shallow_classifier import NAMES, TRAIN, classifier_maker
from small_classifier import raises

from sep_peft import ImageEmbedder, SEPClassifier, SEPConfig
from sep_peft.classifier.adapter import Adapter
from sep_peft.classifier.export_file import export_file
from sep_peft.classifier.image_index import ImageIndex
from sep_peft.classifier.whitened import WHITENING_FILE
from sep_peft.cli.app import main
from sep_peft.method.whitening import NEW_CLASSES, Whitening, fit_whitening
from sep_peft.training import Recipe, TrainingInterrupted, fit
from sep_peft.training.data import LabelledImages
from sep_peft.tuner.save_id import SAVE_ID, MixedSaveError


FILES = [str(path) for path in IMAGE_FILES]


def drawn(classes: int, each: int, size: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of unit length whose classes differ in three directions and whose images differ most in others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    spread = torch.cat([torch.zeros(3), 0.6 * torch.ones(size - 3)]) + 0.15
    means = torch.zeros(classes, size)
    means[:, :3] = 0.4 * torch.randn(classes, 3, generator=generator)
    embeds = means[labels] + spread * torch.randn(len(labels), size, generator=generator) + 0.5
    return torch.nn.functional.normalize(embeds, dim=1), labels


def found_first(embeds: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose most similar other image is of their class."""
    return (labels[(embeds @ embeds.T).fill_diagonal_(-2).argmax(dim=1)] == labels).double().mean().item()


# the map


def test_products_are_those_of_generalized_eigenvectors():
    embeds, labels = drawn(4, 6)
    x, y, size = embeds.double().numpy(), labels.numpy(), embeds.shape[1]
    means = np.stack([x[y == label].mean(axis=0) for label in range(4)])
    within = sum(np.outer(row - means[label], row - means[label]) for row, label in zip(x, y, strict=True)) / (24 - 4)
    within = within + max(np.trace(within), 1e-2) / 23 * np.eye(size)
    between = np.cov(means.T)  # over C - 1
    variances, vectors = eigh(between, within)  # columns v with v^T within v = 1
    variances = np.clip(variances, 0, None) + NEW_CLASSES * np.clip(variances, 0, None).sum() / size
    weights = variances / (1 + 2 * variances)
    expected = vectors @ np.diag(weights / weights.min()) @ vectors.T
    found = fit_whitening(embeds, labels)
    assert found.mean.numpy() == pytest.approx(x.mean(axis=0), abs=1e-6)
    np.testing.assert_allclose((found.matrix.T @ found.matrix).double().numpy(), expected, rtol=1e-4, atol=1e-4)
    own = found(embeds)
    torch.testing.assert_close(own.norm(dim=1), torch.ones(24))
    centred = torch.from_numpy(x) - found.mean
    products = centred @ torch.from_numpy(expected) @ centred.T
    lengths = products.diagonal().sqrt()
    torch.testing.assert_close((own @ own.T).double(), products / lengths / lengths[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("each", [1, 8])
def test_images_of_classes_that_were_not_seen_are_found_as_well(each):
    """Where a class has one image, it is whitened by all of them."""
    whitening = fit_whitening(*drawn(6 if each > 1 else 40, each))
    seen, new = drawn(6, 20, seed=0), drawn(6, 20, seed=9)
    if each > 1:
        assert found_first(whitening(seen[0]), seen[1]) > found_first(*seen) + 0.1
    assert found_first(whitening(new[0]), new[1]) >= found_first(*new)


def test_labels_are_names_of_classes_alone():
    embeds, labels = drawn(3, 4)
    torch.testing.assert_close(fit_whitening(embeds, labels).matrix, fit_whitening(embeds, 7 * labels + 2).matrix)
    with raises("A whitening is fitted on images of two classes at least, but there are 1."):
        fit_whitening(embeds, torch.zeros(12, dtype=torch.long))


def test_images_that_are_all_alike_have_a_whitening():
    found = fit_whitening(torch.eye(4)[:1].expand(6, 4), torch.tensor([0, 1, 2] * 2))
    assert found(torch.eye(4)).isfinite().all()


def test_numbers_that_do_not_fit_are_refused():
    with raises("A whitening needs a mean (E,) and a matrix (E, E), but got (3,) and (3, 4)."):
        Whitening(torch.zeros(3), torch.zeros(3, 4))
    with raises("mean and matrix of a whitening must be finite floats, but some values are not."):
        Whitening(torch.zeros(3), torch.full((3, 3), float("nan")))
    with raises("The whitening is for embeddings of 3 numbers, but got 4."):
        Whitening(torch.zeros(3), torch.eye(3))(torch.zeros(2, 4))


# a classifier with one


@pytest.fixture(scope="module")
def trained() -> SEPClassifier:
    """By two epochs of the recipe for retrieval."""
    classifier = classifier_maker(Recipe.retrieval(epochs=2, batch_size=3), SEPConfig.retrieval())()
    classifier.history = fit(classifier, TRAIN, quiet=True)
    return classifier


def test_the_recipe_for_retrieval_trains_images_by_prototypes_and_whitens(trained):
    history = trained.history
    assert len(history) == 2 and history[1]["loss"] < history[0]["loss"]
    plain = LabelledImages(TRAIN, NAMES, trained.processor)
    embeds = trained.embed([image for image, _ in TRAIN])
    expected = fit_whitening(embeds, plain.targets())
    torch.testing.assert_close(trained.whitening.matrix, expected.matrix, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trained.embed(FILES, whiten=True), trained.whitening(trained.embed(FILES)))
    with trained.model.disable_adapter():
        base = trained.embed_texts("a cat")
    torch.testing.assert_close(trained.embed_texts("a cat"), base)  # texts are those of the frozen model


def test_a_whitened_embedding_is_that_of_its_image_alone(trained):
    whole = trained.embed(FILES, whiten=True)
    torch.testing.assert_close(trained.embed(FILES, batch_size=1, whiten=True), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained.embed(FILES[1], whiten=True), whole[1], rtol=0, atol=1e-5)


def test_a_module_gives_out_whitened_embeddings(trained):
    pixels = trained.processor(images=[Image.open(TRAIN[0][0])], return_tensors="pt")["pixel_values"]
    module = ImageEmbedder(trained.model, trained.whitening).eval()
    with torch.no_grad():
        torch.testing.assert_close(module(pixels)[0], trained.embed(TRAIN[0][0], whiten=True), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    trained.save_pretrained(folder)
    return folder


def test_a_whitening_is_saved_with_its_adapter(trained, saved, tmp_path):
    expected = trained.embed(FILES, whiten=True)
    loaded = SEPClassifier.from_pretrained(saved)
    torch.testing.assert_close(loaded.embed(FILES, whiten=True), expected, rtol=0, atol=1e-5)
    alone = Adapter.from_pretrained(saved)
    torch.testing.assert_close(alone.embed(FILES, whiten=True), expected, rtol=0, atol=1e-5)
    alone.save_pretrained(tmp_path / "b")
    assert set(load_file(tmp_path / "b" / WHITENING_FILE)) == {"mean", "matrix"}
    alone.whitening = None
    alone.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / WHITENING_FILE).exists()
    with raises(
        "The adapter has no whitening. Train with Recipe.retrieval(), or fit one with "
        "classifier.fit_whitening(batches)."
    ):
        alone.embed(FILES, whiten=True)


def test_a_whitening_that_is_not_the_adapters_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    file = folder / WHITENING_FILE
    whole = file.read_bytes()
    save_file({"mean": torch.zeros(3), "other": torch.zeros(3, 3)}, file)
    held = {"mean": (3,), "other": (3, 3)}
    with raises(f"{file} must hold mean and matrix alone, but holds {held}. Copy or download it again."):
        Adapter.from_pretrained(folder)
    save_file({"mean": torch.zeros(3), "matrix": torch.zeros(3, 4)}, file)
    with raises(f"{file}: A whitening needs a mean (E,) and a matrix (E, E), but got (3,) and (3, 4)."):
        Adapter.from_pretrained(folder)
    save_file({"mean": torch.zeros(3), "matrix": torch.zeros(3, 3)}, file, {SAVE_ID: "0" * 32})
    with pytest.raises(MixedSaveError):
        Adapter.from_pretrained(folder)
    file.write_bytes(whole[:-4])
    with pytest.raises(SafetensorError):
        Adapter.from_pretrained(folder)


def test_what_changes_the_embeddings_drops_the_whitening(saved):
    loaded = SEPClassifier.from_pretrained(saved)
    plain = SEPClassifier(loaded.model, loaded.classes)
    plain.whitening = loaded.whitening
    loaded.add_task("again", NAMES, "default")
    with raises(
        "Task 'again' has no whitening; the classifier's is that of its own adapter. Load the task by itself with "
        "Adapter.from_pretrained."
    ):
        loaded.embed(FILES, task="again", whiten=True)
    batches = [{"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.tensor([0, 1, 0, 1])}]
    assert plain.whitening is not None and plain.set_frozen_weight(0.8, batches=batches).whitening is None
    with raises("batches of the training images are needed for a whitening, but there are none."):
        plain.fit_whitening([])
    assert plain.fit_whitening(batches).whitening is not None


def test_what_cannot_be_whitened_is_refused_before_training(trained):
    recipe = Recipe.retrieval(epochs=1)
    with raises(
        "A whitening tells images of one class from others, but all samples are of one. Pass images of two classes at "
        "least, or a recipe with whiten=False."
    ):
        fit(trained, TRAIN[:2], recipe, quiet=True)
    several = SEPClassifier.from_class_names(trained.model, trained.processor, NAMES, multi_label=True)
    with raises(
        "A whitening tells images of one class from others, but an image may have several of these. Pass a recipe with "
        "whiten=False."
    ):
        fit(several, [(image, [name]) for image, name in TRAIN], recipe, eval_samples=[], quiet=True)
    with raises("Whitened are the embeddings of one adapter. Pass embed=True, without tasks, or whiten=False."):
        export_file("task.pt2", trained, FILES, whiten=True)
    with raises("whiten must be True or False, but got 1."):
        Recipe(whiten=1)


# search


def test_an_index_keeps_embeddings_as_they_are_and_compares_whitened_ones(trained, saved, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in FILES:
        shutil.copy(file, folder)
    index = ImageIndex.of_folder(folder, trained.model, trained.processor, file=tmp_path / "index.safetensors")
    query = trained.embed(FILES[0])
    found = index.search(query, 3, trained.whitening)
    own = trained.embed([folder / name for name in index.names], whiten=True)
    expected = (own @ trained.embed(FILES[0], whiten=True)).topk(3)
    assert [name for name, _ in found] == [index.names[place] for place in expected.indices]
    assert [cosine for _, cosine in found] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert [cosine for _, cosine in index.search(query, 3)] != pytest.approx(expected.values.tolist(), abs=1e-3)
    options = ["--index", str(tmp_path / "index.safetensors"), "--json", "--quiet", "--top-k", "3"]
    assert main(["search", str(saved), str(folder), FILES[0], *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["similarity"] for each in said["found"]] == pytest.approx([cosine for _, cosine in found], abs=1e-5)
    assert said["embedded"] == 0
    output = tmp_path / "embeds.npz"
    assert main(["embed", str(saved), str(folder), str(output), "--whiten", "--quiet", "--index", options[1]]) == 0
    assert np.load(output)["embeddings"] == pytest.approx(own.numpy(), abs=1e-5)
    assert main(["embed", str(saved), str(tmp_path / "texts.txt"), str(output), "--whiten", "--quiet"]) == 1


LACKS_BOTH = (
    "; there is no whitening and no calibration, which comes after the last epoch. Call {}"
    "classifier.fit_whitening(batches) and sep_peft.training.calibrate(classifier, images)."
)
RESUME = "fit(..., resume=True) with a classifier that is made anew, or "


def test_an_interrupted_training_says_what_it_lacks_and_goes_on_to_the_same_end(tmp_path, monkeypatch):
    make = classifier_maker(Recipe.retrieval(epochs=2, batch_size=3), SEPConfig.retrieval())
    options = {"eval_samples": TRAIN[:2], "keep": "last", "quiet": True}
    whole = make()
    fit(whole, TRAIN, **options)

    def end(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    calibration_alone = LACKS_BOTH.replace("whitening and no ", "").replace(
        "classifier.fit_whitening(batches) and ", ""
    )
    for epochs, place, lacks in (
        (1, None, LACKS_BOTH),
        (2, (SEPClassifier, "fit_whitening"), LACKS_BOTH),
        (2, (sys.modules["sep_peft.training.fit"], "calibrate"), calibration_alone),
    ):
        stopped, folder = make(), tmp_path / lacks[:30]
        with monkeypatch.context() as patch:
            if place is not None:
                patch.setattr(*place, end)
            callbacks = [lambda history, place=place: end() if place is None and len(history) == 1 else None]
            with raises(
                f"stopped by SIGTERM after {epochs} of 2 epochs{lacks.format(RESUME)}", TrainingInterrupted
            ) as stop:
                fit(stopped, TRAIN, folder=folder, resume=True, callbacks=callbacks, **options)
        assert (stopped.whitening is None) == ("whitening" in stop.value.missing) and not stopped.training
        assert stopped.classes.calibration is None and stop.value.missing[-1] == "calibration"
        resumed = make()
        fit(resumed, TRAIN, folder=folder, resume=True, **options)
        for name in ("mean", "matrix"):
            assert torch.equal(getattr(resumed.whitening, name), getattr(whole.whitening, name))
        assert resumed.classes.calibration == whole.classes.calibration is not None
