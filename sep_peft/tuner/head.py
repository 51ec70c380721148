"""`Head`: what a model makes of a tower's output, and SEP's mix of both branches in the place of it."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..families.spec import TowerSpec
from ..method.mix import frozen_share, unit
from .offload import read_parameter


class Head:
    """Pooling, projection and mix of one tower.

    Args:
        spec: of the tower.
        base: the tower.
        owner: the model that owns the tower, its projection and its reader.
    """

    def __init__(self, spec: TowerSpec, base: nn.Module, owner: nn.Module):
        self.spec = spec
        self.base = base
        self.owner = owner

    @property
    def width(self) -> int:
        """D of what the tower gives out."""
        return getattr(self.base.config, self.spec.hidden_size)

    @property
    def projection(self) -> nn.Module | None:
        """The model's own projection, or what wraps it; None where the tower projects."""
        # by attributes: a wrapper of another method on the way passes them on
        return None if self.spec.projection is None else attrgetter(self.spec.projection)(self.owner)

    @property
    def embed_size(self) -> int | None:
        """E, as the model's own projection tells it; None where the tower projects itself."""
        linears = [] if self.projection is None else [m for m in self.projection.modules() if isinstance(m, nn.Linear)]
        return linears[-1].out_features if linears else None

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the projection."""
        projection = self.projection
        return [] if projection is None else list(projection.parameters())

    # from the tower's output to an embedding

    def pool(self, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What the model pools from the tower's output for these inputs, (B, D), or (B, Q, D) with a reader.

        Raises:
            ValueError: the mean is pooled, and no tokens are left after the leading ones.
        """
        spec = self.spec
        if spec.reader is not None:
            return self._read(output.last_hidden_state)
        if spec.pooling == "pooler_output":
            return output.pooler_output.flatten(0, -2)  # where it is (B, 1, D), from one query of a pooling head
        if spec.pooling == "first_token":
            return output.last_hidden_state[:, 0]
        leading, mask = spec.leading_tokens, inputs.get(spec.mask_input)
        states = output.last_hidden_state[:, leading:]
        if states.shape[1] == 0:
            raise ValueError(
                f"The tower has {output.last_hidden_state.shape[1]} tokens for this input, of which leading_tokens="
                f"{leading} in its spec leave none to take the mean of. Correct the spec."
            )
        if mask is None:
            return states.mean(dim=1)
        weights = mask[:, leading:, None].to(states.dtype)  # (B, L, 1)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """The model's own projection into the joint space, (B, D) -> (B, E)."""
        projection = self.projection
        return pooled if projection is None else projection(pooled)

    def embed(self, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The projected embedding of the tower's output for these inputs, (B, E), not normalized."""
        return self.project(self.pool(output, inputs))

    def _read(self, states: torch.Tensor) -> torch.Tensor:
        """What the reader makes of the tokens of one branch, (B, L, D) -> (B, Q, D)."""
        assert self.spec.reader is not None and self.spec.queries is not None, "a reader reads by queries"
        reader, queries = self.owner.get_submodule(self.spec.reader), read_parameter(self.owner, self.spec.queries)
        output = reader(
            query_embeds=queries.expand(len(states), -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
            return_dict=True,
        )
        return self._projectable(output.last_hidden_state)

    def _projectable(self, embeddings: torch.Tensor) -> torch.Tensor:
        """In the dtype of the projection: models keep readers in fp32."""
        return embeddings.to(next(iter(self.parameters()), embeddings).dtype)

    # the mix

    def mix(self, prompted: Any, frozen: Any, inputs: Mapping[str, Any], frozen_weight: float | torch.Tensor) -> None:
        """Put into the prompted output what the model pools SEP's embedding from.

        With c the frozen share, ``c * frozen + (1 - c) * prompted`` takes the place of what is pooled, or of all tokens
        where their mean is pooled. Where the projection is not affine, the same of the projected outputs follows what
        the prompted pass has pooled (see `SEPProjection`). For a reader both branches' tokens stand side by side,
        (B, L, 2 D) (see `SEPReader`).

        Args:
            prompted: output of the prompted pass, changed in place.
            frozen: output of the frozen pass.
            inputs: of the tower.
            frozen_weight: share of the frozen embedding; a number, or (B, 1), or of fewer inputs, each of which stands
                for several side by side.
        """
        spec = self.spec
        if spec.reader is not None:
            states = [output.last_hidden_state for output in (prompted, frozen)]
            prompted.last_hidden_state = torch.cat(states, dim=-1)
            return
        a, b = self.pool(prompted, inputs), self.pool(frozen, inputs)
        projected_a, projected_b = self.project(a), self.project(b)
        if isinstance(frozen_weight, torch.Tensor):
            frozen_weight = frozen_weight.repeat_interleave(len(a) // len(frozen_weight), dim=0)  # (B, 1)
        share = frozen_share(projected_a, projected_b, frozen_weight)  # (B, 1)
        if spec.mixes_after_projection:
            embeds = _weighted(projected_a, projected_b, share)
            prompted.pooler_output = torch.cat([a, embeds.to(a.dtype)], dim=-1)  # (B, D + E)
        elif spec.pooling == "pooler_output":
            self._mix_pooled(prompted, _weighted(a, b, share))
        elif spec.pooling == "mean_tokens":
            states, frozen_states = prompted.last_hidden_state, frozen.last_hidden_state
            prompted.last_hidden_state = _weighted(states, frozen_states, share[:, None])  # (B, 1) -> (B, 1, 1)
        else:
            first = _weighted(a, b, share)[:, None]  # (B, 1, D)
            prompted.last_hidden_state = torch.cat([first, prompted.last_hidden_state[:, 1:]], dim=1)
            if spec.pooler_repeats:
                prompted.pooler_output = first[:, 0]

    def _mix_pooled(self, prompted: Any, mix: torch.Tensor) -> None:
        """Put the mix (B, D) in the place of the pooled output, and of what the tower makes of it."""
        if self.spec.unit_option is not None and getattr(self.base.config, self.spec.unit_option):
            mix = unit(mix)
        prompted.pooler_output = mix.view_as(prompted.pooler_output)  # (B, D), or (B, 1, D)
        if self.spec.projected is not None:
            prompted[self.spec.projected] = self.project(mix)

    def mix_read(
        self, prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float | torch.Tensor
    ) -> torch.Tensor:
        """The mix of what the reader has made of both branches, query by query, each (B, Q, D) -> (B, Q, D).

        Args:
            prompted, frozen: of the branches.
            frozen_weight: share of the frozen embedding; a number, or (B, 1, 1).
        """
        projected_a, projected_b = (self.project(self._projectable(embeds)) for embeds in (prompted, frozen))
        return _weighted(prompted, frozen, frozen_share(projected_a, projected_b, frozen_weight))

    def align(self, outputs: list) -> None:
        """Let the model get both branches of all samples of a mixed batch, or of none, where it mixes after the tower.

        Samples without a mix have two equal branches, or one that counts alone.

        Args:
            outputs: of the tower for parts of the batch, changed in place.
        """
        width = self.width
        if self.spec.mixes_after_projection and len({output.pooler_output.shape[-1] for output in outputs}) > 1:
            for output in outputs:
                pooled = output.pooler_output
                if pooled.shape[-1] == width:
                    output.pooler_output = torch.cat([pooled, self.project(pooled).to(pooled.dtype)], dim=-1)
        if self.spec.reader is not None and len({output.last_hidden_state.shape[-1] for output in outputs}) > 1:
            for output in outputs:
                states = output.last_hidden_state
                if states.shape[-1] == width:
                    output.last_hidden_state = torch.cat([states, states], dim=-1)


def _weighted(prompted: torch.Tensor, frozen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return (share * frozen + (1 - share) * prompted).to(prompted.dtype)
