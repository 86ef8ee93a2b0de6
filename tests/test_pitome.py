"""PiToMe against a slow numpy version, its matching against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images

from tif_jax.errors import InputError
from tif_jax.reducers.pitome import Pitome, energy, match

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
EVERYTHING = dict(distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.3)


@functools.cache
def model_of(**options):
    return lively(TINY, reducer="pitome", **options)


def reference_pairs(unit, number, margin, protecting):
    """Of one image's unit keys (N, C): (source, target) of each pair that merges."""
    similarity = unit @ unit.T
    energies = [np.mean([s - margin if s > margin else np.exp(s - margin) - 1 for s in row]) for row in similarity]
    order = sorted(range(len(unit)), key=lambda i: (-energies[i], i))
    order = order[: 2 * number] if protecting else order
    sources, targets = order[::2], sorted(order[1::2])
    best = {s: max(targets, key=lambda t: (similarity[s, t], -t)) for s in sources}
    return {s: best[s] for s in sorted(sources, key=lambda s: (-similarity[s, best[s]], s))[:number]}


def reference_encode(model, x, num_kept, margin, proportional):
    """The walk, one image at a time; half-steps of the blocks are taken as given. Rows, sources, sizes."""
    num_special, depth, outputs, sources, sizes = model.num_special, len(model.blocks), [], [], []
    for tokens in np.asarray(x):
        size, groups = np.ones(16), [[i] for i in range(16)]
        for i, (block, kept) in enumerate(zip(model.blocks, num_kept, strict=True)):
            seen = np.concatenate([np.ones(num_special), size]) if proportional else np.ones(len(tokens))
            y, qk = attend(block, jnp.asarray(tokens[None]), jnp.asarray(np.log(seen)[None], jnp.float32))
            tokens, keys = np.asarray(y)[0].astype(np.float64), np.asarray(qk.key)[0, num_special:].mean(axis=1)
            unit = keys.astype(np.float64) / np.linalg.norm(keys, axis=-1, keepdims=True)
            number = min(len(size) - kept, len(size) // 2)
            pairs = reference_pairs(unit, number, margin * (1 - i / depth), i >= depth / 2)
            patches, left = tokens[num_special:], [row for row in range(len(size)) if row not in pairs]
            members = [[row, *(s for s in pairs if pairs[s] == row)] for row in left]
            patches = np.array([np.average(patches[inside], axis=0, weights=size[inside]) for inside in members])
            size = np.array([size[inside].sum() for inside in members])
            groups = [[patch for j in inside for patch in groups[j]] for inside in members]
            tokens = np.concatenate([tokens[:num_special], patches]).astype(np.float32)
            tokens = np.asarray(feed_forward(block, jnp.asarray(tokens[None])))[0]
        outputs.append(tokens)
        sources.append([next(row for row, g in enumerate(groups) if i in g) for i in range(16)])
        sizes.append(size)
    return np.array(outputs), np.array(sources), np.array(sizes)


@pytest.mark.parametrize(
    ("num_kept", "margin", "proportional", "fields"),
    mostly_long(
        [
            ((12, 9, 6), 0.75, True, {}),
            ((13, 13, 1), 0.3, False, {}),  # of 13 half is 6: 7 are left
            ((11, 9, 6), 0.75, True, EVERYTHING),
        ]
    ),
)
def test_against_the_reference(num_kept, margin, proportional, fields):
    model = model_of(num_kept=num_kept, margin=margin, proportional=proportional, **fields)
    x = embed(model, numpy_images(3))
    encoded, aux = jax.jit(model.encode)(x)
    expected, source, size = reference_encode(model, x, num_kept, margin, proportional)
    np.testing.assert_allclose(encoded, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(aux["source"], source)
    assert sorted(aux) == ["size"] * proportional + ["source"]
    if proportional:
        np.testing.assert_array_equal(aux["size"], size)


@pytest.mark.parametrize("protecting", [True, False])
@pytest.mark.parametrize(("num", "number"), [(12, 1), (12, 6), (13, 6), (13, 3), (3, 1)])
def test_match(num, number, protecting):
    keys = np.random.default_rng(num).normal(size=(4, num, 3)).astype(np.float32)
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    gone, target = jax.device_get(jax.jit(match, static_argnums=(1, 2, 3))(unit, number, 0.5, protecting))
    for b in range(4):
        found = dict(zip(gone[b].tolist(), target[b].tolist(), strict=True))
        assert found == reference_pairs(unit[b].astype(np.float64), number, 0.5, protecting)


def test_many_alike_merge_and_one_alone_is_protected():
    unit = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 0, 2, 0, 0]][None]
    gone, target = match(jnp.asarray(unit), 3, 0.5, True)
    assert not {3, 5} & {*gone.ravel().tolist(), *target.ravel().tolist()}
    assert gone.tolist() == [[0, 2, 6]] and target.tolist() == [[1, 1, 1]]  # ties: the lower row
    likeness = jnp.einsum("bnc,bmc->bnm", unit, unit)
    found = energy(likeness, 0.5)[0]
    outside = np.expm1(-0.5)
    np.testing.assert_allclose(found[0], (6 * 0.5 + 2 * outside) / 8, rtol=1e-6)
    np.testing.assert_allclose(found[3], (0.5 + 7 * outside) / 8, rtol=1e-6)


def test_every_block_is_a_site():
    """ceil(.925 of 196) is 182; the same rule on."""
    patches = [196]
    while len(patches) < 13:
        patches.append(int(np.ceil(0.925 * patches[-1])))
    assert cost_of("deit_tiny_patch16_224", reducer="pitome").tokens == tuple(number + 1 for number in patches[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pitome(margin=1.5), "margin is 1.5; it is a cosine"),
        (lambda: Pitome(keep_ratio=0.0), "keep_ratio is 0.0"),
        (lambda: cost_of(TINY, reducer="pitome", keep_ratio=(0.5, 0.5)), "keep_ratio has 2 entries for 3 sites"),
        (lambda: cost_of(TINY, reducer="pitome", num_kept=(9, 8)), "num_kept has 2 entries for 3 sites"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(InputError, match=message):
        make()
