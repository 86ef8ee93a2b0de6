"""Expediting: clusters after some blocks, every patch again behind the last, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_dense as reference
from cases import Seen, cost_of, embed, lively, mostly_long, numpy_images, numpy_model, whole_cost_of
from flax import nnx

from tif_jax import InputError, create_model
from tif_jax.reducers.expediting import cells, columns_of, nearest, soft_kmeans
from tif_jax.tokens import mixed, raster_tokens, split

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean", image_size=(48, 24))
DISTILLED = dict(distillation_token=True, num_registers=1, image_size=(24, 40))


def tokens_at(places, width=6, scale=1.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(len(places), width))


def clustered(x, places, grid, columns, inverse_temperature):
    """`soft_kmeans` of one image."""

    @jax.jit
    def call(x, position):
        return soft_kmeans(x, position, cells(position, grid, columns), inverse_temperature)

    return [np.asarray(array)[0] for array in call(jnp.float32(x)[None], jnp.float32(places)[None])]


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (6, 3), (3, 7), (1, 5), (9, 1)])
def test_any_number_of_clusters_fits_into_the_raster(grid):
    for number in range(1, grid[0] * grid[1] + 1):
        columns = columns_of(grid, number)
        assert sum(columns) == number and max(columns) - min(columns) <= 1
        assert 1 <= min(columns) and max(columns) <= grid[1] and len(columns) <= grid[0]
    assert columns_of(grid, grid[0] * grid[1]) == (grid[1],) * grid[0]


def test_cells_are_about_as_high_as_wide():
    assert columns_of((14, 14), 49) == (7,) * 7
    assert columns_of((24, 12), 72) == (6,) * 12
    assert columns_of((14, 14), 45) == (6, 6, 7, 6, 7, 6, 7)


@pytest.mark.parametrize(("grid", "columns"), [((14, 14), (8, 8, 9, 8)), ((6, 9), (4,) * 3), ((5, 3), (2, 3, 3, 3, 2))])
def test_cells_against_loops(grid, columns):
    places = [*np.ndindex(*grid)]
    found = jax.jit(cells, static_argnums=(1, 2))(jnp.float32(places)[None], grid, columns)
    for m, (members, *cell) in enumerate(reference.cells_of(grid, columns)):
        assert found.inside[0, :, m].tolist() == [place in members for place in places]
        assert found.near[0, :, m].tolist() == [reference.sees(place, grid, len(columns), *cell) for place in places]
    assert np.asarray(found.inside).any(axis=1).all()  # no cell of a complete raster is empty


@pytest.mark.parametrize(
    ("grid", "columns", "scale"), [((6, 8), (4, 5, 4), 1.0), ((12, 4), (3,) * 8, 0.3), ((3, 3), (1,), 1.0)]
)
def test_soft_kmeans_against_loops(grid, columns, scale):
    places = [*np.ndindex(*grid)]
    x = tokens_at(places, scale=scale)
    expected = reference.soft_kmeans(x, places, grid, columns, 0.4)
    for found, want in zip(clustered(x, places, grid, columns, 0.4), expected, strict=True):
        np.testing.assert_allclose(found, want, atol=2e-5)


def test_soft_kmeans_of_some_patches_of_a_raster():
    """Cells may be empty, and so may whole windows: such clusters begin as a mean of others, or stay the mean of all."""
    grid, columns = (6, 24), (12,) * 3
    places = [(y, x) for y, x in np.ndindex(*grid) if x < 5 and (y, x) != (1, 1)]
    x = tokens_at(places)
    clusters, at = clustered(x, places, grid, columns, 0.4)
    expected, where = reference.soft_kmeans(x, places, grid, columns, 0.4)
    np.testing.assert_allclose(clusters, expected, atol=2e-5)
    np.testing.assert_allclose(at, where, atol=2e-5)
    np.testing.assert_allclose(clusters[11], x.mean(axis=0), atol=1e-5)  # no patch there knows of it
    assert np.abs(clusters[2] - clusters[11]).max() > 0.1


def test_no_gradient_passes_through_the_assignment():
    """Clusters are then linear in the tokens: the derivative along these is the clusters themselves."""
    places = [*np.ndindex(4, 4)]
    x, position = jnp.float32(tokens_at(places))[None], jnp.float32(places)[None]
    where = cells(position, (4, 4), (2, 2))
    along = jax.jit(lambda x: jax.jvp(lambda x: soft_kmeans(x, position, where, 0.4)[0], (x,), (x,)))
    clusters, derivative = along(x)
    np.testing.assert_allclose(derivative, clusters, atol=1e-5)


@pytest.mark.parametrize("number", [1, 3, 20])
def test_reconstruction_against_loops(number):
    rng = np.random.default_rng(1)
    x, clusters, final = (rng.normal(size=(rows, 6)) for rows in (10, 7, 7))

    @jax.jit
    def call(x, clusters, final):
        return mixed(final, nearest(x, clusters, 0.3, number))

    found = call(*(jnp.float32(array)[None] for array in (x, clusters, final)))[0]
    np.testing.assert_allclose(found, reference.reconstruct(x, clusters, final, 0.3, number), atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "options", "site", "columns", "number"),
    mostly_long(
        [
            ({}, dict(keep_ratio=0.7, num_neighbors=4), 1, (3, 4, 4), 4),
            (BARE, dict(clusters=(3, 2), site=2), 2, (2, 2, 2), 20),
            (DISTILLED, dict(keep_ratio=0.4, site=0, inverse_temperature=0.02), 0, (3, 3), 20),
        ],
        short=(0, 1),
    ),
)
def test_equals_the_reference(variant, options, site, columns, number):
    model = lively(TINY | variant, reducer="expediting", **options)
    x = embed(model, numpy_images(2, model.image_size))
    walk = jax.jit(lambda model, x: model.encode(x))
    found, aux = walk(model, x)
    assert found.shape == x.shape and (np.asarray(aux["source"]) == np.arange(x.shape[1] - model.num_special)).all()
    temperature = options.get("inverse_temperature", 0.5)
    for image, want in zip(found, x, strict=True):
        expected = reference.expediting(model, want, site, columns, temperature, number)
        np.testing.assert_allclose(image, expected, atol=2e-3 * np.abs(expected).max())


def test_tokens_say_of_what_clusters_every_patch_is_a_mixture():
    model = numpy_model(TINY, reducer="expediting", clusters=(2, 3), inverse_temperature=20.0, num_neighbors=3)

    @jax.jit
    def walk(x):
        seen = []
        model.reducer([Seen(block, seen) for block in model.blocks], x, model.tokens(2))
        return seen

    before, entering, last = walk(embed(model, numpy_images(2)))
    assert before[1].spread is None and before[0].shape[1] == 17
    for b in range(2):
        places, patches = [*np.ndindex(4, 4)], np.asarray(model.blocks[0](*before)[0], np.float64)[b, 1:]
        clusters, at = reference.soft_kmeans(patches, places, (4, 4), (3, 3), 20.0)
        np.testing.assert_allclose(entering[0][b, 1:], clusters, atol=1e-4)
        np.testing.assert_allclose(entering[1].position[b], at, atol=1e-3)
        for x, tokens in (entering, last):
            found = mixed(split(x, 1)[1], tokens.spread)[b]
            expected = reference.reconstruct(patches, clusters, np.asarray(x, np.float64)[b, 1:], 20.0, 3)
            np.testing.assert_allclose(found, expected, atol=1e-3)
            distance = ((patches[:, None] - clusters) ** 2).sum(axis=-1)
            np.testing.assert_array_equal(tokens.source[b], distance.argmin(axis=1))


def test_after_a_filter():
    """The clusters are those of the patches left, and no patch is put together that was dropped."""
    then = dict(name="expediting", keep_ratio=0.5, site=1)
    model = numpy_model(TINY, reducer="tif", keep_ratio=0.5, then=then)

    @jax.jit
    def walk(x):
        seen = []
        return model.reducer([Seen(block, seen) for block in model.blocks], x, model.tokens(4)), seen

    (x, aux), seen = walk(embed(model, numpy_images(4)))
    assert x.shape == (4, 9, 32) and [entering.shape[1] for entering, _ in seen] == [9, 5, 5]
    alive = np.asarray(aux["source"]) >= 0
    assert (alive.sum(axis=1) == 8).all() and (np.sort(aux["source"], axis=1)[:, 8:] == np.arange(8)).all()
    spread = seen[1][1].spread
    np.testing.assert_allclose(np.asarray(spread.weight).sum(axis=2), 1, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(seen[1][1].source) >= 0, alive)
    np.testing.assert_array_equal(np.where(alive, spread.rows[..., 0], -1), seen[1][1].source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_tokens_and_equal_tokens(dtype):
    """Weights underflow to one cluster; equal tokens make equal clusters, of which each is the token."""
    tokens = raster_tokens(1, 0, (4, 4), has_class=False)
    where = cells(tokens.position, (4, 4), (2, 2))
    for patches in (1e4 * numpy_images(1, (4, 4)), jnp.full((1, 4, 4, 3), 7.0)):
        patches = patches.reshape(1, 16, 3).astype(dtype)
        clusters, at = soft_kmeans(patches, tokens.position, where, 1.0)
        rebuilt = mixed(clusters, nearest(patches, clusters, 1.0, 20))
        assert clusters.dtype == rebuilt.dtype == patches.dtype
        assert np.isfinite(np.asarray(rebuilt, np.float32)).all() and np.isfinite(at).all()
    np.testing.assert_array_equal(rebuilt, patches)


def test_gradients_reach_what_clusters_are_made_of():
    """Also through the weights of the reconstruction; none is lost where top-k cuts."""
    graphdef, params = nnx.split(numpy_model(TINY | BARE, reducer="expediting", keep_ratio=0.5, num_neighbors=3))
    loss = lambda params: nnx.merge(graphdef, params)(numpy_images(2, (48, 24)))[0].var()  # noqa: E731
    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.abs(grads[f"block_{i}"]["mlp"]["up"]["kernel"]).max() > 0 for i in range(3))


def test_cost_and_tokens_of_deit():
    """Block by block, and 11 products of N x M x D: one for the first means, two per iteration.

    Two more put patches together behind the last block, for who reads them.
    """
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="expediting", clusters=(7, 7))
    assert counted.tokens == (197,) * 4 + (50,) * 8
    block = lambda tokens: 12 * tokens * 192**2 + 2 * tokens**2 * 192  # noqa: E731
    plain = 196 * 768 * 192 + 192 * 1000 + 4 * block(197) + 8 * block(50)
    assert abs(counted.gmac - (plain + 11 * 196 * 49 * 192) / 1e9) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(site=-1), "site is -1; it is how many blocks"),
        (dict(clusters=(3,)), r"clusters is \(3,\); it is two numbers"),
        (dict(clusters=(0, 3)), r"clusters is \(0, 3\); it is two numbers"),
        (dict(inverse_temperature=0.0), "inverse_temperature is 0.0"),
        (dict(inverse_temperature=float("nan")), "inverse_temperature is nan"),
        (dict(num_neighbors=0), "num_neighbors is 0"),
        (dict(budget=0.001, clusters=(2, 2)), "budget and clusters are given"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="expediting", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(site=3), "site is 3; it leaves none of 3 blocks"), (dict(clusters=(5, 2)), "of 4 x 4 patches come at most")],
)
def test_what_does_not_fit_the_model(options, message):
    with pytest.raises(InputError, match=message):
        cost_of(TINY, reducer="expediting", **options)
