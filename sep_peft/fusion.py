"""Token fusion: prompts rebuilt from the tokens that represent one input.

Source: Yao, Zhang, Yu, Zhang, Xu, "SEP: Self-Enhanced Prompt Tuning for Visual-Language Model", arXiv 2405.15549;
https://github.com/htyao89/SEP. This file knows neither PEFT nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .functional import quick_gelu


#: Channels of one attention head; the number of heads of a tower of width D is D / 64.
HEAD_SIZE = 64
#: Initial value of the two learned scales.
INITIAL_SCALE = 0.75


def num_heads(hidden_size: int) -> int:
    """Heads of the fusion attention: ``hidden_size / 64``, or the next smaller number that divides `hidden_size`."""
    heads = max(1, hidden_size // HEAD_SIZE)
    while hidden_size % heads:
        heads -= 1
    return heads


class LowRankLinear(nn.Module):
    """A linear map whose weight is factored: ``y = up(down(x))`` with ``rank`` channels in between.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width in between, at least 1.
        bias: adds a learned vector (out_features,) behind the second factor.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden))


class FusionAttention(nn.Module):
    """Multi-head attention of n prompts over K tokens: ``softmax(QK^T / sqrt(head))V`` between projections.

    Args:
        hidden_size: D, width of the tower.
        rank: None for full projections (3 x D -> D and D -> D, with biases); r factors each of the four into
            D -> r -> D.
    """

    def __init__(self, hidden_size: int, rank: int | None = None, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads(hidden_size)
        self.head_size = hidden_size // self.num_heads
        kwargs = {"device": device, "dtype": dtype}
        for name in ("query", "key", "value", "output"):
            if rank is None:
                projection = nn.Linear(hidden_size, hidden_size, **kwargs)
            else:
                projection = LowRankLinear(hidden_size, hidden_size, rank, **kwargs)
            self.add_module(name, projection)

    def reset_parameters(self) -> None:
        for projection in (self.query, self.key, self.value, self.output):
            if isinstance(projection, LowRankLinear):
                projection.reset_parameters()
            else:
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def _split_heads(self, hidden: torch.Tensor) -> torch.Tensor:
        # (B, T, D) -> (B, heads, T, D / heads)
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """query (B, n, D) and tokens (B, K, D) -> (B, n, D)."""
        q, k, v = self.query(query), self.key(tokens), self.value(tokens)
        attended = F.scaled_dot_product_attention(*(self._split_heads(x) for x in (q, k, v)))
        # (B, heads, n, D / heads) -> (B, n, D)
        return self.output(attended.transpose(1, 2).flatten(-2))

    def weights(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The attention weights themselves, (B, heads, n, K), for inspection; rows sum to 1."""
        q, k = self._split_heads(self.query(query)), self._split_heads(self.key(tokens))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


class LowRankAttention(FusionAttention):
    """`FusionAttention` with factored projections, computed on r channels instead of D.

    With ``q = U_q a + b_q``, ``k = U_k b + b_k`` and ``v = U_v c + b_v``, where a, b and c have r channels, and behind
    the attention a first factor D_o, head h needs only two small matrices of its own::

        q_h . k_h = b~ . (A_h a~)       A_h = [U_k b_k]_h^T [U_q b_q]_h       x~ = (x, 1)
        D_o v     = sum_h B_h c~        B_h = D_o,h [U_v b_v]_h

    All heads thus attend to the same tokens b~ with the same values c~: heads are further queries. It is the same map.
    Where r is below the size of a head it takes fewer operations, and nothing but its result is as wide as the tower,
    which counts where a step encodes the texts of many classes.
    """

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """query (B, n, D) and tokens (B, K, D) -> (B, n, D)."""
        low = F.linear(tokens, torch.cat([self.key.down.weight, self.value.down.weight]))  # (B, K, 2 r)
        keys, values = (_with_one(x) for x in low.chunk(2, dim=-1))  # (B, K, r + 1)
        # A_h of all heads, (heads (r + 1), r + 1)
        per_head = (self._up(self.key).mT @ self._up(self.query)).flatten(0, 1)
        queries = F.linear(_with_one(self.query.down(query)), per_head)  # (B, n, heads (r + 1))
        queries = queries.unflatten(-1, (self.num_heads, -1)).flatten(1, 2)  # (B, n heads, r + 1)
        attended = F.scaled_dot_product_attention(
            *(x.unsqueeze(1) for x in (queries, keys, values)), scale=self.head_size**-0.5
        ).squeeze(1)  # (B, n heads, r + 1)
        attended = attended.unflatten(1, (-1, self.num_heads)).flatten(2)  # (B, n, heads (r + 1))
        # B_h of all heads, (heads, r, r + 1) -> (r, heads (r + 1))
        down = self.output.down.weight.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, r, D / heads)
        per_head = (down @ self._up(self.value)).transpose(0, 1).flatten(1)
        return self.output.up(F.linear(attended, per_head))

    def _up(self, projection: LowRankLinear) -> torch.Tensor:
        """The second factor with its bias as last column, for each head, (heads, D / heads, r + 1)."""
        up = projection.up
        return torch.cat([up.weight, up.bias[:, None]], dim=1).unflatten(0, (self.num_heads, -1))


def _with_one(x: torch.Tensor) -> torch.Tensor:
    """(..., r) -> (..., r + 1), with 1 in the last place."""
    return F.pad(x, (0, 1), value=1.0)


def make_attention(hidden_size: int, rank: int | None = None, **kwargs) -> FusionAttention:
    """The attention of a fusion; factored below the size of a head it needs fewer operations on r channels."""
    below = rank is not None and rank < hidden_size // num_heads(hidden_size)
    return (LowRankAttention if below else FusionAttention)(hidden_size, rank, **kwargs)


class TokenFusion(nn.Module):
    """New prompts from K representative tokens of one input and the prompts of the layer before.

    With ``S = LN1(tokens)`` and ``Q = LN1(prompts)`` (one layer norm for both)::

        Y  = s1 * tokens + (1 - s1) * MHA(query=Q, key=S, value=S)
        Z' = s2 * Y      + (1 - s2) * MLP(LN2(Y))          MLP = D -> hidden -> D, quick-GELU, no biases

    s1 and s2 are learned scalars that start at 0.75.

    Args:
        hidden_size: D, width of the tower.
        mlp_size: width of the MLP between its two layers, 256 as published.
        rank: None for full-width projections as published, r for projections factored to r.
        batch_coupled: attend across the *inputs of the batch* for each prompt, as the released code does, instead of
            across the K tokens of each input. Results then depend on which inputs share a batch.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_size: int = 256,
        rank: int | None = None,
        batch_coupled: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.batch_coupled = batch_coupled
        self.norm1 = nn.LayerNorm(hidden_size, **kwargs)
        self.attention = make_attention(hidden_size, rank, **kwargs)
        self.norm2 = nn.LayerNorm(hidden_size, **kwargs)
        self.fc1 = nn.Linear(hidden_size, mlp_size, bias=False, **kwargs)
        self.fc2 = nn.Linear(mlp_size, hidden_size, bias=False, **kwargs)
        self.scale1 = nn.Parameter(torch.empty(1, **kwargs))
        self.scale2 = nn.Parameter(torch.empty(1, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm1.reset_parameters()
        self.attention.reset_parameters()
        self.norm2.reset_parameters()
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        nn.init.constant_(self.scale1, INITIAL_SCALE)
        nn.init.constant_(self.scale2, INITIAL_SCALE)

    def forward(self, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """prompts (B, n, D) of the layer before and tokens (B, n, D) of this input -> prompts (B, n, D).

        Both are cast to the dtype of this module's weights, the result stays in it.
        """
        prompts, tokens = prompts.to(self.scale1.dtype), tokens.to(self.scale1.dtype)
        query, keys = self.norm1(prompts), self.norm1(tokens)
        if self.batch_coupled:
            # The released code hands (B, n, D) to an attention that reads (sequence, batch, D): for each of the n
            # prompts the sequence is the batch. (B, n, D) -> (n, B, D) -> (B, n, D)
            attended = self.attention(query.transpose(0, 1), keys.transpose(0, 1)).transpose(0, 1)
        else:
            attended = self.attention(query, keys)
        mixed = torch.lerp(attended.to(tokens.dtype), tokens, self.scale1)
        hidden = self.fc2(quick_gelu(self.fc1(self.norm2(mixed))))
        return torch.lerp(hidden.to(mixed.dtype), mixed, self.scale2)

    def attention_weights(self, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """How strongly each prompt attends to each token, (B, heads, n, K), for the same inputs as `forward`."""
        dtype = self.scale1.dtype
        return self.attention.weights(self.norm1(prompts.to(dtype)), self.norm1(tokens.to(dtype)))


class LayerFusions(nn.ModuleDict):
    """The fusions of one adapter in one tower, by the key of their layer.

    Args:
        fusions: key -> fusion; none is added or taken out later.
    """

    def __init__(self, fusions: Mapping[str, TokenFusion]):
        super().__init__(fusions)
        # Adapters are switched, and cached class texts are compared, by way of all parameters. A search through some 20
        # modules a layer takes longer than either, so these dictionaries are found once. Modules keep their dictionary
        # when parameters in it are replaced, as loading and moving do.
        self._owned = tuple(module._parameters for module in self.modules() if module._parameters)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters, in the order of `nn.Module.parameters`."""
        if not recurse:
            return iter(())  # a dictionary of modules has none of its own
        return (parameter for owned in self._owned for parameter in owned.values() if parameter is not None)
