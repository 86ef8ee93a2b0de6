"""AS-ViT's ranking against a walk in numpy, head by head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images, row_of, whole_cost_of

from tif_jax import InputError, create_model

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)
SPECIAL = dict(distillation_token=True, num_registers=1, qk_norm=True)
values_of = jax.jit(lambda block, x: block.attention.project(block.attention_norm(x), row_of(x))[1])


def scores_of(qk, value, num_special):
    """Of each patch of one image the class token's attention, heads weighted by the length of what they make of the patch."""
    query, key, value = (np.asarray(a, np.float64)[0] for a in (qk.query, qk.key, value))
    num_tokens, num_heads, channels = key.shape
    attention, length = np.zeros((num_heads, num_tokens)), np.zeros((num_heads, num_tokens))
    for head in range(num_heads):
        for t in range(num_tokens):
            weights = np.exp(key[:, head] @ query[t, head] / math.sqrt(channels))
            weights /= weights.sum()
            length[head, t] = np.linalg.norm(weights @ value[:, head])
            attention[head] = weights if t == 0 else attention[head]
    return (attention * length / length.sum(axis=0)).sum(axis=0)[num_special:]


def walk(model, x, num_kept):
    """Of one image what comes out and the raster positions kept. num_kept: {block: patches before it}."""
    special = model.num_special
    kept, x, scores = np.arange(x.shape[0] - special), x[None], None
    for i, block in enumerate(model.blocks):
        if i in num_kept:
            places = np.sort(np.argsort(-scores, kind="stable")[: num_kept[i]])
            x, kept = jnp.concatenate([x[:, :special], x[:, special + places]], axis=1), kept[places]
        value = values_of(block, x)
        x, qk = attend(block, x)
        scores = scores_of(qk, value, special)
        x = feed_forward(block, x)
    return np.asarray(x)[0], kept


@pytest.mark.parametrize(
    ("variant", "options", "num_kept"),
    mostly_long(
        [
            (SPECIAL, dict(keep_ratio=0.5), {2: 8, 3: 4}),
            ({}, dict(num_kept=(16, 12, 8, 5)), {1: 12, 2: 8, 3: 5}),
            ({}, dict(keep_ratio=(0.7, 0.3), sites=(1, 3)), {1: 11, 3: 3}),
        ]
    ),
)
def test_equals_the_reference(variant, options, num_kept):
    model = lively(TINY | variant, reducer="as_vit", **options)
    x = embed(model, numpy_images(3))
    found, aux = jax.jit(lambda model, x: model.encode(x))(model, x)
    for b in range(3):
        expected, kept = walk(model, x[b], num_kept)
        np.testing.assert_array_equal(aux["kept"][b], kept)
        np.testing.assert_allclose(found[b], expected, atol=1e-3)


def test_sites_are_the_authors():
    for name, sites in (("deit_tiny_patch16_224", (4, 7, 10)), (dict(TINY, depth=16), (5, 9, 13))):
        tokens = cost_of(name, reducer="as_vit").tokens
        assert tuple(i for i in range(1, len(tokens)) if tokens[i] < tokens[i - 1]) == sites


def test_cost_of_deit():
    """Ranking is the class token's row of attention: T D a site."""
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="as_vit", num_kept=(138, 97, 68))
    assert counted.tokens == (197,) * 4 + (139,) * 3 + (98,) * 3 + (69,) * 2
    blocks = sum(12 * t * 192**2 + 2 * t**2 * 192 for t in counted.tokens) + 196 * 768 * 192 + 192 * 1000
    assert counted.gmac == pytest.approx((blocks + (197 + 139 + 98) * 192) / 1e9, rel=1e-6)


def test_misuse():
    with pytest.raises(InputError, match=r"keep_ratio is 1\.2"):
        create_model(TINY, reducer="as_vit", keep_ratio=1.2)
    with pytest.raises(InputError, match="let sites begin with 1"):
        cost_of(TINY, reducer="as_vit", sites=(0,))
