"""Texts in chunks of similar length."""

from __future__ import annotations

import pytest
import torch
from small_classifier import make_model
from small_clip import EOS, make_texts

from sep_peft.classifier.text_chunks import TextChunks, chunk_sizes
from sep_peft.tuner.model import find_towers


LENGTHS = [5, 3, 7, 4, 3, 8, 5]


@pytest.mark.parametrize(
    ("lengths", "largest", "sizes"),
    [
        ([3], 4, [1]),
        ([3, 3, 3, 4, 5], 2, [2, 1, 1, 1]),
        ([3, 3, 4, 4, 4, 4, 4, 9], 4, [2, 4, 1, 1]),
        ([3, 4, 5, 6, 6, 6, 7, 8, 9], 24, [3, 3, 3]),  # an eighth is three
        ([3] * 9, 4, [4, 4, 1]),
    ],
)
def test_where_chunks_end(lengths, largest, sizes):
    assert chunk_sizes(lengths, largest) == sizes


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize("masked", [True, False])
def test_every_text_is_there_once_and_comes_back_in_its_place(size, masked):
    tower = find_towers(make_model())["text"]
    inputs = make_texts(LENGTHS, total=12, pad=EOS)
    if not masked:
        del inputs["attention_mask"]
    chunks = TextChunks(tower, inputs, size)
    found = []
    for chunk in chunks:
        assert set(chunk) == set(inputs) and len(chunk["input_ids"]) <= size
        # (<= size, <= L) -> (<= size, L)
        ids = torch.nn.functional.pad(chunk["input_ids"], (0, 12 - chunk["input_ids"].shape[1]), value=EOS)
        assert (chunk["input_ids"] == EOS).sum(dim=1).min() == 1  # no column after the longest text
        found.append(ids)
    assert len(found) == len(chunks)
    assert torch.equal(chunks.encode(lambda **_: found.pop(0)), inputs["input_ids"])
    assert not chunks.state_dict()


def test_tokens_are_counted_with_padding_and_prompts():
    tower = find_towers(make_model())["text"]
    # 3, 3 | 4 | 5, 5 | 7 | 8: with at most two texts a chunk, a new one begins wherever texts get longer
    assert TextChunks(tower, make_texts(LENGTHS), 2).num_tokens(3) == 2 * 6 + 7 + 2 * 8 + 10 + 11
    # 3, 3, 4, 5, 5, 7, 8: a chunk of up to 128 takes at least 16 texts before it ends for their length
    assert TextChunks(tower, make_texts(LENGTHS), 128).num_tokens(0) == 7 * 8
