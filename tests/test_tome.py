"""ToMe against a slow numpy version written from its description, its pure functions against loops, its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, embed, feed_forward, lively, mostly_long, numpy_images, numpy_model, whole_cost_of
from flax import nnx

from tif_jax.errors import InputError
from tif_jax.models import create_model
from tif_jax.models.params import params_of
from tif_jax.reducers.tome import Tome, destination, match, merge

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
EVERYTHING = dict(distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.3)
MEAN = dict(pool="mean", class_token=False)


@functools.cache
def model_of(**options):
    return numpy_model(TINY, reducer="tome", **options)


def images(num=3, size=(32, 32), seed=0):
    return numpy_images(num, size, seed)


def reference_match(metric, num_merged):
    """Of one image's metric (N, C): the (source, target) pairs merged, best first, as rows among all its tokens."""
    pairs = []
    for source in range(1, len(metric), 2):
        best = max(range(0, len(metric), 2), key=lambda t: (float(metric[source] @ metric[t]), -t))
        pairs.append((float(metric[source] @ metric[best]), source, best))
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    return [(source, target) for _, source, target in pairs[:num_merged]]


def reference_merge(patches, size, pairs):
    """Of one image: tokens and sizes after merging, and the members of every token, as rows before merging."""
    if not pairs:  # the order stays too
        return patches, size, [[i] for i in range(len(patches))]
    into = dict(pairs)
    patches, size = patches.astype(np.float64), size.astype(np.float64)
    members = [[i] for i in range(1, len(patches), 2) if i not in into]
    members += [[t, *sorted(s for s in into if into[s] == t)] for t in range(0, len(patches), 2)]
    merged = [sum(size[i] * patches[i] for i in m) / sum(size[i] for i in m) for m in members]
    return np.array(merged), np.array([sum(size[i] for i in m) for m in members]), members


def reference_encode(model, x, num_merged, proportional):
    """The whole walk, one image at a time; half-steps of the blocks are taken as given."""
    num_special = model.num_special
    outputs, sources = [], []
    for tokens in np.asarray(x):
        size, groups = np.ones(len(tokens) - num_special), [[i] for i in range(len(tokens) - num_special)]
        for block, wanted in zip(model.blocks, num_merged, strict=True):
            log_size = jnp.asarray(np.log(np.concatenate([np.ones(num_special), size]))[None], jnp.float32)
            y, qk = attend(block, jnp.asarray(tokens[None]), log_size if proportional else None)
            tokens, keys = np.asarray(y)[0], np.asarray(qk.key)[0, num_special:].mean(axis=1)
            keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
            pairs = reference_match(keys, min(wanted, len(size) // 2))
            patches, size, members = reference_merge(tokens[num_special:], size, pairs)
            groups = [[first for i in m for first in groups[i]] for m in members]
            tokens = np.concatenate([tokens[:num_special], patches]).astype(np.float32)
            tokens = np.asarray(feed_forward(block, jnp.asarray(tokens[None])))[0]
        outputs.append(tokens)
        sources.append([next(row for row, g in enumerate(groups) if i in g) for i in range(sum(map(len, groups)))])
    return np.array(outputs), np.array(sources)


def random_metric(num_images, num_patches, seed=0, channels=4):
    metric = np.random.default_rng(seed).normal(size=(num_images, num_patches, channels)).astype(np.float32)
    return metric / np.linalg.norm(metric, axis=-1, keepdims=True)


@pytest.mark.parametrize(("num_patches", "num_merged"), [(12, 1), (12, 4), (12, 6), (13, 6), (13, 2), (2, 1), (3, 1)])
def test_match(num_patches, num_merged):
    metric = random_metric(5, num_patches)
    pairs = jax.device_get(jax.jit(match, static_argnums=1)(metric, num_merged))
    for b in range(5):
        expected = reference_match(metric[b], num_merged)
        found = list(zip(pairs.merged[b].tolist(), (2 * pairs.target[b]).tolist(), strict=True))
        assert found == expected
        sources = {source for source, _ in expected}
        assert pairs.unmerged[b].tolist() == [i for i in range(1, num_patches, 2) if i not in sources]


def test_ties_go_to_the_lower_row():
    pairs = jax.jit(match, static_argnums=1)(np.ones((1, 9, 3), np.float32), 2)
    assert (
        pairs.merged.tolist() == [[1, 3]] and pairs.target.tolist() == [[0, 0]] and pairs.unmerged.tolist() == [[5, 7]]
    )


@pytest.mark.parametrize(("num_patches", "num_merged"), [(12, 4), (12, 6), (13, 6), (2, 1)])
def test_merge_and_destination(num_patches, num_merged):
    rng = np.random.default_rng(1)
    metric = random_metric(5, num_patches, channels=2)  # few directions: several sources share a target
    patches = rng.normal(size=(5, num_patches, 7)).astype(np.float32)
    size = rng.integers(1, 9, size=(5, num_patches)).astype(np.float32)

    @jax.jit
    def run(metric, patches, size):
        pairs = match(metric, num_merged)
        return pairs, *merge(patches, size, pairs), destination(pairs, num_patches)

    pairs, merged, sizes, rows = jax.device_get(run(metric, patches, size))
    for b in range(5):
        expected, sizes_expected, members = reference_merge(patches[b], size[b], reference_match(metric[b], num_merged))
        np.testing.assert_allclose(merged[b], expected, atol=1e-6)
        np.testing.assert_array_equal(sizes[b], sizes_expected)
        assert rows[b].tolist() == [next(r for r, m in enumerate(members) if i in m) for i in range(num_patches)]
        alone = [r for r, m in enumerate(members) if len(m) == 1]
        np.testing.assert_array_equal(merged[b][alone], expected[alone].astype(np.float32))  # bit for bit
    assert any(len(set(t)) < len(t) for t in np.asarray(pairs.target).tolist()) or num_patches == 2


def test_merging_in_bfloat16_rounds_once():
    patches = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12, 6)), jnp.bfloat16)
    pairs = jax.jit(match, static_argnums=1)(np.ones((2, 12, 3), np.float32), 6)  # everything into the first target
    size = jnp.asarray(np.random.default_rng(3).integers(1, 40, size=(2, 12)), jnp.float32)
    run = jax.jit(merge)
    merged, sizes = run(patches, size, pairs)
    exact = run(patches.astype(jnp.float32), size, pairs)[0]
    assert merged.dtype == jnp.bfloat16 and sizes.dtype == jnp.float32
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("num_merged", "proportional", "fields"),
    mostly_long(
        [
            (3, True, {}),
            (3, False, {}),
            ((0, 5, 100), True, {}),
            (2, True, EVERYTHING),
            (2, True, MEAN),
            (3, True, dict(MEAN, num_registers=3)),
        ],
        short=(5,),
    ),
)
def test_against_the_reference(num_merged, proportional, fields):
    model = model_of(num_merged=num_merged, proportional=proportional, **fields)
    x = embed(model, images())
    encoded, aux = jax.jit(model.encode)(x)
    per_block = num_merged if isinstance(num_merged, tuple) else (num_merged,) * 3
    expected, source = reference_encode(model, x, per_block, proportional)
    np.testing.assert_allclose(encoded, expected, atol=1e-5)
    assert sorted(aux) == ["size"] * proportional + ["source"] and aux["source"].dtype == jnp.int32
    np.testing.assert_array_equal(aux["source"], source)


@pytest.mark.long
def test_proportional_matters_only_after_the_first_merge():
    x = embed(model_of(), images())
    encoded = {p: model_of(num_merged=(0, 0, 4), proportional=p).encode(x)[0] for p in (True, False)}
    np.testing.assert_array_equal(encoded[True], encoded[False])
    encoded = {p: model_of(num_merged=(0, 4, 0), proportional=p).encode(x)[0] for p in (True, False)}
    assert np.abs(encoded[True] - encoded[False]).max() > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("fields", [{}, EVERYTHING, MEAN])
@pytest.mark.parametrize("num_merged", [0, (0, 0, 0)])
def test_nothing_merged_is_the_plain_model_bit_for_bit(num_merged, fields):
    plain = numpy_model(TINY, reducer="full", **fields)
    model = model_of(num_merged=num_merged, **fields)
    nnx.update(model, params_of(plain))
    logits, aux = jax.jit(lambda x: model(x))(images())
    np.testing.assert_array_equal(logits, jax.jit(lambda x: plain(x)[0])(images()))
    np.testing.assert_array_equal(aux["source"], np.tile(np.arange(16), (3, 1)))


@pytest.mark.long
def test_mean_pooling_is_the_plain_mean_over_the_tokens_left():
    model = model_of(num_merged=5, **MEAN)
    x, aux = model.encode(embed(model, images()))
    assert x.shape[1] == 16 - 5 - 5 - 3
    np.testing.assert_allclose(model.predict(x, aux)[0], model.head(model.norm(x.mean(axis=1))), atol=1e-6)


@pytest.mark.long
def test_special_tokens_never_merge():
    """Not even where class, distillation and register tokens look just like patches."""
    model = model_of(num_merged=6, **EVERYTHING)
    x = embed(model, images())
    x = x.at[:, :4].set(x[:, 4:8])
    encoded, aux = model.encode(x)
    np.testing.assert_array_equal(aux["source"], reference_encode(model, x, (6, 6, 6), True)[1])
    assert encoded.shape[1] == 4 + 16 - 6 - 5 - 2  # 16, 10, 5: half of 5 is 2


@pytest.mark.long
def test_half_of_the_patches_is_the_limit():
    model = model_of(num_merged=1000)
    x, aux = model.encode(embed(model, images()))
    assert x.shape[1] == 1 + 2  # 16, 8, 4, 2
    assert set(np.asarray(aux["source"]).ravel().tolist()) <= {0, 1}


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite(dtype):
    graphdef, params = nnx.split(model_of(num_merged=4, dtype=dtype))
    black = jnp.zeros((1, 32, 32, 3))  # equal patches: ties everywhere
    for x in (images(), black):
        grads = jax.jit(jax.grad(lambda params, x: nnx.merge(graphdef, params)(x)[0].var()))(params, x)
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(grads))
    grads = nnx.to_pure_dict(grads)
    assert float(jnp.abs(grads["block_0"]["attention"]["qkv"]["kernel"]).max()) > 0


def test_keys_of_length_zero():
    pairs = match(jnp.zeros((2, 8, 4)), 3)
    assert pairs.merged.tolist() == [[1, 3, 5]] * 2


@pytest.mark.parametrize(
    ("size", "num_merged", "published", "left"),
    mostly_long(
        [("tiny", 13, 0.731, 41), ("small", 13, 2.703, 41), ("base", 13, 10.37, 41), ("small", 16, 2.291, 11)],
        short=(1,),
    ),
)
def test_cost(size, num_merged, published, left):
    counted = whole_cost_of(f"deit_{size}_patch16_224", reducer="tome", num_merged=num_merged)
    # The figures leave the similarities out: 64 multiply-adds a pair.
    patches = [max(196 - num_merged * i, 0) for i in range(12)]
    similarities = sum(64 * (n // 2) * ((n + 1) // 2) for n in patches) / 1e9
    assert counted.gmac - similarities == pytest.approx(published, abs=0.002 if size != "base" else 0.005)
    assert similarities < 0.005 * published
    assert counted.tokens == (
        *(197 - num_merged * i for i in range(1, 12)),
        left,
    )  # r = 16: the last block merges 10 of 20


@pytest.mark.parametrize(
    ("schedule", "merged", "gmac"),
    mostly_long(
        [
            ("decreasing", (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0), 0.573),
            ("increasing", (0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26), 0.936),
        ]
    ),
)
def test_ramps_are_those_of_the_authors_code(schedule, merged, gmac):
    """What their parse_r(12, (13, -1 or 1)) gives: fractions are cut off, so that 151 tokens merge and not 156."""
    assert Tome(num_merged=13, schedule=schedule).per_block(12, 1000) == merged and sum(merged) == 151
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="tome", num_merged=13, schedule=schedule)
    assert counted.gmac == pytest.approx(gmac, abs=0.0005)
    assert counted.tokens == tuple(197 - sum(merged[: i + 1]) for i in range(12))


@pytest.mark.parametrize("depth", [1, 2, 12, 24, 39])
def test_a_ramp_for_every_number_and_depth(depth):
    def theirs(r, inflect):
        least = int(r * (1.0 - inflect))
        most = 2 * r - least
        return tuple(int(least + (most - least) / (depth - 1) * i) for i in range(depth)) if depth > 1 else (least,)

    for r in range(60):
        for schedule, inflect in (("constant", 0), ("decreasing", -1), ("increasing", 1)):
            assert Tome(r, schedule).per_block(depth, 10**6) == theirs(r, inflect)


@pytest.mark.parametrize("total", [0, 1, 7, 12, 18, 133, 169])
def test_a_fraction_is_spread_over_the_blocks(total):
    merged = Tome(total / 12).per_block(12, 1000)
    assert sum(merged) == total and max(merged) - min(merged) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(num_merged=8, schedule="falling"),
            "schedule is 'falling'; allowed: 'constant', 'decreasing', 'increasing'",
        ),
        (dict(num_merged=(3, 2, 1), schedule="decreasing"), "schedule 'decreasing' is for one number"),
        (dict(num_merged=float("inf")), "num_merged is inf"),
        (dict(num_merged=(3, 2.5, 3)), r"num_merged is \(3, 2.5, 3\)"),
        (dict(num_merged=-1), "num_merged is -1; it is the number of patch tokens merged per block"),
        (dict(num_merged=(3, -2, 3)), r"num_merged is \(3, -2, 3\)"),
        (dict(num_merged=True), "num_merged is True"),
        (dict(keep_ratio=0.5), "takes num_merged, schedule, proportional; got keep_ratio"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="tome", **options)


def test_one_number_for_each_block():
    with pytest.raises(InputError, match="num_merged has 2 entries for 3 blocks"):
        model_of(num_merged=(3, 3)).encode(jnp.zeros((1, 17, 32)))


def test_attention_pooling_is_proportional():
    """A merged token counts as the patches that it stands for: the sizes are the rows that `source` counts."""
    fields = dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, num_classes=5)
    model = lively(fields | dict(pool="attention", class_token=False), reducer="tome", num_merged=4)
    logits, aux = jax.jit(lambda x: model(x))(numpy_images(2))
    size = np.stack([np.bincount(row, minlength=8) for row in np.asarray(aux["source"])])
    np.testing.assert_array_equal(aux["size"], size)
    assert size.max() > 1
    x = jax.jit(lambda x: model.encode(model.embed(x))[0])(numpy_images(2))
    weighted = lambda weight: jax.jit(lambda x, w: model.predict(x, {}, w)[0])(x, jnp.asarray(weight, jnp.float32))  # noqa: E731
    np.testing.assert_allclose(logits, weighted(size), atol=1e-5)
    assert np.abs(weighted(np.ones_like(size)) - logits).max() > 1e-3
