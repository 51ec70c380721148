"""SEP written a second time, slowly, from the equations of arXiv 2405.15549: one input at a time, with loops.

It shares no code with the package and none with transformers' forward passes; it only reads weights. Text inputs are
unpadded lists of token ids.
"""

from __future__ import annotations

import math

import torch


def layer_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def linear(x, weight, bias=None):
    y = torch.stack([torch.stack([(row * w).sum() for w in weight]) for row in x])
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
            scores = torch.stack([(q[t, part] * k[s, part]).sum() / math.sqrt(size) for s in range(last)])
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


def fuse(prompts, tokens, fusion):
    """The token fusion of one input: (n, D) and (n, D) -> (n, D)."""
    heads = max(1, tokens.shape[-1] // 64)
    s, z = layer_norm(tokens, fusion.norm1), layer_norm(prompts, fusion.norm1)

    def project(x, p):
        if hasattr(p, "down"):
            return linear(linear(x, p.down.weight), p.up.weight, p.up.bias)
        return linear(x, p.weight, p.bias)

    a = fusion.attention
    y = attend(project(z, a.query), project(s, a.key), project(s, a.value), heads)
    y = fusion.scale1 * tokens + (1 - fusion.scale1) * project(y, a.output)
    mlp = linear(quick_gelu(linear(layer_norm(y, fusion.norm2), fusion.fc1.weight)), fusion.fc2.weight)
    return fusion.scale2 * y + (1 - fusion.scale2) * mlp


def strongest(tokens, count):
    energies = [float((t**2).mean()) for t in tokens]
    return sorted(range(len(tokens)), key=lambda i: -energies[i])[:count]


def image_features(clip, pixels, prompts=None, fusions=None, start=0):
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
    length, heads = len(x), tower.config.num_attention_heads
    for i, layer in enumerate(tower.encoder.layers):
        if prompts is not None and i == start:
            x = torch.cat([x, layer_norm(prompts, tower.pre_layrnorm) if start == 0 else prompts])
        elif fusions and i in fusions:
            chosen = torch.stack([x[j] for j in strongest(x[:length], len(prompts))])
            x = torch.cat([x[:length], fuse(x[length:], chosen, fusions[i])])
        x = encoder_layer(x, layer, heads, causal=False)
    pooled = layer_norm(x[0], tower.post_layernorm)
    return clip.visual_projection.weight @ pooled


def text_features(clip, ids, prompts=None, fusions=None, start=0):
    """Projected embedding (E,) of one text, a list of token ids from BOS to EOS."""
    tower = clip.text_model
    words, positions = tower.embeddings.token_embedding.weight, tower.embeddings.position_embedding.weight
    count = 0 if prompts is None else len(prompts)
    moved = count if start == 0 else 0
    x = torch.stack([words[token] + positions[i if i == 0 else i + moved] for i, token in enumerate(ids)])
    heads = tower.config.num_attention_heads
    for i, layer in enumerate(tower.encoder.layers):
        if prompts is not None and i == start:
            own = prompts + positions[1 : 1 + count] if start == 0 else prompts
            x = torch.cat([x[:1], own, x[1:]])
        elif fusions and i in fusions:
            words_after = x[1 + count :]
            chosen = torch.stack([words_after[min(k, len(words_after) - 1)] for k in range(count)])
            x = torch.cat([x[:1], fuse(x[1 : 1 + count], chosen, fusions[i]), x[1 + count :]])
        x = encoder_layer(x, layer, heads, causal=True)
    return clip.text_projection.weight @ layer_norm(x[-1], tower.final_layer_norm)


def mix(prompted, frozen, weight):
    """SEP's embedding from both branches."""
    x = weight * frozen / frozen.norm() + (1 - weight) * prompted / prompted.norm()
    return x / x.norm()
