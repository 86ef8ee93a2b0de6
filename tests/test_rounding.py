"""`round_to`: kept tokens and special tokens together are a multiple, and what that costs."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import call, lively, numpy_images

from tif_jax import InputError, cost, create_model
from tif_jax.experiment import config as config_file
from tif_jax.experiment import stages
from tif_jax.models.cost import Cost
from tif_jax.tokens import num_kept

FIELDS = dict(
    image_size=32, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3
)  # 16 patches and a class token
REDUCERS = ("even", "norm", "prior", "random", "tif")


@pytest.mark.parametrize(
    ("keep_ratio", "num_patches", "num_special", "round_to", "expected"),
    [
        (0.5, 196, 1, 1, 98),
        (0.5, 196, 1, 8, 103),  # 104 rows
        (0.5, 196, 1, 16, 111),
        (0.5, 196, 2, 8, 102),
        (0.5, 196, 0, 8, 104),
        (0.48, 196, 1, 8, 95),  # 94 kept and one are 95; 96 rows
        (0.01, 196, 1, 8, 7),
        (1.0, 196, 1, 8, 196),  # there are no more
        (0.99, 196, 1, 8, 196),
    ],
)
def test_numbers(keep_ratio, num_patches, num_special, round_to, expected):
    assert num_kept(keep_ratio, num_patches, num_special, round_to) == expected


@pytest.mark.parametrize("reducer", REDUCERS)
def test_what_is_kept_more_comes_next_in_the_ranking(reducer):
    images = numpy_images(2, (32, 32))
    kept = []
    for options in (dict(), dict(round_to=4), dict(keep_ratio=11 / 16)):
        model = lively(FIELDS, reducer=reducer, **options)
        kept.append(np.asarray(call(model, images)[1]["kept"]))
    assert [rows.shape for rows in kept] == [(2, 8), (2, 11), (2, 11)]  # 12 tokens
    np.testing.assert_array_equal(kept[1], kept[2])
    assert all({*few} < {*more} for few, more in zip(kept[0], kept[1], strict=True))


def test_cost_counts_what_is_kept_more_and_tells_the_padding():
    plain, rounded, same = (
        cost(create_model(FIELDS, reducer="norm", lean_last_block=False, **options))
        for options in (dict(), dict(round_to=4), dict(keep_ratio=11 / 16))
    )
    assert plain.gmac < rounded.gmac == same.gmac
    assert (plain.tokens, rounded.tokens) == ((9, 9), (12, 12))
    assert (plain.padding(4), rounded.padding(4)) == (pytest.approx(3 / 9), 0)
    assert Cost(1.0, 1, (99, 50)).padding(8) == pytest.approx((5 + 6) / 149)


def test_a_budget_is_kept_with_rounded_numbers():
    budget = cost(create_model(FIELDS, reducer="norm", keep_ratio=0.9)).gmac
    model = create_model(FIELDS, reducer="norm", round_to=4, budget=budget)
    assert cost(model).gmac <= budget and cost(model).tokens[0] % 4 == 0
    kept = model(jnp.asarray(numpy_images(1, (32, 32))))[1]["kept"]
    assert kept.shape == (1, 11)  # the next multiple is more than 90 %


def test_a_filter_is_fitted_once_for_all_roundings():
    plain, rounded = (config_file.load("digits", flags) for flags in ([], ["--config.reducer.round_to=8"]))
    assert stages._fitted_entry(rounded) == stages._fitted_entry(plain)
    assert rounded.reducer.label == f"{plain.reducer.label},round_to=8"  # another folder


@pytest.mark.parametrize("reducer", REDUCERS)
def test_mistakes(reducer):
    with pytest.raises(InputError, match="round_to is 0; tokens are kept up to a multiple of it"):
        create_model(FIELDS, reducer=reducer, round_to=0)
