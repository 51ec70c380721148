"""The whole method, for one input at a time and as plainly as it can be said.

Source: Yao, Zhang, Yu, Zhang, Xu, "SEP: Self-Enhanced Prompt Tuning for Visual-Language Model", arXiv 2405.15549, and
its released code, https://github.com/htyao89/SEP, without what that couples across a batch (see `coupled`). The rest of
the package computes the same for many inputs at once inside of real towers; the tests hold it against this file.

Shapes: L tokens, n prompts, D width of a tower, E width of the joint space, C classes, B inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from .fusion import TokenFusion
from .independent import LearnedPrompts
from .sources import noise_tokens, scattered


def prompted_tower(
    tokens: torch.Tensor,
    prompts: torch.Tensor,
    layers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    fusions: Mapping[int, TokenFusion | LearnedPrompts],
    prompt_index: int,
    start_layer: int = 0,
    is_text: bool = False,
    fusion_tokens: str = "selected",
) -> torch.Tensor:
    """Run one input through a tower with prompts: tokens (L, D) and prompts (n, D) -> tokens (L, D).

    The prompts stand before index `prompt_index` from layer `start_layer` on. Before each layer that has a fusion they
    are made anew from n tokens of this very input, or are learned, and after the last layer they are cut off.
    """
    n = len(prompts)
    for index, layer in enumerate(layers):
        if index < start_layer:
            tokens = layer(tokens)
            continue
        fusion = fusions.get(index)
        if isinstance(fusion, LearnedPrompts):
            prompts = fusion.prompts
        elif fusion is not None:
            own = tokens[prompt_index:] if is_text else tokens
            prompts = fuse(prompts, read(own, n, is_text, fusion_tokens, index), fusion)
        states = layer(torch.cat([tokens[:prompt_index], prompts, tokens[prompt_index:]]))  # (L + n, D)
        prompts = states[prompt_index : prompt_index + n]
        tokens = torch.cat([states[:prompt_index], states[prompt_index + n :]])
    return tokens


def read(tokens: torch.Tensor, n: int, is_text: bool, fusion_tokens: str, layer: int) -> torch.Tensor:
    """What a fusion reads of the tokens (L, D) of an image, or of the words of a text: (n, D)."""
    if fusion_tokens == "noise":
        return noise_tokens(n, tokens.shape[1], layer)
    if fusion_tokens == "mean":
        size = len(tokens)
        return torch.stack([tokens[k * size // n : -(-(k + 1) * size // n)].mean(dim=0) for k in range(n)])
    if fusion_tokens == "random" and is_text:
        return tokens[[int(share * len(tokens)) for share in scattered(torch.arange(n)).tolist()]]
    if fusion_tokens == "random":
        ranks = scattered(torch.arange(len(tokens))).tolist()
        return tokens[sorted(range(len(tokens)), key=lambda index: -ranks[index])[:n]]
    return following(tokens, n) if is_text else strongest(tokens, n)


def strongest(tokens: torch.Tensor, n: int) -> torch.Tensor:
    """The n tokens of an image with the largest mean square over channels, strongest first: (L, D) -> (n, D)."""
    energies = [token.square().mean().item() for token in tokens]
    return tokens[sorted(range(len(tokens)), key=lambda index: -energies[index])[:n]]


def following(words: torch.Tensor, n: int) -> torch.Tensor:
    """The first n words of a text, whose last one is repeated where it has fewer: (words, D) -> (n, D)."""
    return torch.stack([words[min(index, len(words) - 1)] for index in range(n)])


def fuse(prompts: torch.Tensor, tokens: torch.Tensor, fusion: TokenFusion) -> torch.Tensor:
    """Token fusion of prompts Z and tokens S, all (n, D).

    ``Y = s1 S + (1 - s1) MHA(LN1 Z, LN1 S, LN1 S)`` and ``Z' = s2 Y + (1 - s2) MLP(LN2 Y)``.
    """
    attention, heads = fusion.attention, fusion.attention.num_heads
    keys = fusion.norm1(tokens)
    q, k, v = attention.query(fusion.norm1(prompts)), attention.key(keys), attention.value(keys)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (n, D) -> (heads, n, D / heads)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # (heads, n, n)
    attended = attention.output((weights @ v).transpose(0, 1).flatten(1))  # (heads, n, D / heads) -> (n, D)
    y = fusion.scale1 * tokens + (1 - fusion.scale1) * attended
    hidden = fusion.fc1(fusion.norm2(y))
    return fusion.scale2 * y + (1 - fusion.scale2) * fusion.fc2(hidden * torch.sigmoid(1.702 * hidden))


def mix(prompted: torch.Tensor, frozen: torch.Tensor, frozen_weight: float = 0.5) -> torch.Tensor:
    """SEP's embedding (E,) of unit length from the projected embeddings of the prompted and of the frozen tower."""
    mixed = frozen_weight * frozen / frozen.norm() + (1 - frozen_weight) * prompted / prompted.norm()
    return mixed / mixed.norm()


def loss(
    images: torch.Tensor,
    frozen_images: torch.Tensor,
    texts: torch.Tensor,
    frozen_texts: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    prototypes: torch.Tensor,
    weights: tuple[float, float, float],
) -> torch.Tensor:
    """The objective of one batch; embeddings (B, E) and (C, E) have unit length, weights are w_t, w_v and w_p."""
    text_weight, vision_weight, prototype_weight = weights
    w = prototypes / prototypes.norm(dim=-1, keepdim=True)  # (C, E)
    total = F.cross_entropy(logit_scale * images @ texts.T, labels)
    total = total + text_weight * (1 - (texts * frozen_texts).sum(dim=-1).mean())
    total = total + vision_weight * (1 - (images * frozen_images).sum(dim=-1).mean())
    terms = [F.cross_entropy(10 * embeds @ w.T, labels) for embeds in (images, frozen_images)]
    return total + prototype_weight * sum(terms)
