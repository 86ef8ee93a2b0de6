"""ToFu against a slow numpy version: ToMe's pairs, dropped in some blocks, of the longest length in the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images

from tif_jax.errors import InputError
from tif_jax.reducers.tofu import Tofu, fusion_of, mlerp

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)


@functools.cache
def model_of(**options):
    return lively(TINY, reducer="tofu", **options)


def reference_pairs(keys, number):
    """Of one image's keys (N, C): the sources that leave, odd rows, with the even row that each is most like."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    best = {
        s: max(range(0, len(keys), 2), key=lambda t: (float(unit[s] @ unit[t]), -t)) for s in range(1, len(keys), 2)
    }
    order = sorted(best, key=lambda s: (-float(unit[s] @ unit[best[s]]), s))
    return {s: best[s] for s in order[:number]}


def reference_step(patches, groups, pairs, merging):
    rows = [s for s in range(1, len(patches), 2) if s not in pairs] + list(range(0, len(patches), 2))
    members = [[row, *(s for s in pairs if pairs[s] == row and merging)] for row in rows]
    if not pairs:
        return patches, groups
    left = []
    for inside in members:
        mean = np.mean([patches[i] for i in inside], axis=0)
        longest = max(np.linalg.norm(patches[i]) for i in inside)
        left.append(mean / np.linalg.norm(mean) * longest)
    return np.array(left), [[patch for i in inside for patch in groups[i]] for inside in members]


def reference_encode(model, x, per_block, merging):
    """The walk, one image at a time; half-steps of the blocks are taken as given. Rows and sources."""
    outputs, sources = [], []
    for tokens in np.asarray(x):
        groups = [[i] for i in range(16)]
        for i, (block, number) in enumerate(zip(model.blocks, per_block, strict=True)):
            y, qk = attend(block, jnp.asarray(tokens[None]))
            tokens, keys = np.asarray(y)[0], np.asarray(qk.key)[0, 1:].mean(axis=1).astype(np.float64)
            pairs = reference_pairs(keys, min(number, len(keys) // 2))
            patches, groups = reference_step(tokens[1:].astype(np.float64), groups, pairs, i in merging)
            tokens = np.concatenate([tokens[:1], patches]).astype(np.float32)
            tokens = np.asarray(feed_forward(block, jnp.asarray(tokens[None])))[0]
        outputs.append(tokens)
        sources.append([next((row for row, g in enumerate(groups) if i in g), -1) for i in range(16)])
    return np.array(outputs), np.array(sources)


@pytest.mark.parametrize(
    ("num_merged", "merging"), mostly_long([((3, 2, 4), None), ((3, 0, 100), (0, 2)), ((4, 4, 2), ())], short=(0, 1))
)
def test_against_the_reference(num_merged, merging):
    model = model_of(num_merged=num_merged, merging=merging)
    x = embed(model, numpy_images(3))
    encoded, aux = jax.jit(model.encode)(x)
    expected, source = reference_encode(model, x, num_merged, (2,) if merging is None else merging)
    np.testing.assert_allclose(encoded, expected, atol=1e-4 * np.abs(expected).max())
    assert [*aux] == ["source"]
    np.testing.assert_array_equal(aux["source"], source)


def test_tokens_that_nothing_merges_into_stay_bit_for_bit():
    patches = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 5)), jnp.float32)
    left = jax.jit(lambda x: mlerp(x, fusion_of(x, 2, True)))(patches)
    alone = [sum((row == patch).all() for row in left[b] for patch in patches[b]) for b in range(2)]
    assert left.shape == (2, 7, 5) and all(5 <= number <= 6 for number in alone)


def test_the_later_half_merges():
    """Blocks beyond the middle, as in both public versions: 7 to 11 of 12."""
    default = cost_of("deit_tiny_patch16_224", reducer="tofu")
    assert default.tokens == tuple(197 - 13 * i for i in range(1, 13))
    x = embed(model_of(), numpy_images(1))
    for merging in ((2,), (1, 2)):
        models = model_of(num_merged=(0, 3, 3), merging=merging), model_of(num_merged=(0, 3, 3))
        found, of_default = (jax.jit(lambda x, model=model: model.encode(x)[0])(x) for model in models)
        assert np.array_equal(found, of_default) == (merging == (2,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tofu(num_merged=-1), "num_merged is -1; it is the number of patch tokens dropped or merged per block"),
        (lambda: Tofu(merging=(-1,)), "merging is \\(-1,\\); it lists block indices"),
        (lambda: cost_of(TINY, reducer="tofu", merging=(3,)), "merging names block 3; the model has blocks 0..2"),
        (lambda: cost_of(TINY, reducer="tofu", num_merged=(1, 2)), "num_merged has 2 entries for 3 blocks"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(InputError, match=message):
        make()
