"""DynamicViT's two forms written from its description: loops over the tokens of one image, in numpy.

For models with DEPTH blocks of HEADS heads, 16 patches, and SITES that keep 0.7 of what arrives: 16, 11, 7.
"""

import math

import jax
import numpy as np
from scipy.special import erf

DEPTH, HEADS, SITES = 3, 2, (1, 2)


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def predictor(p, patches, mask):
    """(N, 2) of one image: log-probabilities of keeping and dropping."""
    y = gelu(linear(p["features"], norm(p["norm"], patches, 1e-5)))
    half = y.shape[1] // 2
    mean = sum(mask[n] * y[n, half:] for n in range(len(y))) / sum(mask)
    y = np.stack([np.concatenate([row[:half], mean]) for row in y])
    y = linear(p["layer_2"], gelu(linear(p["layer_1"], gelu(linear(p["layer_0"], y)))))
    return y - np.log(np.exp(y).sum(1, keepdims=True))


def masked_attention(query, key, value, mask):
    """(T, C) of one head: mask[t] says how much the others may attend to token t; every token may attend to itself."""
    num_tokens, channels = query.shape
    rows = []
    for t in range(num_tokens):
        logits = key @ query[t] / math.sqrt(channels)
        weights = np.exp(logits - logits.max()) * np.array([1.0 if s == t else mask[s] for s in range(num_tokens)])
        rows.append((weights + 1e-6 / num_tokens) / (weights.sum() + 1e-6) @ value)
    return np.stack(rows)


def attention(query, key, value):
    logits = query @ key.T / math.sqrt(query.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ value


def block(p, x, mask):
    width, heads = x.shape[1], HEADS
    query, key, value = np.split(linear(p["attention"]["qkv"], norm(p["attention_norm"], x, 1e-6)), 3, axis=1)
    mixed = []
    for head in np.arange(width).reshape(heads, -1):
        parts = query[:, head], key[:, head], value[:, head]
        mixed.append(attention(*parts) if mask is None else masked_attention(*parts, mask))
    x = x + linear(p["attention"]["out"], np.concatenate(mixed, axis=1))
    return x + linear(p["mlp"]["down"], gelu(linear(p["mlp"]["up"], norm(p["feed_forward_norm"], x, 1e-6))))


def double(tree):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), tree)


def masking_reference(params, x, noise, relaxed=False):
    """(tokens, mask, ratio loss) of one embedded image; noise (site, N, 2). relaxed: decisions are not rounded."""
    mask, deviations, site = np.ones(16), [], 0
    for i in range(DEPTH):
        if i in SITES:
            log_probs = predictor(params["reducer"][f"predictor_{i}"], x[1:], mask)
            for n in range(16):
                keep, drop = log_probs[n] + noise[site, n]
                mask[n] *= math.exp(keep) / (math.exp(keep) + math.exp(drop)) if relaxed else float(keep >= drop)
            site += 1
            deviations.append((mask.mean() - 0.7**site) ** 2)
        x = block(params[f"block_{i}"], x, np.concatenate([[1.0], mask]) if site else None)
    return x, mask, 2.0 / len(deviations) * sum(deviations)


def gathering_reference(params, x):
    """(tokens, kept) of one embedded image."""
    kept, site = np.arange(16), 0
    for i in range(DEPTH):
        if i in SITES:
            site += 1
            scores = predictor(params["reducer"][f"predictor_{i}"], x[1:], np.ones(len(kept)))[:, 0]
            best = sorted(np.argsort(-scores)[: math.floor(16 * 0.7**site)])
            kept, x = kept[best], np.concatenate([x[:1], x[1:][best]])
        x = block(params[f"block_{i}"], x, None)
    return x, kept
