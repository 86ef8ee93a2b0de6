"""`even`: which patches are kept, how evenly, and what follows."""

import jax
import numpy as np
import pytest
from cases import call, lively, numpy_images

from tif_jax.errors import InputError
from tif_jax.reducers.even import spread

FIELDS = dict(image_size=32, patch_size=4, width=16, depth=3, num_heads=2, num_classes=5)  # 8 x 8 patches


def kept_of(**options):
    return np.asarray(call(lively(FIELDS, reducer="even", **options), numpy_images(2, (32, 32)))[1]["kept"])


def test_the_order_is_that_of_the_r2_sequence():
    """Its steps are 1/p and 1/p^2, p the root of x^3 = x + 1, found here by Newton's method."""
    plastic = 1.0
    for _ in range(50):
        plastic -= (plastic**3 - plastic - 1) / (3 * plastic**2 - 1)
    expected = [(row / plastic + column / plastic**2) % 1 for row in range(5) for column in range(7)]
    np.testing.assert_allclose(spread((5, 7)), expected, atol=1e-6)


@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 0.75])
def test_no_part_of_the_raster_has_much_more_or_less_than_its_share(keep_ratio):
    """In every square of 4 x 4 of 14 x 14 patches the number kept is within 1 of the share; of random draws it is not."""

    def worst(kept):
        is_kept = np.zeros(196)
        is_kept[kept] = 1
        squares = np.lib.stride_tricks.sliding_window_view(is_kept.reshape(14, 14), (4, 4)).sum(axis=(2, 3))
        return np.abs(squares - 16 * keep_ratio).max()

    number = round(196 * keep_ratio)
    assert worst(np.argsort(-spread((14, 14)))[:number]) <= 1
    rng = np.random.default_rng(0)
    assert min(worst(rng.permutation(196)[:number]) for _ in range(50)) > 1


def test_all_images_keep_the_same_patches_and_fewer_are_among_more():
    few, more = kept_of(keep_ratio=0.25), kept_of(keep_ratio=0.5)
    assert few.shape == (2, 16) and more.shape == (2, 32)
    assert (few == few[:1]).all() and {*few[0]} < {*more[0]}
    np.testing.assert_array_equal(np.sort(np.argsort(-spread((8, 8)))[:16]), few[0])


def test_what_follows_merges_what_is_left():
    """As many as are left are divided by the blocks; who was left out lives nowhere, who merged lives in another's row."""
    then = dict(name="tome", num_merged=4)
    model = lively(FIELDS, reducer="even", keep_ratio=0.5, then=then)
    _, aux = call(model, numpy_images(2, (32, 32)))
    source, size = np.asarray(aux["source"]), np.asarray(aux["size"])
    assert size.shape[1] == 32 - 3 * 4 and (size.sum(axis=1) == 32).all()
    assert ((source >= 0).sum(axis=1) == 32).all()
    kept = np.sort(np.argsort(-spread((8, 8)))[:32])
    np.testing.assert_array_equal(np.flatnonzero(source[0] >= 0), kept)
    plain = lively(FIELDS, reducer="tome", num_merged=4)
    whole = lively(FIELDS, reducer="even", keep_ratio=1.0, then=then)
    x = numpy_images(2, (32, 32))
    np.testing.assert_allclose(jax.jit(lambda x: whole(x)[0])(x), jax.jit(lambda x: plain(x)[0])(x), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(round_to=0), "round_to is 0"),
        (dict(then="tome"), "then is 'tome'; it is a dict"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(InputError, match=message):
        lively(FIELDS, reducer="even", **options)
