"""ToSA's specification in numpy: one image, head by head; the blocks' two halves are black boxes."""

import math

import jax
import numpy as np
from cases import attend, feed_forward

from tif_jax.models.params import params_of


def attention_logits(qk):
    """(H, T, T) of one image, scaled."""
    query, key = (np.asarray(a, np.float64)[0] for a in (qk.query, qk.key))
    heads = range(query.shape[1])
    return np.stack([query[:, h] @ key[:, h].T for h in heads]) / math.sqrt(query.shape[2])


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def predict(params, logits):
    """The logits that a selector makes of (H, T, T), head by head."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    heads = range(len(logits))
    mix = lambda kernel, maps: np.stack([sum(kernel[e, g] * maps[e] for e in heads) for g in heads])  # noqa: E731
    hidden = np.maximum(mix(p["first"]["kernel"], logits) + p["first"]["bias"][:, None, None], 0)
    return logits + mix(p["second"]["kernel"], hidden)


def scores_of(model, i, x, qk, selector):
    """How much the patches of one image are worth to block i, after a block with these queries and keys."""
    front = model.num_special
    if selector == "class":
        return softmax(attention_logits(qk))[:, 0, front:].mean(axis=0)
    if selector == "oracle":
        qk = attend(model.blocks[i], x[None])[1]
    logits = attention_logits(qk)
    if selector == "learned":
        logits = predict(params_of(model)["reducer"][f"selector_{i}"], logits)
    received = np.zeros(logits.shape[2])
    for head in softmax(logits):
        for query in head:
            received += query
    return received[front:]


def walk(model, x, counts, selector="learned"):
    """One image's tokens (T, D) through blocks as black boxes; counts: {selective block: number of patches}."""
    front, qk, margins = model.num_special, None, [1.0]
    selected = list(range(len(x) - front))
    for i, block in enumerate(model.blocks):
        rows = list(range(len(x)))
        if i in counts:
            scores = scores_of(model, i, x, qk, selector)
            order = sorted(range(len(scores)), key=lambda j: -scores[j])
            margins.append(scores[order[counts[i] - 1]] / scores[order[counts[i]]] - 1)
            selected = sorted(order[: counts[i]])
            rows = [*range(front), *(front + j for j in selected)]
        middle, qk = attend(block, x[rows][None])
        y = feed_forward(block, middle)
        x = x.copy()
        for row, token in zip(rows, np.asarray(y)[0], strict=True):
            x[row] = token
    return x, selected, min(margins)
