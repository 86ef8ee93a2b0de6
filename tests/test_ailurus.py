"""AiluRus: anchors by density among the tokens around, all others merged into them and unfolded, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_dense as reference
from cases import Seen, cost_of, embed, lively, mostly_long, numpy_images, numpy_model

from tif_jax import InputError, create_model
from tif_jax.reducers._density_peaks import cluster
from tif_jax.reducers.ailurus import within
from tif_jax.tokens import raster_tokens

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean", image_size=(48, 24))
DISTILLED = dict(distillation_token=True, num_registers=1, image_size=(24, 40))


def anchors_of(x, places, num_anchors, num_neighbors, window):
    """For each token of one image the token that it merges into."""

    @jax.jit
    def call(x, position):
        return cluster(x, num_anchors, num_neighbors, within(position, window))

    return np.asarray(call(jnp.float32(x)[None], jnp.float32(places)[None]))[0]


@pytest.mark.parametrize(
    ("grid", "num_anchors", "num_neighbors", "window"),
    [
        ((5, 6), 9, 5, 3),
        ((5, 6), 9, 5, 5),
        ((8, 3), 2, 4, 3),
        ((4, 4), 16, 5, 3),
        ((4, 4), 1, 1, 1),
        ((3, 4), 5, 5, 27),
    ],
)
def test_density_peaks_against_loops(grid, num_anchors, num_neighbors, window):
    places = [*np.ndindex(*grid)]
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(len(places), 6))
        found = anchors_of(x, places, num_anchors, num_neighbors, window)
        row, anchors = reference.density_peaks(x, places, num_anchors, num_neighbors, window)
        assert [*np.unique(found)] == anchors
        np.testing.assert_array_equal(found, np.array(anchors)[row])


def test_with_a_window_things_alike_but_apart_stay_apart():
    """Two kinds of patches in four stripes: each stripe has a peak of its own, whose members are those of the stripe."""
    places = [*np.ndindex(3, 12)]
    stripe = np.array([x // 3 for _, x in places])
    x = 10.0 * (stripe % 2)[:, None] + np.random.default_rng(0).normal(size=(36, 8))
    joined = {window: anchors_of(x, places, 4, 3, window) for window in (5, 27)}
    np.testing.assert_array_equal(stripe[joined[5]], stripe)
    assert (stripe[joined[27]] != stripe).any() and (stripe[joined[27]] % 2 == stripe % 2).all()


@pytest.mark.parametrize(
    ("variant", "options", "site", "num_anchors"),
    mostly_long(
        [
            ({}, dict(keep_ratio=0.4), 1, 6),
            (BARE, dict(keep_ratio=0.3, site=2, window=3, num_neighbors=3), 2, 5),
            (DISTILLED, dict(keep_ratio=0.6, site=0, proportional=False), 0, 9),
        ],
        short=(0, 1),
    ),
)
def test_equals_the_reference(variant, options, site, num_anchors):
    model = lively(TINY | variant, reducer="ailurus", **options)
    x = embed(model, numpy_images(2, model.image_size))
    found, aux = jax.jit(lambda model, x: model.encode(x))(model, x)
    assert found.shape == x.shape and (np.asarray(aux["source"]) == np.arange(x.shape[1] - model.num_special)).all()
    choices = options.get("num_neighbors", 5), options.get("window", 7), options.get("proportional", True)
    for b in range(2):
        expected, anchors = reference.ailurus(model, x[b], site, num_anchors, *choices)
        np.testing.assert_allclose(found[b], expected, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_array_equal(aux["kept"][b], anchors)


def walk(model, images):
    """What comes out, aux, and what entered each block."""

    @jax.jit
    def call(x):
        seen = []
        return *model.reducer([Seen(block, seen) for block in model.blocks], x, model.tokens(len(images))), seen

    return call(embed(model, images))


def test_tokens_say_in_which_anchor_every_patch_lives():
    x, aux, seen = walk(numpy_model(TINY, reducer="ailurus", keep_ratio=0.4), numpy_images(2))
    place = np.stack(np.divmod(np.arange(16), 4), axis=-1)
    assert [entering.shape[1] for entering, _ in seen] == [17, 7, 7]
    for _, tokens in seen[1:]:
        assert (np.diff(tokens.index, axis=1) > 0).all()
        np.testing.assert_array_equal(tokens.index, aux["kept"])
        for b in range(2):
            source = np.asarray(tokens.source[b])
            means = [place[source == row].mean(axis=0) for row in range(6)]
            np.testing.assert_allclose(tokens.position[b], means, atol=1e-5)
            np.testing.assert_array_equal(source[np.asarray(tokens.index[b])], np.arange(6))
            for same in range(6):  # members of an anchor come out alike
                assert len(np.unique(np.asarray(x)[b, 1:][source == same], axis=0)) == 1


def test_tokens_on_their_own_are_untouched():
    """Bit for bit, also in bfloat16: what nothing merges into is a copy."""
    model = numpy_model(TINY, reducer="ailurus", keep_ratio=0.8, site=0, dtype="bfloat16")
    embedded = np.asarray(embed(model, numpy_images(2)), np.float32)
    _, _, seen = walk(model, numpy_images(2))
    entering, tokens = seen[0]
    for b in range(2):
        size = np.bincount(tokens.source[b], minlength=13)
        alone = np.flatnonzero(size == 1)
        assert 8 <= len(alone) < 13
        rows, patches = np.asarray(entering, np.float32)[b, 1:], embedded[b, 1:]
        np.testing.assert_array_equal(rows[alone], patches[np.asarray(tokens.index)[b, alone]])


def test_after_a_filter():
    then = dict(name="ailurus", keep_ratio=0.5, site=1)
    x, aux, seen = walk(numpy_model(TINY, reducer="tif", keep_ratio=0.5, then=then), numpy_images(4))
    assert x.shape == (4, 9, 32) and [entering.shape[1] for entering, _ in seen] == [9, 5, 5]
    assert ((np.asarray(aux["source"]) >= 0).sum(axis=1) == 8).all()
    np.testing.assert_array_equal(aux["kept"], seen[-1][1].index)
    own = np.take_along_axis(np.asarray(seen[-1][1].source), np.asarray(aux["kept"]), axis=1)
    np.testing.assert_array_equal(own, np.tile(np.arange(4), (4, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_and_large_tokens(dtype):
    tokens = raster_tokens(1, 0, (4, 4), has_class=False)
    near = within(tokens.position, 3)
    for patches in (jnp.full((1, 16, 4), 7.0), 1e4 * numpy_images(1, (4, 4))[..., :1].reshape(1, 16, 1)):
        joined = np.asarray(cluster(patches.astype(dtype), 5, 5, near))[0]
        assert len(np.unique(joined)) == 5 and (joined[np.unique(joined)] == np.unique(joined)).all()


def test_cost_and_tokens_of_deit():
    counted = cost_of("deit_tiny_patch16_224", reducer="ailurus", keep_ratio=0.25)
    assert counted.tokens == (197,) * 4 + (50,) * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=1.2), "keep_ratio is 1.2"),
        (dict(site=-2), "site is -2; it is how many blocks"),
        (dict(window=4), "window is 4; it is an odd number"),
        (dict(num_neighbors=0), "num_neighbors is 0"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="ailurus", **options)


def test_a_site_behind_the_last_block():
    with pytest.raises(InputError, match="site is 3; it leaves none of 3 blocks"):
        cost_of(TINY, reducer="ailurus", site=3)
