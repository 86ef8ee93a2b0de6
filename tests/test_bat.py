"""BAT: every step, and the whole, against loops in numpy; costs against the authors' logs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, embed, feed_forward, mostly_long, numpy_images, numpy_model, whole_cost_of
from flax import nnx

from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model
from tif_jax.models.params import params_of
from tif_jax.reducers._density_peaks import cluster, merge, shares
from tif_jax.reducers.bat import Counts, counts_at, decouple, match, reduce

TINY = dict(image_size=48, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)  # 36 patches; sites 1, 2, 3
FRONT = dict(pool="mean", distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.3)
VARIANTS = {
    "default": {},
    "site": dict(sites=(2,), keep_ratio=0.3),
    "per_site": dict(sites=(0, 3), keep_ratio=(0.8, 0.2)),
    "front": FRONT,
}


def images(num=3, size=48, seed=0):
    return numpy_images(num, (size, size), seed)


@functools.cache
def model_of(reducer="bat", **options):
    options = ({"keep_ratio": 0.5} if reducer == "bat" else {}) | options
    model = numpy_model(TINY, reducer=reducer, **options)
    # Larger weights than at initialisation: attention, densities and similarities of different tokens should differ.
    scaled = jax.tree.map(lambda p: p * 6 if p.ndim == 2 and p.shape[0] == p.shape[1] // 3 else p, params_of(model))
    nnx.update(model, scaled)
    return model


# The method in loops over one image; tokens are rows.


def slow_decouple(scores, num_attentive):
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return order[:num_attentive], order[num_attentive:]


def slow_cluster(x, num_clusters, neighbours):
    num, width = x.shape
    d = np.array([[np.linalg.norm(x[i] - x[j]) / np.sqrt(width) for j in range(num)] for i in range(num)])
    rho = [np.exp(-np.mean(np.sort(d[i])[: min(neighbours, num)] ** 2)) for i in range(num)]
    peaks = []
    for i in range(num):
        above = [d[i, j] for j in range(num) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        peaks.append(rho[i] * (min(above) if above else d.max()))
    centres = sorted(sorted(range(num), key=lambda i: (-peaks[i], i))[:num_clusters])
    return [i if i in centres else min(centres, key=lambda c: (d[i, c], c)) for i in range(num)]


def slow_match(x, num_pairs):
    joined = list(range(len(x)))
    cosine = lambda p, q: x[p] @ x[q] / np.linalg.norm(x[p]) / np.linalg.norm(x[q])  # noqa: E731
    edges = sorted((-cosine(p, q), p, q) for p in range(0, len(x), 2) for q in range(1, len(x), 2))
    taken = set()
    for _, p, q in edges:  # the first edge of a p is its best one
        if len(taken) < num_pairs and p not in taken:
            joined[p] = q
            taken.add(p)
    return joined


def slow_merge(x, weights, joined):
    """Rows in order of the tokens joined."""
    left = [n for n in range(len(x)) if joined[n] == n]
    rows = []
    for n in left:
        members = [j for j in range(len(x)) if joined[j] == n]
        rows.append(sum(weights[j] * x[j] for j in members) / sum(weights[j] for j in members))
    return np.array(rows), left, [left.index(n) for n in joined]


def slow_class_attention(query, key, num_special):
    logits = np.einsum("hc,thc->ht", query[0], key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).mean(0)[num_special:]


def slow_bat(model, x):
    """Tokens after the last block, kept, source. Blocks' half-steps are black boxes."""
    reducer, front = model.reducer, model.num_special
    sites = (1, 2, 3) if reducer.sites is None else reducer.sites
    ratios = reducer.keep_ratio if isinstance(reducer.keep_ratio, tuple) else (reducer.keep_ratio,) * len(sites)
    num_images, num_patches = x.shape[0], x.shape[1] - front
    index = np.tile(np.arange(num_patches), (num_images, 1))
    source = index.copy()
    for i, block in enumerate(model.blocks):
        x, qk = attend(block, x)
        if i in sites:
            counts = counts_at(index.shape[1], ratios[sites.index(i)])
            new = [
                slow_site(counts, *(np.asarray(a, np.float64) for a in (t, q, k)), front)
                for t, q, k in zip(x, qk.query, qk.key, strict=True)
            ]
            x = jnp.asarray(np.stack([tokens for tokens, _, _ in new]), jnp.float32)
            index = np.stack([index[b][left] for b, (_, left, _) in enumerate(new)])
            source = np.stack([[row[j] for j in source[b]] for b, (_, _, row) in enumerate(new)])
        x = feed_forward(block, x)
    return x, index, source


def slow_site(counts, x, query, key, front):
    scores = slow_class_attention(query, key, front)
    patches = x[front:]
    attentive, inattentive = slow_decouple(scores, counts.attentive)
    joined = np.arange(len(patches))
    for k, partner in enumerate(slow_match(patches[attentive], counts.pairs)):
        joined[attentive[k]] = attentive[partner]
    for k, centre in enumerate(slow_cluster(patches[inattentive], counts.clusters, 5)):
        joined[inattentive[k]] = inattentive[centre]
    merged, left, row = slow_merge(patches, scores, joined)
    return np.concatenate([x[:front], merged]), left, row


@pytest.mark.parametrize("variant", mostly_long(VARIANTS, short=(0,)))
def test_whole_against_loops(variant):
    model = model_of(**VARIANTS[variant])
    embedded = embed(model, images())
    x, aux = jax.jit(lambda x: model.reducer(model.blocks, x, model.tokens(3)))(embedded)
    slow_x, kept, source = slow_bat(model, embedded)
    assert x.shape[1] < embedded.shape[1]
    np.testing.assert_array_equal(aux["kept"], kept)
    np.testing.assert_array_equal(aux["source"], source)
    np.testing.assert_allclose(x, slow_x, atol=2e-4, rtol=2e-4)


def test_decouple_against_loops():
    scores = np.random.default_rng(0).integers(0, 6, (4, 20)).astype(np.float32)  # ties
    for order, s in zip(np.asarray(decouple(jnp.asarray(scores))), scores, strict=True):
        attentive, inattentive = slow_decouple(s, 7)
        np.testing.assert_array_equal(order, attentive + inattentive)


@pytest.mark.parametrize(
    ("num", "num_clusters", "neighbours"), [(30, 6, 5), (30, 30, 5), (4, 1, 5), (1, 1, 5), (9, 4, 1)]
)
def test_cluster_against_loops(num, num_clusters, neighbours):
    x = np.random.default_rng(num).normal(size=(5, num, 8)).astype(np.float32)
    centre = np.asarray(jax.jit(cluster, static_argnums=(1, 2))(x, num_clusters, neighbours))
    for c, tokens in zip(centre, x.astype(np.float64), strict=True):
        np.testing.assert_array_equal(c, slow_cluster(tokens, num_clusters, neighbours))
        assert len(set(c.tolist())) == num_clusters


def test_cluster_with_equal_and_with_far_tokens():
    found = jax.jit(cluster, static_argnums=(1, 2))
    equal = np.asarray(found(np.ones((1, 6, 4), np.float32), 3, 5))[0]
    np.testing.assert_array_equal(equal, [0, 1, 2, 0, 0, 0])  # centres belong to themselves, though all are as near
    far = 16 * np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    squares = np.sort(((far[:, None] - far[None]) ** 2).mean(-1), axis=1)[:, :5].mean(1)
    assert np.median(squares) > 110 and squares.max() < 700  # densities underflow in float32, not in the loops' float64
    centre = np.asarray(found(far[None], 5, 5))[0]
    np.testing.assert_array_equal(centre, slow_cluster(far.astype(np.float64), 5, 5))


@pytest.mark.parametrize(("num", "num_pairs"), [(24, 6), (25, 12), (24, 12), (1, 0), (2, 1), (3, 1)])
def test_match_against_loops(num, num_pairs):
    x = np.random.default_rng(num).normal(size=(5, num, 8)).astype(np.float32)
    joined = np.asarray(jax.jit(match, static_argnums=1)(x, num_pairs))
    for j, tokens in zip(joined, x.astype(np.float64), strict=True):
        np.testing.assert_array_equal(j, slow_match(tokens, num_pairs))
        assert (j != np.arange(num)).sum() == num_pairs


def test_merge_and_shares_against_loops():
    rng = np.random.default_rng(0)
    joined = np.array([[0, 2, 2, 2, 4, 0], [5, 1, 1, 3, 5, 5]])
    x, weights = rng.normal(size=(2, 6, 3)).astype(np.float32), rng.uniform(0.1, 1, (2, 6)).astype(np.float32)
    share = shares(jnp.asarray(weights), jnp.asarray(joined, jnp.int32))
    merged, left, row = merge(jnp.asarray(x), share, jnp.asarray(joined, jnp.int32), 3)
    for b in range(2):
        slow = slow_merge(x[b], weights[b], joined[b].tolist())
        np.testing.assert_allclose(merged[b], slow[0], atol=1e-6)
        np.testing.assert_array_equal(left[b], slow[1])
        np.testing.assert_array_equal(row[b], slow[2])
    np.testing.assert_array_equal(merged[0, 2], x[0, 4])  # on its own: to the bit


def test_source_names_the_row_and_lone_patches_pass_unchanged():
    x = jax.random.normal(jax.random.key(0), (2, 36, 8))
    scores = jax.random.uniform(jax.random.key(1), (2, 36))
    counts = counts_at(36, 0.5)
    assert counts == Counts(18, 4, 7)
    position = np.stack(np.divmod(np.arange(x.shape[1]), 4), axis=-1)[None].astype(np.float32).repeat(len(x), axis=0)
    merged, at, left, row = map(np.asarray, jax.jit(lambda *given: reduce(*given, counts))(x, position, scores))
    assert merged.shape == (2, 21, 8) and left.shape == (2, 21) and row.shape == (2, 36)
    for b in range(2):
        assert set(row[b].tolist()) == set(range(21)) and (np.diff(left[b]) > 0).all()
        np.testing.assert_array_equal(row[b][left[b]], np.arange(21))
        alone = [n for n in range(36) if (row[b] == row[b, n]).sum() == 1]
        assert alone
        for n in alone:
            np.testing.assert_array_equal(merged[b, row[b, n]], x[b, n])
            np.testing.assert_array_equal(at[b, row[b, n]], position[b, n])
        for m in range(21):  # a merged token lies between its members
            members = position[b][row[b] == m]
            assert (members.min(axis=0) - 1e-5 <= at[b, m]).all() and (at[b, m] <= members.max(axis=0) + 1e-5).all()


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FRONT, dict(sites=())], ids=str)
def test_keeping_everything_is_the_plain_model_bit_for_bit(options):
    own = {k: v for k, v in options.items() if k not in FRONT}
    plain = model_of("full", **{k: v for k, v in options.items() if k in FRONT})
    reduced = model_of(**({"keep_ratio": 1.0} | own | {k: v for k, v in options.items() if k in FRONT}))
    logits, aux = jax.jit(lambda x: reduced(x))(images())
    np.testing.assert_array_equal(logits, jax.jit(lambda x: plain(x))(images())[0])
    np.testing.assert_array_equal(aux["kept"], np.tile(np.arange(36), (3, 1)))
    np.testing.assert_array_equal(aux["source"], aux["kept"])


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_finite(dtype):
    graphdef, params = nnx.split(create_model(TINY, reducer="bat", dtype=dtype, keep_ratio=0.4))
    loss = lambda params: nnx.merge(graphdef, params)(images())[0].var()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(jax.tree.leaves(jax.tree.map(lambda g: bool(jnp.isfinite(g).all()), grads)))


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_strict_dtypes(variant, strict_dtypes):
    build = blueprint(TINY, reducer="bat", **{"keep_ratio": 0.5} | VARIANTS[variant])
    jax.eval_shape(lambda key, x: build(key)(x), jax.random.key(0), images())


def test_attention_that_underflows_makes_no_nan():
    x = jax.random.normal(jax.random.key(0), (1, 16, 4))
    scores = jnp.zeros((1, 16)).at[0, 3].set(1.0)
    merged = lambda x, scores: reduce(x, x[..., :2], scores, Counts(4, 2, 3))[0].sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(merged, (0, 1)))(x, scores)
    assert np.isfinite(value) and all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.long
def test_gradient_passes_through_tokens_and_weights_as_in_the_weighted_mean():
    x, w = jax.random.normal(jax.random.key(0), (1, 3, 2)), jnp.array([[0.2, 0.5, 0.3]])
    joined = jnp.array([[1, 1, 2]], jnp.int32)
    fast = lambda x, w: (merge(x, shares(w, joined), joined, 2)[0] ** 2).sum()  # noqa: E731
    mean = lambda x, w: (w[0, 0] * x[0, 0] + w[0, 1] * x[0, 1]) / (w[0, 0] + w[0, 1])  # noqa: E731
    slow = lambda x, w: (mean(x, w) ** 2).sum() + (x[0, 2] ** 2).sum()  # noqa: E731
    for a, b in zip(jax.grad(fast, (0, 1))(x, w), jax.grad(slow, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("keep_ratio", "gmac", "tokens"),  # authors' logs; tokens by the rule in docs
    mostly_long(
        [
            (0.7, 3.005, (138, 97, 68)),
            (0.6, 2.583, (116, 68, 39)),
            (0.5, 2.344, (101, 54, 30)),
            (0.4, 2.083, (82, 36, 18)),
            (0.3, 1.823, (60, 19, 7)),
            (0.2, 1.645, (41, 10, 3)),
        ],
        short=(0,),
    ),
)
def test_cost_is_that_of_the_authors_logs(keep_ratio, gmac, tokens):
    counted = whole_cost_of("deit_small_patch16_224", reducer="bat", keep_ratio=keep_ratio)
    assert counted.gmac == pytest.approx(gmac, rel=0.01)
    assert counted.tokens == tuple(1 + n for n in (196, *tokens) for _ in range(3))
    assert counted.parameters == 22_050_664


def test_counts():
    assert counts_at(196, 0.7) == Counts(138, 34, 34) and counts_at(196, 0.6) == Counts(118, 29, 27)
    assert counts_at(196, 1.0) == Counts(196, 0, 0) and counts_at(1, 0.5) == Counts(1, 0, 0)
    assert counts_at(2, 0.5) == Counts(1, 0, 1)  # no more clusters than inattentive tokens
    assert counts_at(5, 0.6) == Counts(3, 0, 1)  # one cluster at least
    assert counts_at(100, 0.55).attentive == 55  # 0.55 * 100 is a little more than 55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(keep_ratio=(0.5, 2.0)), "keep_ratio is 2.0"),
        (dict(sites=(3, 1)), r"sites is \(3, 1\)"),
        (dict(keep_rate=0.5), "takes keep_ratio, sites, num_kept; got keep_rate"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="bat", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sites=(4,)), r"sites is \(4,\); the model has blocks 0..3"),
        (dict(keep_ratio=(0.5, 0.5)), "keep_ratio has 2 entries for 3 sites"),
        (dict(class_token=False, pool="mean"), "this model has none"),
    ],
)
def test_misuse_seen_when_called(options, message):
    build = blueprint(TINY, reducer="bat", **options)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda key, x: build(key)(x), jax.random.key(0), images())
