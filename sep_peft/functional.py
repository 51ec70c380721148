"""Pure tensor operations of SEP: choose tokens, put prompts into a sequence, take them out, extend masks, mix.

Shapes: B inputs, L tokens, n prompts, K chosen tokens (K = n), D width of a tower, E width of the joint space.
Source of the equations: arXiv 2405.15549 and its released code, https://github.com/htyao89/SEP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def largest_tokens(
    hidden: torch.Tensor, count: int, batch_coupled: bool = False, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions of the `count` tokens with the largest mean square over channels, strongest first.

    Args:
        hidden: (B, L, D).
        count: K, at most L.
        batch_coupled: average the score over the batch and take the same positions for every input.
        visible: (B, L), False for padding, which is never chosen: an input of fewer tokens repeats its strongest one;
            None where every token is real.

    Returns:
        (B, K) int64.

    Raises:
        ValueError: `count` is larger than L.
    """
    if count > hidden.shape[1]:
        raise ValueError(
            f"{count} prompts need {count} tokens to select from, but the input has only {hidden.shape[1]}. "
            "Use fewer prompts (num_vision_prompts) or a larger picture."
        )
    # (B, L), the mean square but for a factor, read in one go and summed in fp32: fp16 squares would overflow
    energy = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide_dtype(hidden)).pow(2)
    if visible is not None:
        energy = energy.masked_fill(~visible, -1.0)  # below every energy
    if batch_coupled:
        energy = energy.mean(dim=0, keepdim=True)  # (1, L)
    strongest = energy.topk(count, dim=1)
    positions = strongest.indices
    if visible is not None:
        positions = torch.where(strongest.values < 0, positions[:, :1], positions)
    return positions.expand(hidden.shape[0], -1)


def following_tokens(start: torch.Tensor, end: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of `count` tokens from `start` on, never past `end`: a shorter text repeats its last token.

    Args:
        start: (B,) first position of each text behind BOS.
        end: (B,) last position of each text, inclusive.
        count: K.

    Returns:
        (B, K) int64.
    """
    steps = torch.arange(count, device=start.device)
    return torch.minimum(start[:, None] + steps, end[:, None])  # (B, K)


def gather_tokens(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hidden (B, L, D) at positions (B, K) -> (B, K, D)."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def take_token(hidden: torch.Tensor, position: torch.Tensor | int) -> torch.Tensor:
    """hidden (B, L, D) -> (B, 1, D), the token at `position`: one index for all inputs, or (B,)."""
    if isinstance(position, int):
        return hidden[:, position : position + 1]
    return gather_tokens(hidden, position[:, None])


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


def insert_prompts(hidden: torch.Tensor, prompts: torch.Tensor, position: int) -> torch.Tensor:
    """Put prompts (B, n, D) into hidden (B, L, D) before index `position` -> (B, L + n, D) in the dtype of hidden."""
    prompts = prompts.to(hidden.dtype)
    return torch.cat([hidden[:, :position], prompts, hidden[:, position:]], dim=1)


def replace_prompts(hidden: torch.Tensor, prompts: torch.Tensor, position: int) -> torch.Tensor:
    """Put prompts (B, n, D) in the place of those that stand in hidden (B, L + n, D) from index `position` on."""
    return hidden.slice_scatter(prompts.to(hidden.dtype), dim=1, start=position, end=position + prompts.shape[1])


def beside_prompts(positions: torch.Tensor | int, count: int, position: int | None) -> torch.Tensor | int:
    """Where tokens stand once `count` prompts stand before index `position`; None is behind all of them."""
    return positions if position is None else positions + count * (positions >= position)


def split_prompts(hidden: torch.Tensor, count: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `insert_prompts`: hidden (B, L + n, D) -> tokens (B, L, D), prompts (B, n, D).

    Where the prompts come last both are views: copying all tokens before every fusion is what would cost most.
    """
    before, prompts, behind = hidden.tensor_split([position, position + count], dim=1)
    return (before if behind.shape[1] == 0 else torch.cat([before, behind], dim=1)), prompts


def extend_mask(mask: torch.Tensor | None, count: int, position: int, causal: bool) -> torch.Tensor | None:
    """Make room for `count` prompts in the mask that an encoder layer receives.

    Prompts are visible to every token, except to tokens before them where attention is causal. They see what a token
    in their place would see: all unmasked tokens, or, where attention is causal, those before them and each other up
    to themselves.

    Args:
        mask: None (nothing is masked, or the layer applies causality itself), (B, L) with 1 for visible, or
            (B or 1, 1, L or 1, L), boolean (True is visible) or additive (0 is visible, a large negative number is
            not).
        count: n.
        position: index before which the prompts stand.
        causal: whether the mask contains causality.

    Returns:
        the mask for L + n tokens, in the same dtype; None stays None.
    """
    if mask is None or count == 0:
        return mask
    if mask.ndim == 2:
        ones = mask.new_ones(mask.shape[0], count)
        return torch.cat([mask[:, :position], ones, mask[:, position:]], dim=1)  # (B, L + n)
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    batch, heads, rows, length = mask.shape
    columns = mask.new_full((batch, heads, rows, count), visible)
    if causal and rows > 1:
        columns[:, :, :position] = hidden
    mask = torch.cat([mask[..., :position], columns, mask[..., position:]], dim=-1)  # (B, H, rows, L + n)
    if rows == 1:
        return mask
    if causal:
        before = mask[:, :, max(position - 1, 0) : max(position, 1), :position].expand(
            -1, -1, count, -1
        )  # (B, H, n, position)
        among = mask.new_full((count, count), hidden)
        among = among.triu(1) if mask.dtype != torch.bool else torch.ones_like(among).tril()
        among = among.expand(batch, heads, -1, -1)  # (B, H, n, n)
        after = mask.new_full((batch, heads, count, length - position), hidden)
        own_rows = torch.cat([before, among, after], dim=-1)  # (B, H, n, L + n)
    else:
        own_rows = mask[:, :, :1].expand(-1, -1, count, -1)  # bidirectional rows differ in nothing
    return torch.cat([mask[:, :, :position], own_rows, mask[:, :, position:]], dim=2)  # (B, H, L + n, L + n)


#: a of quick-GELU ``x sigmoid(a x)``.
QUICK_GELU_SLOPE = 1.702


class _QuickGELU(torch.autograd.Function):
    """``x sigmoid(1.702 x)``, of which the backward pass needs x alone.

    Put together from three operations it would keep another tensor of this size, in what is the widest place of a
    layer, and take five passes over memory instead of two.
    """

    generate_vmap_rule = True  # torch.func

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(QUICK_GELU_SLOPE * x).mul_(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        steep = QUICK_GELU_SLOPE * x
        if torch.is_grad_enabled():  # for second derivatives
            gate = torch.sigmoid(steep)
            return gradient * gate * (1 + steep * (1 - gate))
        return torch.ops.aten.silu_backward(gradient, steep)  # of ``z sigmoid(z)``, which has the same derivative at z


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x sigmoid(1.702 x)``, of any shape; with half of the usual memory where gradients are wanted."""
    if torch.compiler.is_compiling() or not x.requires_grad:  # compilers fuse it, and choose what to keep, themselves
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return _QuickGELU.apply(x)


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for what is that already."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in `wide_dtype`."""
    return tensor.to(wide_dtype(tensor))


def unit(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (..., E) divided by their Euclidean length, computed in fp32 or wider and returned in their dtype."""
    return F.normalize(wide(embeddings), dim=-1).to(embeddings.dtype)


def mix_embeddings(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float) -> torch.Tensor:
    """SEP's embedding: ``unit(w * unit(frozen) + (1 - w) * unit(prompted))``, (B, E).

    ``frozen_weight=0.5`` is the published equal sum, 0 the prompted tower alone.
    """
    return unit(frozen_weight * unit(frozen) + (1 - frozen_weight) * unit(prompted))


def frozen_share(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float) -> torch.Tensor:
    """How much of the frozen tower's *pooled* output makes the mix of `mix_embeddings` come out behind the projection.

    For an affine projection P, ``P(c * b + (1 - c) * a) = c * P(b) + (1 - c) * P(a)``. With
    ``c = (w / |P(b)|) / (w / |P(b)| + (1 - w) / |P(a)|)`` that points where ``w * unit(P(b)) + (1 - w) * unit(P(a))``
    points, so the model's own projection, normalization and scale can follow unchanged.

    Args:
        prompted: P(a), (B, E), embeddings of the prompted tower.
        frozen: P(b), (B, E), embeddings of the frozen tower.
        frozen_weight: w.

    Returns:
        c, (B, 1), between 0 and 1, in fp32 or wider.
    """
    frozen_norm = torch.linalg.vector_norm(wide(frozen), dim=-1, keepdim=True)
    prompted_norm = torch.linalg.vector_norm(wide(prompted), dim=-1, keepdim=True)
    share = frozen_weight * prompted_norm
    return share / (share + (1 - frozen_weight) * frozen_norm)
