"""Schedules: a ratio, a ratio per site, integers per site or per block."""

import math

import pytest
from cases import cost_of

from tif_jax.errors import InputError
from tif_jax.reducers import _schedule as schedule

MODEL = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)  # 16 patches


def test_one_ratio_goes_to_the_quarters():
    assert schedule.amounts(0.7, None, None, 12) == {3: 0.7, 6: 0.7, 9: 0.7}


def test_a_ratio_for_each_site_and_numbers_for_each_site_or_block():
    assert schedule.amounts((0.9, 0.5), (1, 3), None, 4) == {1: 0.9, 3: 0.5}
    assert schedule.amounts(0.7, (1, 3), (12, 8), 4) == {1: 12, 3: 8}
    assert schedule.amounts(0.7, None, (16, 12, 12, 8), 4) == {0: 16, 1: 12, 2: 12, 3: 8}


def test_count():
    assert schedule.count(0.7, 10, math.floor) == 7
    assert schedule.count(0.01, 10, math.floor) == 1
    assert schedule.count(12, 10, math.floor) == 10
    assert schedule.count(3, 10, math.floor) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(sites=(3, 1)), "sites is \\(3, 1\\); it lists block indices"),
        (dict(sites=(1, 4)), "sites is \\(1, 4\\); the model has blocks 0..3"),
        (dict(keep_ratio=(0.5, 0.5), sites=(1,)), "keep_ratio has 2 entries for 1 sites"),
        (dict(num_kept=(8, 4)), "num_kept has 2 entries for 3 sites and 4 blocks"),
        (dict(num_kept=(8, 0, 4)), "num_kept is \\(8, 0, 4\\); it lists numbers"),
    ],
)
def test_misuse(given, message):
    with pytest.raises(InputError, match=message):
        schedule.check(given.get("keep_ratio", 0.7), given.get("sites"), given.get("num_kept"))
        schedule.amounts(given.get("keep_ratio", 0.7), given.get("sites"), given.get("num_kept"), 4)


@pytest.mark.parametrize(
    ("reducer", "options", "patches"),
    [
        ("evit", dict(num_kept=(16, 12, 12, 8)), (16, 12, 12, 8)),
        ("evit", dict(num_kept=(16, 12, 12, 8), fuse=False), (16, 12, 12, 8)),
        ("evit", dict(num_kept=(12, 8), sites=(1, 2)), (16, 12, 8, 8)),
        ("bat", dict(num_kept=(16, 12, 12, 8)), (16, 12, 12, 8)),
        ("evo_vit", dict(num_kept=(16, 16, 12, 8)), (16, 16, 13, 9)),  # and the representative
        ("evo_vit", dict(num_kept=(16, 8, 16, 8), representative=False), (16, 8, 16, 8)),
        ("evo_vit", dict(keep_ratio=(0.75, 0.5), stages=(1, 3)), (16, 13, 13, 9)),
        ("tome", dict(num_merged=(0, 4, 0, 4)), (16, 12, 12, 8)),
    ],
)
def test_tokens_that_leave_each_block(reducer, options, patches):
    counted = cost_of(MODEL, reducer=reducer, **options)
    assert tuple(number - 1 for number in counted.tokens) == patches


def test_evo_vit_refuses_a_sparse_first_block():
    with pytest.raises(InputError, match="block 0 is dense: give 16"):
        cost_of(MODEL, reducer="evo_vit", num_kept=(8, 8, 8, 8))
