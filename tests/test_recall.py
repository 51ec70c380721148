"""Recall at 1, 5 and 10, beside a count by hand; ties find nothing."""

from __future__ import annotations

import pytest
import torch

from sep_peft.training import recall
from sep_peft.training.recall import Recall, measure_recall


CAPTIONS = [[0, 1], [2], [1, 3], [4, 4], [5, 0], [6]]


def by_hand(images, texts, captions, ranks) -> tuple[dict, dict]:
    """Everything in lists, one query after the other."""
    similar = (images @ texts.T).tolist()
    places, of_images = [], range(len(captions))
    for image in of_images:
        order = sorted(range(len(texts)), key=lambda text: -similar[image][text])
        places.append(min(order.index(text) for text in captions[image]))
    backwards = []
    for image in of_images:
        for text in dict.fromkeys(captions[image]):
            order = sorted(of_images, key=lambda other: -similar[other][text])
            backwards.append(min(order.index(other) for other in of_images if text in captions[other]))
    return tuple({k: 100 * sum(p < k for p in found) / len(found) for k in ranks} for found in (places, backwards))


@pytest.mark.parametrize("room", [1, 20, 2**24])
def test_recall_is_what_a_count_by_hand_gives(room, monkeypatch):
    monkeypatch.setattr(recall, "SIMILARITIES", room)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(6, 8, generator=generator), torch.randn(7, 8, generator=generator)
    found = measure_recall(images, texts, CAPTIONS, (1, 2, 3, 6))
    expected = by_hand(images, texts, CAPTIONS, (1, 2, 3, 6))
    assert found.image_to_text == pytest.approx(expected[0]) and found.text_to_image == pytest.approx(expected[1])
    assert 0 < found.image_to_text[2] < 100 and found.text_to_image[6] == 100


def test_embeddings_that_are_all_the_same_find_nothing():
    same = torch.ones(12, 4) / 2
    found = measure_recall(same, same, [[index] for index in range(12)])
    assert found.named() == {f"{way}_{k}": 0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


def test_what_is_shown():
    found = Recall({1: 10, 5: 30, 10: 41.04}, {1: 9, 5: 28, 10: 40})
    assert str(found) == "image to text 10.0 30.0 41.0, text to image 9.0 28.0 40.0 %"
    assert found.mean == pytest.approx(158.04 / 6)
