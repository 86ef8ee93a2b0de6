"""ATC: clusters against loops over the definition of each linkage, the walk against numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images

from tif_jax import InputError, create_model
from tif_jax.reducers.atc import cluster

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean")
OF_PAIRS = {"average": np.mean, "complete": np.max, "single": np.min}


def reference_clusters(distance, num_clusters, linkage):
    """Of one image: the clusters as lists, the one with the lowest token first. Distances are those of the definition."""
    clusters = [[i] for i in range(len(distance))]
    while len(clusters) > num_clusters:
        apart = {
            (a, b): OF_PAIRS[linkage]([distance[i, j] for i in clusters[a] for j in clusters[b]])
            for a, b in itertools.combinations(range(len(clusters)), 2)
        }
        a, b = min(apart, key=lambda pair: (apart[pair], pair))
        clusters[a] += clusters.pop(b)
    return clusters


def distances(num_images, num_tokens, channels=5):
    unit = np.random.default_rng(num_tokens).normal(size=(num_images, num_tokens, channels))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    return 1 - np.einsum("bnc,bmc->bnm", unit, unit)


@pytest.mark.parametrize("linkage", OF_PAIRS)
@pytest.mark.parametrize(("num_tokens", "num_clusters"), [(12, 5), (13, 1), (4, 4)])
def test_cluster(linkage, num_tokens, num_clusters):
    distance = distances(4, num_tokens)
    joined = np.asarray(jax.jit(cluster, static_argnums=(1, 2))(jnp.float32(distance), num_clusters, linkage))
    for b in range(4):
        clusters = reference_clusters(distance[b], num_clusters, linkage)
        expected = {i: members[0] for members in map(sorted, clusters) for i in members}
        assert joined[b].tolist() == [expected[i] for i in range(num_tokens)]


def test_ties_go_to_the_lower_tokens():
    distance = jnp.ones((1, 5, 5)) - jnp.eye(5)[None]
    assert cluster(distance, 4).tolist() == [[0, 0, 2, 3, 4]]
    assert cluster(distance.at[0, 0].set(2).at[0, :, 0].set(2), 3, "complete").tolist() == [[0, 1, 1, 1, 4]]


def reference_encode(model, x, counts, linkage, proportional):
    """The walk, image by image; half-steps of the blocks are taken as given. Tokens come out in the order of their first."""
    first, outputs, sources = model.num_special, [], []
    for tokens in np.asarray(x, np.float64):
        size = np.ones(len(tokens) - first)
        patches_of = [[i] for i in range(len(size))]
        for block, number in zip(model.blocks, counts, strict=True):
            log_size = np.log(np.concatenate([np.ones(first), size])) * proportional
            y, qk = attend(block, jnp.asarray(tokens[None], jnp.float32), jnp.asarray(log_size[None], jnp.float32))
            tokens = np.asarray(y, np.float64)[0]
            if number < len(size):
                key = np.asarray(qk.key, np.float64)[0, first:].mean(axis=1)
                key /= np.linalg.norm(key, axis=1, keepdims=True)
                clusters = sorted(map(sorted, reference_clusters(1 - key @ key.T, number, linkage)))
                means = [np.average(tokens[first:][m], axis=0, weights=size[m]) for m in clusters]
                tokens, size = np.concatenate([tokens[:first], means]), np.array([size[m].sum() for m in clusters])
                patches_of = [[patch for i in m for patch in patches_of[i]] for m in clusters]
            tokens = np.asarray(feed_forward(block, jnp.asarray(tokens[None], jnp.float32)), np.float64)[0]
        outputs.append(tokens)
        sources.append([next(row for row, own in enumerate(patches_of) if i in own) for i in range(16)])
    return np.array(outputs), np.array(sources)


@pytest.mark.parametrize(
    ("options", "fields", "counts"),
    mostly_long(
        [
            (dict(keep_ratio=0.6, sites=(0, 2), linkage="complete"), BARE, (9, 9, 5)),
            (dict(num_kept=(16, 7, 4)), {}, (16, 7, 4)),
            (dict(keep_ratio=0.5, proportional=False), {}, (8, 4, 2)),
        ]
    ),
)
def test_equals_the_reference(options, fields, counts):
    model = lively(TINY | fields, reducer="atc", **options)
    x = embed(model, numpy_images(3))
    encoded, aux = jax.jit(lambda x: model.encode(x))(x)
    proportional = options.get("proportional", True)
    expected, source = reference_encode(model, x, counts, options.get("linkage", "average"), proportional)
    np.testing.assert_array_equal(aux["source"], source)
    np.testing.assert_allclose(encoded, expected, atol=1e-3 * np.abs(expected).max())
    if proportional:
        np.testing.assert_allclose(aux["size"], [np.bincount(row) for row in source], rtol=1e-6)
    assert ("size" in aux) == proportional


def test_cost_and_tokens_of_deit():
    """Ratios are of the tokens that arrive; a product that is an integer but for rounding is that integer."""
    counted = cost_of("deit_tiny_patch16_224", reducer="atc", keep_ratio=0.5)
    assert counted.tokens == (197,) * 3 + (99,) * 3 + (50,) * 3 + (25,) * 3
    assert cost_of(TINY, reducer="atc", keep_ratio=(0.75, 1 / 3, 1.0)).tokens == (13, 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(linkage="ward"), "linkage is 'ward'; allowed: 'average'"), (dict(keep_ratio=0.0), "keep_ratio is 0.0")],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="atc", **options)
