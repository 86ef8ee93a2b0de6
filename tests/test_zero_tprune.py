"""Zero-TPrune against a walk over lists of tokens, token by token and vote by vote."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images, whole_cost_of

from tif_jax import InputError, create_model
from tif_jax.reducers.zero_tprune import importance, page_rank, redundant

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean", image_size=(48, 24))


def ranks(attention, present, has_class, rounds):
    """{token: score} of each head, for the tokens numbered in `present`; those in front are special."""
    heads = []
    for of_head in attention:
        score = {t: 1.0 for t in present}
        if has_class:
            score[0] = math.sqrt(len(present))
        for _ in range(rounds):
            given = {t: sum(of_head[t][other] for other in present) for t in present}
            score = {
                to: sum(score[t] * of_head[t][to] / given[t] for t in present) for to in present
            }  # what every token gives away sums to what it had
        heads.append(score)
    return heads


def root_mean_square(heads, patches):
    """{patch: importance}."""
    used = [score for score in heads if 0.01 <= np.var([score[p] for p in patches]) <= 0.7] or heads
    return {p: math.sqrt(np.mean([score[p] ** 2 for score in used])) for p in patches}


def attention_and_keys(qk):
    """(H, T, T), and keys (T, C) as mean over heads, of one image."""
    query, key = (np.asarray(a, np.float64)[0] for a in (qk.query, qk.key))
    logits = np.einsum("thc,shc->hts", query, key) / math.sqrt(key.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True), key.mean(axis=1)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def kept_of(qk, num_special, has_class, num_kept, similar, rounds):
    """The places among all tokens of the patches kept."""
    attention, keys = attention_and_keys(qk)
    everyone = [*range(len(keys))]
    patches = everyone[num_special:]
    number = min(round(similar * (len(patches) - num_kept)), len(patches) // 2)
    first = root_mean_square(ranks(attention, everyone, has_class, 1), patches)
    order = sorted(patches, key=lambda p: -first[p])
    above, below = order[: len(patches) - len(patches) // 2], order[len(patches) - len(patches) // 2 :]
    alike = {p: max(cosine(keys[p], keys[other]) for other in above) for p in below}
    gone = sorted(below, key=lambda p: -alike[p])[:number]
    left = [t for t in everyone if t not in gone]
    patches = [p for p in patches if p not in gone]
    last = root_mean_square(ranks(attention, left, has_class, rounds), patches)
    return sorted(sorted(patches, key=lambda p: -last[p])[:num_kept])


def walk(model, x, num_kept, similar):
    """Of one image what comes out and the raster positions kept. num_kept: {block: patches before it}."""
    special, has_class, depth = model.num_special, model.tokens(1).has_class, len(model.blocks)
    kept, x, qk = np.arange(x.shape[0] - special), x[None], None
    for i, block in enumerate(model.blocks):
        if i in num_kept:
            rounds = 30 if i - 1 < depth / 4 else 5 if i - 1 < depth * 3 / 4 else 1
            places = kept_of(qk, special, has_class, num_kept[i], similar, rounds)
            x, kept = (
                jnp.concatenate([x[:, :special], x[:, np.array(places)]], axis=1),
                kept[np.array(places) - special],
            )
        x, qk = attend(block, x)
        x = feed_forward(block, x)
    return np.asarray(x)[0], kept


@pytest.mark.parametrize(
    ("variant", "options", "num_kept"),
    mostly_long(
        [
            ({}, dict(num_kept=(16, 12, 8, 5)), {1: 12, 2: 8, 3: 5}),
            (BARE, dict(keep_ratio=0.5, sites=(2,), similar=0.2), {2: 9}),
            (dict(distillation_token=True, depth=3), dict(keep_ratio=(0.7, 0.3), similar=1.0, sites=(1, 2)), {1: 11, 2: 3}),
            (dict(depth=8), dict(keep_ratio=0.5, similar=0.0), {3: 8, 5: 4, 7: 2}),
        ],
        short=(0, 1),
    ),
)  # fmt: skip
def test_equals_the_reference(variant, options, num_kept):
    model = lively(TINY | variant, reducer="zero_tprune", **options)
    x = embed(model, numpy_images(3, model.image_size))
    found, aux = jax.jit(lambda model, x: model.encode(x))(model, x)
    for b in range(3):
        expected, kept = walk(model, x[b], num_kept, options.get("similar", 0.5))
        np.testing.assert_array_equal(aux["kept"][b], kept)
        np.testing.assert_allclose(found[b], expected, atol=1e-3)


def random_attention(seed, heads=3, tokens=9):
    return jax.nn.softmax(4 * jnp.asarray(np.random.default_rng(seed).normal(size=(1, heads, tokens, tokens))), axis=-1)


def test_many_rounds_end_in_the_stationary_distribution():
    """The left eigenvector of attention among those present, whatever it began with."""
    attention = random_attention(0)
    present = jnp.asarray([[1, 1, 0, 1, 0, 1, 1, 1.0]])
    found = page_rank(attention, present, True, rounds=200)
    there = np.array([0, 1, 2, 4, 6, 7, 8])
    for head in range(3):
        among = np.asarray(attention, np.float64)[0, head][np.ix_(there, there)]
        values, vectors = np.linalg.eig((among / among.sum(axis=1, keepdims=True)).T)
        stationary = np.real(vectors[:, np.argmax(np.real(values))])
        expected = stationary / stationary.sum() * (6 + math.sqrt(7))
        np.testing.assert_allclose(found[0, head][there], expected, rtol=1e-4)
        assert (np.asarray(found)[0, head][[3, 5]] == 0).all()


def test_heads_that_say_nothing_or_shout_are_not_heard():
    flat, loud = np.ones(8) + [0.01, -0.01] * 4, np.array([8.0] + [0.0] * 7)
    heard = np.array([1.5, 0.5, 1.2, 0.8, 1.4, 0.6, 1.0, 1.0])
    present = jnp.ones((1, 8))
    found = importance(jnp.asarray([[flat, heard, loud]], jnp.float32), present)
    np.testing.assert_allclose(found[0], heard, rtol=1e-5)
    found = importance(jnp.asarray([[flat, loud]], jnp.float32), present)  # nobody else
    np.testing.assert_allclose(found[0], np.sqrt((flat**2 + loud**2) / 2), rtol=1e-5)


def test_ties_go_to_the_lower_place():
    metric = jnp.ones((1, 6, 2)) / math.sqrt(2)
    np.testing.assert_array_equal(redundant(metric, jnp.asarray([[1, 2, 1, 1, 2, 1.0]]), 2), [[2, 3]])


def test_cost_and_tokens_of_deit():
    """Of a block 12 T D² + 2 T² D; votes are T² a head, and half of the M patches are compared with the others."""
    options = dict(num_kept=(138, 97, 68), sites=(3, 6, 9))
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="zero_tprune", **options)
    assert counted.tokens == (197,) * 3 + (139,) * 3 + (98,) * 3 + (69,) * 3
    blocks = sum(12 * t * 192**2 + 2 * t**2 * 192 for t in counted.tokens) + 196 * 768 * 192 + 192 * 1000
    votes = sum(3 * t**2 * (2 + rounds) for t, rounds in ((197, 31), (139, 6), (98, 6)))
    keys = sum((m - m // 2) * (m // 2) * 64 for m in (196, 138, 97))
    assert counted.gmac == pytest.approx((blocks + votes + keys) / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=1.2), "keep_ratio is 1.2"),
        (dict(similar=-0.1), "similar is -0.1; it is a share"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="zero_tprune", **options)


@pytest.mark.parametrize("options", [dict(sites=(0, 2)), dict(num_kept=(9, 9, 9, 9))])
def test_nothing_says_what_to_drop_before_the_first_block(options):
    with pytest.raises(InputError, match="let sites begin with 1, or num_kept with all patches"):
        cost_of(TINY, reducer="zero_tprune", **options)
