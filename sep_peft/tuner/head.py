"""What a model pools from its tower, and SEP's mix of both branches in the place of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..method.mix import frozen_share, unit
from . import mixed_batch


if TYPE_CHECKING:
    from .tower import SEPTower


def pooled(tower: SEPTower, output, inputs: dict) -> torch.Tensor:
    """What the model pools from the tower's output for these inputs, (B, D), or (B, Q, D) with a reader."""
    spec = tower.spec
    if spec.reader is not None:
        return _read(tower, output.last_hidden_state)
    if spec.pooled == "pooler_output":
        return output.pooler_output.flatten(0, -2)  # where it is (B, 1, D), from one query of a pooling head
    if spec.pooled == "first_token":
        return output.last_hidden_state[:, 0]
    leading, mask = spec.leading_tokens, inputs.get(spec.mask_input)
    states = output.last_hidden_state[:, leading:]
    if mask is None:
        return states.mean(dim=1)
    weights = mask[:, leading:, None].to(states.dtype)  # (B, L, 1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def mix_outputs(tower: SEPTower, prompted, frozen, inputs: dict) -> None:
    """Put into the prompted output what the model pools SEP's embedding from.

    With c the frozen share, ``c * frozen + (1 - c) * prompted`` takes the place of what is pooled, or of all tokens
    where their mean is pooled. Where the projection is not affine, the same of the projected outputs follows what
    the prompted pass has pooled. For a reader both branches' tokens stand side by side, (B, L, 2 D).
    """
    spec = tower.spec
    if spec.reader is not None:
        states = [output.last_hidden_state for output in (prompted, frozen)]
        prompted.last_hidden_state = torch.cat(states, dim=-1)  # see `SEPReader`
        return
    a, b = pooled(tower, prompted, inputs), pooled(tower, frozen, inputs)
    projected_a, projected_b = tower.project(a), tower.project(b)
    share = frozen_share(projected_a, projected_b, tower.frozen_weight)  # (B, 1)

    if spec.mixes_after_projection:
        embedding = _mixed(projected_a, projected_b, share)
        prompted.pooler_output = torch.cat([a, embedding.to(a.dtype)], dim=-1)  # (B, D + E), see `SEPProjection`
        return
    if spec.pooled == "pooler_output":
        mix = _mixed(a, b, share)
        if spec.unit_option is not None and getattr(tower.base_layer.config, spec.unit_option):
            mix = unit(mix)
        prompted.pooler_output = mix.view_as(prompted.pooler_output)
        if spec.projected is not None:
            prompted[spec.projected] = tower.project(mix)
        return
    states, frozen_states = prompted.last_hidden_state, frozen.last_hidden_state
    if spec.pooled == "mean_tokens":
        prompted.last_hidden_state = _mixed(states, frozen_states, share[:, None])
    else:
        first = _mixed(a, b, share)[:, None]  # (B, 1, D)
        prompted.last_hidden_state = torch.cat([first, states[:, 1:]], dim=1)
        if spec.pooler_repeats:
            prompted.pooler_output = first[:, 0]


def mix_read(tower: SEPTower, prompted: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """The mix of what the reader has made of both branches, query by query, each (B, Q, D) -> (B, Q, D)."""
    projected = [tower.project(_projectable(tower, embeddings)) for embeddings in (prompted, frozen)]
    weight = mixed_batch.frozen_weight(tower, prompted)
    return _mixed(prompted, frozen, frozen_share(*projected, weight))


def _read(tower: SEPTower, states: torch.Tensor) -> torch.Tensor:
    """What the reader makes of the tokens of one branch, (B, L, D) -> (B, Q, D)."""
    reader, queries = tower.owner.get_submodule(tower.spec.reader), tower.owner.get_parameter(tower.spec.queries)
    output = reader(
        query_embeds=queries.expand(len(states), -1, -1),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        return_dict=True,
    )
    return _projectable(tower, output.last_hidden_state)


def _projectable(tower: SEPTower, embeddings: torch.Tensor) -> torch.Tensor:
    """In the dtype of the projection: models keep readers in fp32."""
    return embeddings.to(next(iter(tower.projection_parameters()), embeddings).dtype)


def _mixed(prompted: torch.Tensor, frozen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return (share * frozen + (1 - share) * prompted).to(prompted.dtype)
