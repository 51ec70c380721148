"""Pure tensor operations against loops, over odd sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sep_peft.method.coupled import CoupledSelection
from sep_peft.method.mix import frozen_share, mix_embeddings
from sep_peft.method.select import following_tokens, gather_tokens, largest_tokens, take_token
from sep_peft.method.sequence import beside_prompts, extend_mask, insert_prompts, replace_prompts, split_prompts
from sep_peft.tuner.texts import eos_positions, text_span


@pytest.mark.parametrize(("batch", "length", "count", "width"), [(1, 1, 1, 1), (3, 7, 2, 5), (2, 5, 5, 3)])
def test_largest_tokens(batch, length, count, width):
    hidden = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
    found = largest_tokens(hidden, count)
    for row in range(batch):
        energy = [float((token**2).mean()) for token in hidden[row]]
        assert found[row].tolist() == sorted(range(length), key=lambda i: -energy[i])[:count]
    coupled = CoupledSelection().of_images(hidden, count)
    mean = [float((hidden[:, i] ** 2).mean()) for i in range(length)]
    assert coupled.tolist() == [sorted(range(length), key=lambda i: -mean[i])[:count]] * batch


def test_largest_tokens_survives_fp16():
    hidden = torch.tensor([[[1.0], [300.0], [299.0]]], dtype=torch.float16)  # squares overflow
    assert largest_tokens(hidden, 2).tolist() == [[1, 2]]


def test_more_prompts_than_tokens():
    message = (
        "4 prompts need 4 tokens to select from, but the input has only 3. Use fewer prompts (num_vision_prompts) or a "
        "larger image."
    )
    with pytest.raises(ValueError) as error:
        largest_tokens(torch.zeros(1, 3, 2), 4)
    assert str(error.value) == message


def test_following_tokens_repeat_the_last():
    found = following_tokens(torch.tensor([1, 1, 2]), torch.tensor([5, 2, 2]), 4)
    assert found.tolist() == [[1, 2, 3, 4], [1, 2, 2, 2], [2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("mask", "eos", "first", "last"),
    [
        (None, None, [0, 0], [3, 3]),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], None, [0, 0], [1, 3]),
        ([[0, 0, 1, 1], [0, 1, 1, 1]], None, [2, 1], [3, 3]),
        (None, [2, -1], [0, 0], [2, 3]),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], [1, 3], [0, 0], [1, 3]),
    ],
)
def test_text_span(mask, eos, first, last):
    mask = None if mask is None else torch.tensor(mask)
    eos = None if eos is None else torch.tensor(eos)
    found = text_span((2, 4), mask, eos, torch.device("cpu"))
    assert [x.tolist() for x in found] == [first, last]


def test_eos_positions():
    ids = torch.tensor([[5, 1, 9, 9], [5, 1, 2, 3], [9, 1, 2, 3]])
    assert eos_positions(ids, 9).tolist() == [2, -1, 0]
    assert eos_positions(ids, 2).tolist() == [2, 0, 0]  # old configurations: the highest id


@pytest.mark.parametrize("position", [0, 1, 4])
def test_insert_and_split_are_inverse(position):
    hidden, prompts = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    joined = insert_prompts(hidden, prompts, position)
    assert torch.equal(joined[:, position : position + 2], prompts)
    tokens, again = split_prompts(joined, 2, position)
    assert torch.equal(tokens, hidden) and torch.equal(again, prompts)


@pytest.mark.parametrize("position", [0, 1, 4])
def test_replaced_prompts_leave_the_tokens(position):
    hidden, prompts = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 2, 3, requires_grad=True)
    joined = insert_prompts(hidden, torch.zeros(2, 2, 3), position)
    replaced = replace_prompts(joined, prompts.double(), position)
    tokens, again = split_prompts(replaced, 2, position)
    assert replaced.dtype == hidden.dtype and torch.equal(tokens, hidden) and torch.equal(again, prompts)
    weight = torch.randn(2, 6, 3)
    (replaced * weight).sum().backward()
    expected_hidden, expected_prompts = split_prompts(weight, 2, position)
    assert torch.equal(hidden.grad, expected_hidden) and torch.equal(prompts.grad, expected_prompts)


@pytest.mark.parametrize("position", [0, 2, None])
def test_tokens_beside_prompts_are_the_same_tokens(position):
    hidden, prompts, positions = torch.randn(2, 4, 3), torch.randn(2, 5, 3), torch.tensor([[3, 0, 2], [1, 1, 0]])
    joined = insert_prompts(hidden, prompts, 4 if position is None else position)
    moved = beside_prompts(positions, 5, position)
    assert torch.equal(gather_tokens(joined, moved), gather_tokens(hidden, positions))
    for one in (0, 3):
        token = take_token(joined, beside_prompts(one, 5, position))
        assert torch.equal(token, hidden[:, one : one + 1])
    token = take_token(joined, beside_prompts(positions[:, 0], 5, position))
    assert torch.equal(token, hidden[[0, 1], [3, 1]][:, None])


def expected_visibility(keys: list[bool], count: int, position: int, causal: bool) -> list[list[bool]]:
    """Who sees whom, row by row, from the rule: prompts are seen, and see what a token in their place would see."""
    keys = keys[:position] + [True] * count + keys[position:]
    return [[keys[s] and (not causal or s <= t) for s in range(len(keys))] for t in range(len(keys))]


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(
    ("keys", "position", "causal"),
    [
        ([True] * 4, 1, True),
        ([True] * 4, 1, False),
        ([True, True, True, False], 1, True),
        ([True, True, True, False], 1, False),
        ([True, False], 2, False),  # appended, as image towers have it
    ],
)
def test_extend_mask(keys, position, causal, boolean):
    count, length = 3, len(keys)
    visible = torch.tensor([[keys[s] and (not causal or s <= t) for s in range(length)] for t in range(length)])
    lowest = torch.finfo(torch.float32).min
    mask = visible if boolean else torch.where(visible, 0.0, lowest)
    found = extend_mask(mask[None, None], count, position, causal)
    assert found.dtype == mask.dtype and found.shape == (1, 1, length + count, length + count)
    if not boolean:
        assert set(found.unique().tolist()) <= {0.0, lowest}
        found = found == 0
    assert found[0, 0].tolist() == expected_visibility(keys, count, position, causal)


def test_extend_mask_of_other_shapes():
    assert extend_mask(None, 3, 1, True) is None
    flat = torch.tensor([[1, 1, 0]])
    assert extend_mask(flat, 2, 1, False).tolist() == [[1, 1, 1, 1, 0]]
    row = torch.tensor([[[[True, False, True]]]])
    assert extend_mask(row, 2, 1, False).tolist() == [[[[True, True, True, False, True]]]]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_share_is_right_after_any_affine_projection(weight, bias):
    torch.manual_seed(0)
    projection = torch.nn.Linear(6, 4, bias=bias).double()
    prompted, frozen = torch.randn(5, 6).double(), 3 * torch.randn(5, 6).double()
    share = frozen_share(projection(prompted), projection(frozen), weight)
    pooled = share * frozen + (1 - share) * prompted
    expected = mix_embeddings(projection(prompted), projection(frozen), weight)
    torch.testing.assert_close(F.normalize(projection(pooled), dim=-1), expected)


def test_published_mix_is_the_equal_sum():
    prompted, frozen = torch.randn(3, 4), torch.randn(3, 4)
    summed = F.normalize(prompted, dim=-1) + F.normalize(frozen, dim=-1)
    torch.testing.assert_close(mix_embeddings(prompted, frozen, 0.5), F.normalize(summed, dim=-1))
