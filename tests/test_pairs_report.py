"""The report of a training on pairs, the hardest captions in it, and negatives that the frozen model finds."""

from __future__ import annotations

import pytest
import torch
from small_classifier import raises
from small_pairs import make_model, make_pairs, make_processor

from sep_peft.training import Pair, PairsRecipe, evaluate_pairs, fit_pairs, write_pairs_report
from sep_peft.training.hard_captions import hardest_captions
from sep_peft.training.history import History
from sep_peft.training.mined_negatives import with_mined_negatives
from sep_peft.training.retrieval import PairEvaluation, PairValidation
from sep_peft.training.run_log import CURVES_FILE


PAIRS = make_pairs(6)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


# hardest captions


def test_the_hardest_captions_are_those_whose_image_is_found_last():
    """By the first caption its image is found first; the last belongs to two images."""
    images = torch.eye(4)
    texts = torch.nn.functional.normalize(
        torch.tensor([[9.0, 1, 1, 1], [3, 1, 2, 0], [0, 2, 1, 0], [2, 0, 0, 1]]), dim=1
    )
    pairs = [Pair(f"{i}.jpg", own) for i, own in enumerate([("a",), ("b",), ("c", "d"), ("d",)])]
    found = hardest_captions(images, texts, pairs, [[0], [1], [2, 3], [3]])
    assert found == (("b", "1.jpg", 3, "0.jpg"), ("c", "2.jpg", 2, "1.jpg"), ("d", "3.jpg", 2, "0.jpg"))
    assert hardest_captions(images, texts, pairs, [[0], [1], [2, 3], [3]], most=1) == found[:1]
    assert hardest_captions(images, images, pairs[:2], [[0], [1]]) == ()


def test_images_that_are_as_similar_come_before_the_right_one():
    pairs = [Pair(f"{i}.jpg", (f"text {i}",)) for i in range(3)]
    found = hardest_captions(torch.ones(3, 1), torch.ones(3, 1), pairs, [[0], [1], [2]])
    assert [each.place for each in found] == [3, 3, 3] and all(each.first != each.image for each in found)


# report


def test_a_report_has_recalls_curves_and_the_hardest_captions(model, processor, tmp_path):
    pairs = [Pair(pair.image, (f"<b>{number}</b> {pair.captions[0]}",)) for number, pair in enumerate(PAIRS)]
    history = fit_pairs(
        model,
        pairs,
        PairsRecipe(epochs=2, batch_size=6, max_steps=2),
        processor=processor,
        eval_pairs=pairs,
        quiet=True,
    )
    found = evaluate_pairs(model, pairs, processor)
    assert found.hardest and found.adapted.mean == max(history.measured)
    parts = {"title": "Things <i>", "training_images": 6, "history": history, "unreadable": {"a.jpg": "a.jpg is empty"}}
    write_pairs_report(tmp_path / "page.html", {"val": found}, facts={"command": "x & y", "time": None}, **parts)
    page = (tmp_path / "page.html").read_text()
    for recall in (found.adapted, found.frozen):
        for share in recall.named().values():
            assert f"{share:.1f}" in page
    assert "<b>0</b>" not in page and "&lt;b&gt;" in page and "Things &lt;i&gt;" in page and "x &amp; y" in page
    assert page.count("<figure>\n<div><img") == len(found.hardest) and "a.jpg is empty" in page
    assert "loss and accuracy over the epochs" in page and (tmp_path / CURVES_FILE).stat().st_size > 1000
    assert "<script" not in page and ">None<" not in page


def test_a_report_says_what_to_know_before_it_is_trusted(tmp_path, model, processor):
    found = evaluate_pairs(model, PAIRS[:2], processor)
    worse = PairEvaluation(
        found.frozen.__class__(dict.fromkeys((1, 5, 10), 0.0), found.frozen.text_to_image), found.frozen, 2, 3
    )
    write_pairs_report(tmp_path / "a.html", {"test": worse}, history=History(3, [], stopped="time"))
    page = (tmp_path / "a.html").read_text()
    assert "On test the adapter finds less than the model without it." in page and "stopped by time" in page
    assert "By every caption an image of its own is found first." in page
    write_pairs_report(tmp_path / "b.html", {})
    assert "nobody knows how often the adapter finds what is right" in (tmp_path / "b.html").read_text()


# mined negatives


def test_mined_negatives_are_the_nearest_captions_of_others_after_ones_own(model, processor):
    known = PairValidation(model, PAIRS, processor, 4, "refuse")
    images, texts = known.frozen_embeds()
    captions = list(known.captions.numbers)
    mined = with_mined_negatives(PAIRS, known, 3)
    assert [pair.captions for pair in mined] == [pair.captions for pair in PAIRS]
    for image, pair in zip(images, mined, strict=True):
        cosines = {text: float(image @ texts[number]) for text, number in known.captions.numbers.items()}
        best = max(cosines[text] for text in pair.captions)
        allowed = [text for text in captions if text not in pair.captions and cosines[text] < best]
        assert list(pair.negatives) == sorted(allowed, key=lambda text: -cosines[text])[:3]
    assert any(pair.negatives for pair in mined)
    own = [Pair(pair.image, pair.captions, ("a striped cat",)) for pair in PAIRS]
    kept = with_mined_negatives(own, known, 1)
    assert all(pair.negatives[0] == "a striped cat" and len(pair.negatives) <= 2 for pair in kept)


def test_a_training_with_mined_negatives_is_that_with_these_negatives(processor):
    recipe = PairsRecipe(max_steps=2, batch_size=3, mined_negatives=2)
    first, second = make_model(), make_model()
    history = fit_pairs(first, PAIRS, recipe, processor=processor, quiet=True)
    mined = with_mined_negatives(PAIRS, PairValidation(second, PAIRS, processor, 3, "refuse"), 2)
    plain = PairsRecipe(max_steps=2, batch_size=3)
    assert [row["loss"] for row in history] == [
        row["loss"] for row in fit_pairs(second, mined, plain, processor=processor, quiet=True)
    ]
    assert str(recipe).endswith("; 2 mined negatives an image")
    with raises("mined_negatives must be an integer of at least 0, but got -1."):
        PairsRecipe(mined_negatives=-1)
