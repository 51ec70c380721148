"""Tokenized texts as a text tower reads them: where they begin and end, whether they fit, what may be cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .wrappers import count_positions


if TYPE_CHECKING:
    from .tower import SEPTower

TextInputs = dict[str, torch.Tensor]


def span(tower: SEPTower, inputs: TextInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of every text, inclusive, two (B,) int64 tensors; inputs are tensors (..., L)."""
    input_ids = inputs["input_ids"].flatten(0, -2)  # (..., L) -> (B, L)
    found = eos(tower, inputs)
    return text_span(input_ids.shape, inputs.get("attention_mask"), found, input_ids.device)


def eos(tower: SEPTower, inputs: TextInputs) -> torch.Tensor | None:
    """Where each text has its EOS by the rule of its family, (B,) int64, -1: nowhere; None without a rule."""
    if tower.spec.text_end is None:
        return None
    input_ids, config = inputs["input_ids"].flatten(0, -2), tower.base_layer.config  # (..., L) -> (B, L)
    if tower.spec.text_end == "first_eos":
        return first_positions(input_ids, config.eos_token_id)
    token = config.eos_token_id if tower.spec.text_end == "eos" else HIGHEST_ID
    return eos_positions(input_ids, token)


def trim(tower: SEPTower, inputs: TextInputs) -> TextInputs:
    """Texts (C, L) without the columns after the longest one, where no result depends on these."""
    if tower.spec.max_length_padding:
        return inputs
    length = int(span(tower, inputs)[1].max()) + 1
    return {key: value[:, :length] for key, value in inputs.items()}


def pad_with_zeros(tower: SEPTower, inputs: TextInputs, length: int) -> torch.Tensor:
    """input_ids (C, L) with 0 after every text, and at least `length` columns."""
    input_ids, last = inputs["input_ids"], span(tower, inputs)[1]
    input_ids = F.pad(input_ids, (0, max(0, length - input_ids.shape[1])))
    after = torch.arange(input_ids.shape[1], device=input_ids.device) > last[:, None]  # (C, L)
    return input_ids.masked_fill(after, 0)


def check_fit(tower: SEPTower, inputs: TextInputs) -> None:
    """Make sure that texts (..., L) fit into the tower's positions beside the prompts of the active adapter.

    Raises:
        ValueError: says how many tokens are left.
    """
    settings = tower.active_settings
    if settings is None or tower.spec.positions is None or not tower.position_shift(settings):
        return
    positions = _num_positions(tower)
    left = positions - settings.num_prompts
    if inputs["input_ids"].shape[-1] <= left:
        return
    length = span(tower, inputs)[1].max() + 1
    if torch.compiler.is_compiling():
        # A branch on data would break the graph; the assertion is checked where the graph runs.
        torch._assert_async(length <= left, f"a text has more than the {left} tokens left beside the prompts")
    elif length > left:
        raise ValueError(
            f"A text of {int(length)} tokens does not fit: the text tower has {positions} positions and "
            f"{settings.num_prompts} are taken by prompts, so {left} tokens are left (BOS and EOS included). Shorten "
            "the text or use fewer prompts (num_text_prompts)."
        )


def check_length(tower: SEPTower, inputs: TextInputs) -> None:
    """Make sure that texts (C, L), trimmed, are not too long for the tower itself.

    Raises:
        ValueError: says how long a text may be.
    """
    length = inputs["input_ids"].shape[-1]
    positions = None if tower.spec.positions is None else _num_positions(tower)
    if positions is not None and length > positions:
        raise ValueError(
            f"A text of {length} tokens does not fit: the text tower has {positions} positions (BOS and EOS included). "
            "Shorten the text."
        )


def _num_positions(tower: SEPTower) -> int:
    embedding = tower.base_layer.get_submodule(tower.spec.positions)
    return count_positions(getattr(embedding, "base_layer", embedding))


def text_span(
    shape: torch.Size | tuple[int, int],
    attention_mask: torch.Tensor | None,
    eos_positions: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of every text of a batch.

    The end comes from the attention mask and from EOS, whichever is earlier; where neither is known every token counts.

    Args:
        shape: (B, L).
        attention_mask: (B, L), 1 for text and 0 for padding on either side, or None.
        eos_positions: (B,) position of EOS, -1 where a text has none, or None.
        device: of the result.

    Returns:
        two (B,) int64 tensors, both inclusive.
    """
    batch, length = shape
    first = torch.zeros(batch, dtype=torch.long, device=device)
    last = torch.full((batch,), length - 1, dtype=torch.long, device=device)
    if attention_mask is not None and attention_mask.ndim == 2:
        visible = attention_mask.to(device).ne(0).long()  # (B, L)
        first = visible.argmax(dim=1)  # argmax returns the first of equal values
        last = length - 1 - visible.flip(1).argmax(dim=1)
    if eos_positions is not None:
        last = torch.minimum(last, torch.where(eos_positions < 0, last, eos_positions))
    return first, last


#: The "EOS" of configurations whose text tower pools at the highest id of a text; old CLIP configurations say so by 2.
HIGHEST_ID = 2


def eos_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of EOS in each row of input_ids (B, L), -1 where there is none. -> (B,) int64.

    With `HIGHEST_ID` it is the position of the highest id instead.
    """
    if eos_token_id == HIGHEST_ID:
        return input_ids.argmax(dim=-1)
    return first_positions(input_ids, eos_token_id)


def first_positions(input_ids: torch.Tensor, token_id: int) -> torch.Tensor:
    """Position of the first `token_id` in each row of input_ids (B, L), -1 where there is none. -> (B,) int64."""
    found = input_ids.eq(token_id)
    return torch.where(found.any(dim=-1), found.long().argmax(dim=-1), -1)
