"""Tokenized texts as a text tower reads them: where they begin and end, whether they fit, what may be cut off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..families.spec import TowerSpec
from ..tracing import is_traced
from ..words import are, counted
from .settings import TowerSettings
from .wrappers import count_positions


#: Tokenized texts: `input_ids` and perhaps `attention_mask`, tensors (B, L).
TextInputs = dict[str, torch.Tensor]
#: The "EOS" of configurations whose text tower pools at the highest id of a text; old CLIP configurations say so by 2.
HIGHEST_ID = 2


class TextRules:
    """What a text tower does with tokenized texts.

    Args:
        spec: of the tower.
        base: the tower.
    """

    def __init__(self, spec: TowerSpec, base: nn.Module):
        self.spec = spec
        self.base = base

    def span(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last position of every text, inclusive, two (B,) int64 tensors; inputs are tensors (..., L)."""
        input_ids = inputs["input_ids"].flatten(0, -2)  # (..., L) -> (B, L)
        return text_span(input_ids.shape, inputs.get("attention_mask"), self.eos(inputs), input_ids.device)

    def eos(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Where each text has its EOS by the rule of its family, (B,) int64, -1: nowhere; None without a rule."""
        if self.spec.text_end is None:
            return None
        input_ids, config = inputs["input_ids"].flatten(0, -2), cast(Any, self.base).config  # (..., L) -> (B, L)
        if self.spec.text_end == "first_eos":
            return first_positions(input_ids, config.eos_token_id)
        return eos_positions(input_ids, config.eos_token_id if self.spec.text_end == "eos" else HIGHEST_ID)

    def trim(self, inputs: Mapping[str, torch.Tensor]) -> TextInputs:
        """Texts (C, L) without the columns after the longest one, where no result depends on these."""
        if self.spec.max_length_padding:
            return dict(inputs)
        length = int(self.span(inputs)[1].max()) + 1
        return {key: value[:, :length] for key, value in inputs.items()}

    def without_mask(self, inputs: Mapping[str, torch.Tensor]) -> TextInputs:
        """Texts (C, L) without their mask, where EOS says the same and causal attention hides what comes after it.

        So it is where the model reads the EOS alone and the mask shows all from the first place to it. To take a mask,
        models look whether it masks anything, for which an accelerator is waited for, and no kernel of flash attention
        takes one.
        """
        spec, eos = self.spec, self.eos(inputs)
        if eos is None or not spec.causal or spec.mlp_norm is None or spec.max_length_padding:
            return dict(inputs)
        visible = inputs.get("attention_mask")
        if visible is None or visible.ndim != 2:
            return dict(inputs)
        places, eos = torch.arange(visible.shape[1], device=visible.device), eos.to(visible.device)[:, None]  # (C, 1)
        needless = bool(((eos >= 0) & (visible.ne(0) | (places > eos))).all())
        return {key: value for key, value in inputs.items() if key != "attention_mask" or not needless}

    def check_room(self, inputs: Mapping[str, torch.Tensor], settings: TowerSettings | None) -> None:
        """Make sure that texts (..., L) have room in the tower's positions beside the prompts.

        Args:
            inputs: the texts.
            settings: of the adapter whose prompts join them; None: no prompts do.

        Raises:
            ValueError: says how many tokens are left.
        """
        if settings is None or self.spec.positions is None or not settings.position_shift(self.spec):
            return
        positions, left = self.num_positions(), self.room(settings)
        if inputs["input_ids"].shape[-1] <= left:
            return
        length = self.span(inputs)[1].max() + 1
        if is_traced():
            # A branch on data would break the graph; the assertion is checked where the graph runs.
            message = f"a text has more than the {left} tokens left beside the prompts"
            torch._assert_async(length <= left, message)  # pyright: ignore[reportPrivateImportUsage]  # no public name
        elif length > left:
            raise ValueError(
                f"A text of {int(length)} tokens does not fit: the text tower has {positions} positions and "
                f"{settings.num_prompts} {are(settings.num_prompts)} taken by prompts, so "
                f"{counted(left, 'token')} {are(left)} left (BOS and EOS included). "
                "Shorten the text or use fewer prompts (num_text_prompts)."
            )

    def check_length(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Make sure that texts (C, L), trimmed, are not too long for the tower itself.

        Raises:
            ValueError: says how long a text may be.
        """
        length = inputs["input_ids"].shape[-1]
        if self.spec.positions is not None and length > self.num_positions():
            raise ValueError(
                f"A text of {length} tokens does not fit: the text tower has {self.num_positions()} positions (BOS and "
                "EOS included). Shorten the text."
            )

    def check_ids(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Make sure that the ids of texts (..., L) are in the tower's vocabulary, where its configuration tells that.

        Raises:
            ValueError: says which id is not, and how large the vocabulary is.
        """
        size = getattr(self.base.config, "vocab_size", None)
        largest = int(inputs["input_ids"].max())
        if isinstance(size, int) and largest >= size:
            raise ValueError(
                f"Token id {largest} is outside of the text tower's vocabulary of {size} ids. Tokenize with the "
                "processor of this base model."
            )

    def room(self, settings: TowerSettings | None) -> int:
        """Tokens that a text may have beside the prompts of an adapter with these settings; None: without prompts."""
        shift = 0 if settings is None else settings.position_shift(self.spec)
        return self.num_positions() - shift

    def num_positions(self) -> int:
        """Positions that tokens can have in the tower."""
        assert self.spec.positions is not None, "a tower without a table of positions does not limit them"
        embedding = self.base.get_submodule(self.spec.positions)
        return count_positions(getattr(embedding, "base_layer", embedding))


def text_span(
    shape: torch.Size | tuple[int, int],
    attention_mask: torch.Tensor | None,
    eos: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of every text of a batch.

    The end comes from the attention mask and from EOS, whichever is earlier; where neither is known every token counts.

    Args:
        shape: (B, L).
        attention_mask: (B, L), 1 for text and 0 for padding on either side, or None.
        eos: (B,) position of EOS, -1 where a text has none, or None.
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
    if eos is not None:
        last = torch.minimum(last, torch.where(eos < 0, last, eos))
    return first, last


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
