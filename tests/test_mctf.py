"""MCTF against a slow numpy version, its pure functions against loops, its cost and numbers against those published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, embed, feed_forward, lively, mostly_long, numpy_images, numpy_model, whole_cost_of

from tif_jax import InputError, create_model
from tif_jax.reducers._fusion import destination, fuse, total
from tif_jax.reducers.mctf import Mctf, affinity, match

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean", qk_norm=True)
AUTHORS = (1.0, 20.0, 40.0)


def reference_affinity(x, matters, size, temperatures):
    """Of one image (N, D), for every pair of tokens."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    matters, size = (value.min() / value for value in (matters, size))
    criteria = (1 + unit @ unit.T) / 2, np.outer(matters, matters), np.outer(size, size)
    return np.prod([c ** (1 / t) for c, t in zip(criteria, temperatures, strict=True) if t], axis=0)


def reference_match(table, num_odd, num_even):
    """Of one image's table over all pairs: the members of every token left, itself first, in the order they come in."""
    odd, even = [*range(1, len(table), 2)], [*range(0, len(table), 2)]
    best = sorted(odd, key=lambda i: (-max(table[i, j] for j in even), i))
    groups = {i: [i] for i in range(len(table))}
    for i in best[:num_odd]:
        groups[max(even, key=lambda j: (table[i, j], -j))] += groups.pop(i)
    left = sorted(best[num_odd:])
    order = sorted(even, key=lambda j: (-max(table[i, j] for i in left), j)) if num_even else even
    for j in order[:num_even]:
        groups[max(left, key=lambda i: (table[i, j], -i))] += groups.pop(j)
    return [groups[i] for i in (*left, *order[num_even:])]


def reference_maps(qk, log_size):
    query, key = (np.asarray(part, np.float64)[0] for part in (qk.query, qk.key))
    exponential = np.exp(np.einsum("qhc,khc->hqk", query, key) / query.shape[-1] ** 0.5 + log_size)
    return exponential / exponential.sum(axis=-1, keepdims=True)


def reference_attention(block, x, maps):
    """x plus the values of its rows, mixed by the maps."""
    attention, normed = block.attention, block.attention_norm(jnp.asarray(x[None], jnp.float32))
    values = np.asarray(attention.qkv(normed), np.float64)[0, :, 2 * x.shape[-1] :].reshape(len(x), len(maps), -1)
    mixed = np.einsum("hqk,khc->qhc", maps, values).reshape(len(x), -1)
    return x + np.asarray(attention.out(jnp.asarray(mixed[None], jnp.float32)))[0]


def reference_encode(model, x, numbers, ahead=False, proportional=True):
    """The walk of one batch, image by image; half-steps of the blocks are taken as given."""
    first, outputs, sources = model.num_special, [], []
    for tokens in np.asarray(x, np.float64):
        size = np.ones(len(tokens) - first)
        patches_of = [[i] for i in range(len(size))]
        for block, number in zip(model.blocks, numbers, strict=True):
            log_size = np.log(np.concatenate([np.ones(first), size])) * proportional
            y, qk = attend(block, jnp.asarray(tokens[None], jnp.float32), jnp.asarray(log_size[None], jnp.float32))
            if not (ahead and number):
                tokens = np.asarray(feed_forward(block, y), np.float64)[0]
            if not number:
                continue
            maps = reference_maps(qk, log_size)
            weight = maps.mean(axis=(0, 1))[first:]
            table = reference_affinity(tokens[first:], weight, size, AUTHORS)
            members = reference_match(table, number // 2, number - number // 2)
            weight = np.concatenate([np.ones(first), weight * size])
            groups = [[i] for i in range(first)] + [[first + i for i in m] for m in members]
            mean = np.array([[weight[i] / weight[m].sum() * (i in m) for i in range(len(weight))] for m in groups])
            tokens, size = mean @ tokens, np.array([size[m].sum() for m in members])
            patches_of = [[patch for i in m for patch in patches_of[i]] for m in members]
            if ahead:
                tokens = reference_attention(block, tokens, mean @ maps @ (mean > 0).T)
                tokens = np.asarray(feed_forward(block, jnp.asarray(tokens[None], jnp.float32)), np.float64)[0]
        outputs.append(tokens)
        total = sum(map(len, patches_of))
        sources.append([next(row for row, own in enumerate(patches_of) if i in own) for i in range(total)])
    return np.array(outputs), np.array(sources)


def drawn(num_images, num_tokens, width=6, seed=0):
    """Tokens, how much they matter, and their sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_images, num_tokens, width)).astype(np.float32)
    matters = rng.uniform(0.01, 1, size=(num_images, num_tokens)).astype(np.float32)
    return x, matters, rng.integers(1, 9, size=(num_images, num_tokens)).astype(np.float32)


@pytest.mark.parametrize("temperatures", [AUTHORS, (0.5, 0.0, 3.0), (0.0, 2.0, 0.0)])
def test_affinity(temperatures):
    x, matters, size = drawn(3, 9)
    found = jax.jit(affinity, static_argnums=3)(x, matters, size, temperatures)
    for b in range(3):
        expected = reference_affinity(x[b], matters[b], size[b], temperatures)[1::2, ::2]
        np.testing.assert_allclose(found[b], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("num_tokens", "num_odd", "num_even"), [(12, 3, 3), (13, 2, 3), (12, 6, 0), (13, 0, 7), (9, 0, 1), (2, 0, 1)]
)
def test_match_and_fuse(num_tokens, num_odd, num_even):
    x, matters, size = drawn(4, num_tokens)
    table = np.stack([reference_affinity(*of_image, AUTHORS) for of_image in zip(x, matters, size, strict=True)])

    @jax.jit
    def run(pairs, x, weight, size):
        fusion = match(pairs, num_odd, num_even)
        return fuse(x, weight, fusion)[0], total(size, fusion), destination(fusion), fusion.left

    weight = matters * size
    fused, sizes, rows, left = map(np.asarray, run(jnp.asarray(table[:, 1::2, ::2]), x, weight, size))
    for b in range(4):
        members = reference_match(table[b], num_odd, num_even)
        assert left[b].tolist() == [m[0] for m in members]
        assert rows[b].tolist() == [next(r for r, m in enumerate(members) if i in m) for i in range(num_tokens)]
        np.testing.assert_allclose(sizes[b], [size[b, m].sum() for m in members])
        means = [np.average(x[b, m], axis=0, weights=weight[b, m]) for m in members]
        np.testing.assert_allclose(fused[b], means, atol=1e-5)
        alone = [r for r, m in enumerate(members) if len(m) == 1]
        np.testing.assert_array_equal(fused[b, alone], x[b, left[b, alone]])  # bit for bit


def test_ties_go_to_the_lower_row():
    fusion = jax.jit(match, static_argnums=(1, 2))(jnp.ones((1, 4, 5)), 1, 2)
    assert fusion.left.tolist() == [[3, 5, 7, 4, 6, 8]]
    assert fusion.gone.tolist() == [[1, 0, 2]] and fusion.into.tolist() == [[0, 0, 0]]  # 1 into 0, then 0 into 3


@pytest.mark.parametrize(
    ("options", "fields", "numbers"),
    mostly_long(
        [
            (dict(num_merged=3), BARE, (0, 3, 3, 0)),
            (dict(num_merged=(5, 0, 50, 7)), {}, (5, 0, 5, 0)),
            (dict(num_merged=3, proportional=False), {}, (0, 3, 3, 0)),
            (dict(keep_ratio=0.65, sites=(1, 2)), {}, (0, 5, 3, 0)),
            (dict(num_merged=3, one_step_ahead=True), {}, (0, 3, 3, 3)),
            (dict(num_merged=(7, 4, 0, 2), one_step_ahead=True), BARE, (0, 4, 0, 2)),
        ],
        short=(1, 4),
    ),
)
def test_against_the_reference(options, fields, numbers):
    model = lively(TINY | fields, reducer="mctf", **options)
    x = embed(model, numpy_images(3))
    encoded, aux = jax.jit(lambda x: model.encode(x))(x)
    proportional = options.get("proportional", True)
    expected, source = reference_encode(model, x, numbers, "one_step_ahead" in options, proportional)
    np.testing.assert_array_equal(aux["source"], source)
    np.testing.assert_allclose(encoded, expected, atol=1e-3 * np.abs(expected).max())
    assert ("size" in aux) == proportional
    if proportional:
        np.testing.assert_array_equal(aux["size"], [np.bincount(row) for row in source])


@pytest.mark.parametrize("removed", [0.05, 0.1, 0.3, 0.35, 0.5])
def test_ratios_leave_as_many_as_the_authors_code(removed):
    left, numbers = 196, Mctf(keep_ratio=1 - removed).per_block(12, 196)
    for i in (3, 6, 9):
        assert numbers[i] == int(left * removed)
        left -= numbers[i]
    assert sum(numbers) == 196 - left


def test_numbers_for_each_block():
    assert Mctf().per_block(12, 196) == (0, *[16] * 10, 0)
    assert Mctf(1.5).per_block(6, 16) == (0, 1, 2, 1, 2, 0)
    assert Mctf((9, 1, 0, 3)).per_block(4, 16) == (
        8,
        1,
        0,
        0,
    )  # half of them is the most; nothing behind the last block
    assert Mctf(keep_ratio=(0.5, 0.1), sites=(0, 1)).per_block(3, 13) == (6, 3, 0)
    assert Mctf((9, 1, 0, 3), one_step_ahead=True).per_block(4, 16) == (0, 1, 0, 3)  # nothing before the first


def test_cost():
    """The blocks, and 192 multiply-adds for every pair that is compared."""
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="mctf", num_merged=16)
    lengths = [197, 197, *(197 - 16 * i for i in range(1, 11))]
    assert counted.tokens == tuple(lengths)
    pairs = sum(192 * ((t - 1) // 2) * (t // 2) for t in lengths[1:-1])
    assert counted.gmac == pytest.approx(of_blocks(lengths, lengths, pairs), rel=1e-9)
    assert counted.gmac == pytest.approx(0.778, abs=0.0005)  # of the authors' code, measured


@pytest.mark.parametrize(("keep_ratio", "theirs"), mostly_long([(0.7, 0.799), (0.65, 0.745), (0.5, 0.605)], short=(1,)))
def test_cost_one_step_ahead(keep_ratio, theirs):
    """Queries, keys and logits are of all tokens, everything else of those left."""
    options = dict(keep_ratio=keep_ratio, one_step_ahead=True)
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="mctf", **options)
    lengths = (197, *counted.tokens)
    pairs = sum(192 * ((t - 1) // 2) * (t // 2) for t, left in zip(lengths, counted.tokens, strict=False) if left < t)
    assert counted.gmac == pytest.approx(of_blocks(lengths[:-1], counted.tokens, pairs), rel=1e-9)
    assert counted.gmac == pytest.approx(theirs, abs=0.0005)  # of the authors' code, measured


def of_blocks(entering, left, pairs):
    """GMAC of a DeiT-Ti whose blocks compare the tokens that enter and mix those that are left."""
    compared = sum(2 * 192**2 * t + 192 * t**2 for t in entering)
    others = sum(10 * 192**2 * t + 192 * t**2 for t in left)
    return (compared + others + pairs + 196 * 768 * 192 + 192_000) / 1e9


@pytest.mark.parametrize("dtype", mostly_long(["float32", "bfloat16"], short=(1,)))
def test_equal_patches_have_finite_gradients(dtype):
    model = numpy_model(TINY, reducer="mctf", num_merged=4, dtype=dtype)
    loss = jax.jit(jax.grad(lambda x: model(x)[0].astype(jnp.float32).var()))
    assert np.isfinite(np.asarray(loss(jnp.zeros((1, 32, 32, 3))), np.float32)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_merged=-1), "num_merged is -1; it is the number of patch tokens merged per block"),
        (dict(keep_ratio=1.5), "keep_ratio is 1.5"),
        (dict(keep_ratio=0.5, num_merged=8), "keep_ratio is 0.5 and num_merged 8; give one of them"),
        (dict(sites=(1,)), r"sites is \(1,\); give keep_ratio with it"),
        (dict(temperatures=(1.0, 20.0)), "it is three numbers from 0"),
        (dict(temperatures=(1.0, -1.0, 0.0)), "it is three numbers from 0"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="mctf", **options)
