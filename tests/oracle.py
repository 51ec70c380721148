"""A CLIP written a second time, slowly, one input at a time, around the package's plain reference of the method.

It shares no code with transformers' forward passes; it only reads weights. Text inputs are unpadded lists of token ids.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from sep_peft.method import reference


def layer_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def linear(x, weight, bias=None):
    y = torch.stack([(weight * row).sum(dim=1) for row in x])
    return y if bias is None else y + bias


def attend(q, k, v, heads, causal=False):
    """(T, D), (S, D), (S, D) -> (T, D), one head and one query after the other."""
    size = q.shape[-1] // heads
    rows = []
    for t in range(len(q)):
        parts = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            last = t + 1 if causal else len(k)
            scores = (q[t, part] * k[:last, part]).sum(dim=1) / math.sqrt(size)
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            parts.append(sum(weights[s] * v[s, part] for s in range(last)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def encoder_layer(x, layer, heads, causal):
    a = layer.self_attn
    h = layer_norm(x, layer.layer_norm1)
    q, k, v = (linear(h, p.weight, p.bias) for p in (a.q_proj, a.k_proj, a.v_proj))
    x = x + linear(attend(q, k, v, heads, causal), a.out_proj.weight, a.out_proj.bias)
    h = quick_gelu(linear(layer_norm(x, layer.layer_norm2), layer.mlp.fc1.weight, layer.mlp.fc1.bias))
    return x + linear(h, layer.mlp.fc2.weight, layer.mlp.fc2.bias)


def run_layers(x, tower, causal, prompts, **options):
    """Hidden states (L, D) through all layers of a tower, with prompts where there are any."""
    heads = tower.config.num_attention_heads
    layers = [partial(encoder_layer, layer=layer, heads=heads, causal=causal) for layer in tower.encoder.layers]
    if prompts is None:
        for layer in layers:
            x = layer(x)
        return x
    return reference.prompted_tower(x, prompts, layers, **options)


def image_features(clip, pixels, prompts=None, fusions=None, start=0, fusion_tokens="selected"):
    """Projected embedding (E,) of one image (3, H, W); `fusions`: layer -> fusion module."""
    tower = clip.vision_model
    e = tower.embeddings
    size = e.patch_size
    tokens = [e.class_embedding]
    for top in range(0, pixels.shape[1], size):
        for left in range(0, pixels.shape[2], size):
            patch = pixels[:, top : top + size, left : left + size]
            tokens.append(torch.stack([(patch * w).sum() for w in e.patch_embedding.weight]))
    x = layer_norm(torch.stack(tokens) + e.position_embedding.weight, tower.pre_layrnorm)
    if prompts is not None and start == 0:
        prompts = layer_norm(prompts, tower.pre_layrnorm)
    options = {"prompt_index": len(x), "start_layer": start, "fusion_tokens": fusion_tokens}
    x = run_layers(x, tower, False, prompts, fusions=fusions or {}, **options)
    return clip.visual_projection.weight @ layer_norm(x[0], tower.post_layernorm)


def text_features(clip, ids, prompts=None, fusions=None, start=0, fusion_tokens="selected"):
    """Projected embedding (E,) of one text, a list of token ids from BOS to EOS."""
    tower = clip.text_model
    words, positions = tower.embeddings.token_embedding.weight, tower.embeddings.position_embedding.weight
    moved = len(prompts) if prompts is not None and start == 0 else 0
    x = torch.stack([words[token] + positions[i if i == 0 else i + moved] for i, token in enumerate(ids)])
    if moved:
        prompts = prompts + positions[1 : 1 + moved]
    options = {"prompt_index": 1, "start_layer": start, "is_text": True, "fusion_tokens": fusion_tokens}
    x = run_layers(x, tower, True, prompts, fusions=fusions or {}, **options)
    return clip.text_projection.weight @ layer_norm(x[-1], tower.final_layer_norm)
