"""Adaptive budgets: routes against all thresholds there are; a ladder against its models alone; mistakes."""

import itertools
import math

import numpy as np
import pytest
from cases import call, lively, numpy_images

from tif_jax import Adaptive, cost
from tif_jax.adaptive.routing import (
    ALWAYS,
    NEVER,
    Route,
    cheapest,
    confidence,
    expected,
    out_of_fold,
    promised,
    rung_of,
)
from tif_jax.errors import InputError

COSTS = (0.4, 0.7, 1.0)


def ladder_of(num_images, noise, seed=0):
    """(sure, agrees) of models whose logits are the last one's and noise."""
    rng = np.random.default_rng(seed)
    last = rng.normal(size=(num_images, 6)) * 2
    found = [last + rng.normal(size=last.shape) * scale for scale in noise]
    return np.stack([confidence(x) for x in found]), np.stack([x.argmax(1) == last.argmax(1) for x in found])


def test_confidence():
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(confidence(np.log(p) + 7), np.log([0.5 / 0.5, 0.8 / 0.2]))
    assert np.isfinite(confidence(np.array([[1e4, 0.0, -1e4]]))).all()


def test_where_images_stay_and_what_it_costs():
    sure = np.array([[2.0, 0.5, 0.1, 3.0], [9.0, 2.0, 0.2, 0.0]])
    agrees = np.array([[True, False, False, False], [False, True, False, False]])
    route = Route((0, 1, 2), (1.0, 1.0, ALWAYS))
    np.testing.assert_array_equal(rung_of(route, sure), [0, 1, 2, 0])
    found = expected(route, sure, agrees, COSTS)
    assert found.agreement == 0.75  # the last image stays on the first rung, and differs
    assert found.cost == pytest.approx((0.4 + (0.4 + 0.7) + (0.4 + 0.7 + 1.0) + 0.4) / 4)
    assert expected(Route((1, 2), (NEVER, ALWAYS)), sure, agrees, COSTS) == (1.0, pytest.approx(1.7))
    assert expected(Route((2,), (ALWAYS,)), sure, agrees, COSTS) == (1.0, 1.0)


@pytest.mark.parametrize("agreement", [0.8, 0.9, 0.97])
def test_one_rung_has_the_cheapest_of_all_thresholds(agreement):
    sure, agrees = ladder_of(300, (0.8,))
    found = expected(cheapest(sure, agrees, (0.4, 1.0), agreement), sure, agrees, (0.4, 1.0))
    every = [expected(Route((0, 1), (t, ALWAYS)), sure, agrees, (0.4, 1.0)) for t in [*sure[0], NEVER]]
    assert found.agreement >= agreement
    assert found.cost == pytest.approx(min([1.0, *(e.cost for e in every if e.agreement >= agreement)]))


def test_two_rungs_are_as_good_as_all_pairs_of_thresholds():
    sure, agrees = ladder_of(300, (0.8, 0.4))
    costs = (0.02, 0.4, 1.0)
    found = expected(cheapest(sure, agrees, costs, 0.95), sure, agrees, costs)
    single = [cheapest(sure[[i]], agrees[[i]], (costs[i], 1.0), 0.95) for i in (0, 1)]
    alone = [expected(single[i], sure[[i]], agrees[[i]], (costs[i], 1.0)).cost for i in (0, 1)]
    grid = np.quantile(sure, np.linspace(0, 1, 41), axis=1).T
    every = (expected(Route((0, 1, 2), (a, b, ALWAYS)), sure, agrees, costs) for a in grid[0] for b in grid[1])
    best = min(e.cost for e in every if e.agreement >= 0.95)
    assert found.agreement >= 0.95 and found.cost < min(alone) and found.cost < best + 0.01


def test_routes_at_the_ends():
    sure, agrees = ladder_of(100, (1.0, 0.5))
    assert cheapest(sure, agrees, COSTS, 1.0).rungs == (2,) or expected(
        cheapest(sure, agrees, COSTS, 1.0), sure, agrees, COSTS
    ) == (1.0, pytest.approx(1.0, abs=0.3))
    always = np.ones_like(agrees)
    assert expected(cheapest(sure, always, COSTS, 1.0), sure, always, COSTS) == (1.0, pytest.approx(0.4))
    assert cheapest(sure, ~always, COSTS, 0.9) == Route((2,), (ALWAYS,))


def test_a_route_ends_where_nobody_climbs_on():
    sure, agrees = ladder_of(200, (1.0, 0.5))
    assert cheapest(sure, agrees, COSTS, 0.2).rungs == (0, 2)  # nobody climbs, so the second would be for nothing
    agrees[1] = True
    first, second = cheapest(sure, agrees, COSTS, 0.97), cheapest(sure[1:], agrees[1:], COSTS[1:], 0.97)
    assert first.rungs in ((0, 1), (1,)) and first.thresholds[-1] == ALWAYS and second == Route((0,), (ALWAYS,))


def test_routes_of_many_models_have_four_at_most():
    sure, agrees = ladder_of(60, np.linspace(1.5, 0.2, 9))
    costs = (*np.linspace(0.1, 0.9, 9), 1.0)
    route = cheapest(sure, agrees, costs, 0.95)
    assert len(route.rungs) <= 4 and expected(route, sure, agrees, costs).agreement >= 0.95


def test_what_is_expected_of_others_is_what_comes():
    """On many other images of the kind, within two of the errors that both estimates have."""
    sure, agrees = ladder_of(500, (0.8, 0.4))
    found, error = out_of_fold(sure, agrees, COSTS, 0.95)
    others = ladder_of(20_000, (0.8, 0.4), seed=1)
    came = expected(cheapest(sure, agrees, COSTS, 0.95), *others, COSTS)
    assert abs(came.agreement - found.agreement) < 2 * math.hypot(error, 0.01)
    assert abs(came.cost - found.cost) < 0.05 and error == pytest.approx(0.01, abs=0.002)


def test_a_wish_is_met_by_images_left_out():
    """Of many sets of images: others agree as often as wished on average, which those chosen on the same images do not."""
    others, raised, plain = ladder_of(20_000, (0.8, 0.4), seed=99), [], []
    for seed in range(8):
        sure, agrees = ladder_of(150, (0.8, 0.4), seed=seed)
        route, told, _ = promised(sure, agrees, COSTS, 0.95)
        assert told.agreement >= 0.95
        raised.append(expected(route, *others, COSTS).agreement)
        plain.append(expected(cheapest(sure, agrees, COSTS, 0.95), *others, COSTS).agreement)
    assert np.mean(raised) > 0.945 and np.mean(raised) > np.mean(plain)
    assert promised(sure, agrees & False, COSTS, 0.95)[:2] == (Route((2,), (ALWAYS,)), (1.0, 1.0))


TINY = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=4)


@pytest.fixture(scope="module")
def models():
    """The last one, and two of less and less noise in comparison with it."""
    return lively(TINY), [lively(TINY, reducer="random", keep_ratio=keep) for keep in (0.75, 0.25)]


@pytest.fixture(scope="module")
def adaptive(models):
    model, ladder = models
    return Adaptive(model, ladder, 0.85, numpy_images(96, (16, 16), 1), batch_size=8)


@pytest.fixture(scope="module")
def images():
    return np.asarray(numpy_images(37, (16, 16), 2))


def test_a_ladder_is_its_models(models, adaptive, images):
    """Each image has the logits of the first model that is sure of it, and costs all that it went through."""
    model, ladder = models
    in_order = (*reversed(ladder), model)
    assert adaptive.costs == tuple(cost(m).gmac for m in in_order) and [*adaptive.costs] == sorted(adaptive.costs)
    alone = np.stack([np.asarray(call(m, images)[0]) for m in in_order])
    thresholds = (*np.median(confidence(alone[:2])[:, 1:], axis=1).tolist(), ALWAYS)  # between two images
    adaptive = Adaptive.with_route(model, ladder, Route((0, 1, 2), thresholds), batch_size=8)
    answers = adaptive(images)
    sure = confidence(alone) >= np.array(thresholds)[:, None]
    np.testing.assert_array_equal(answers.rung, sure.argmax(axis=0))
    assert {*answers.rung} == {0, 1, 2}
    np.testing.assert_allclose(answers.logits, alone[answers.rung, np.arange(37)], atol=1e-5)
    np.testing.assert_allclose(answers.gmac, np.cumsum(adaptive.costs)[answers.rung])


def test_batches_of_any_sizes_come_back_in_order(adaptive, images):
    whole = adaptive(images)
    bounds = [0, 1, 1, 20, 23, 37]
    parts = [images[a:b] for a, b in itertools.pairwise(bounds)]
    answers = [*adaptive.stream(iter(parts))]
    assert [len(a.rung) for a in answers] == [1, 0, 19, 3, 14]
    for name in whole._fields:
        joined = np.concatenate([getattr(a, name) for a in answers])
        np.testing.assert_allclose(joined, getattr(whole, name), atol=1e-5)
    assert adaptive(images[:0]).logits.shape == (0, 4) and [*adaptive.stream([])] == []
    assert adaptive.whole(images[:0]).shape == (0, 4)
    coarse = images.astype(np.float16)  # the programs are those of float32
    np.testing.assert_array_equal(adaptive(coarse).rung, adaptive(coarse.astype(np.float32)).rung)


def test_answers_come_as_soon_as_they_are_known(adaptive, images):
    """With a ladder that is always sure no batch waits for the next."""
    model, ladder = adaptive.models[-1], adaptive.models[:-1]
    sure = Adaptive.with_route(model, ladder, Route((0, 2), (ALWAYS, ALWAYS)), batch_size=8)
    given = []

    def batches():
        for first in (0, 8, 16):
            given.append(first)
            yield images[first : first + 8]

    for number, _ in enumerate(sure.stream(batches())):
        assert given == [0, 8, 16][: number + 1]


def test_what_is_promised(models, adaptive):
    assert 0 <= adaptive.expected.agreement <= 1 and adaptive.expected.cost < 2 * adaptive.costs[-1]
    model, ladder = models
    certain = Adaptive(model, ladder, 1.0, numpy_images(64, (16, 16), 1))
    others = numpy_images(10, (16, 16), 3)
    if certain.route.rungs == (2,):
        np.testing.assert_allclose(certain(others).logits, call(model, others)[0], atol=1e-5)


def test_mistakes(models):
    model, ladder = models
    images = np.asarray(numpy_images(64, (16, 16), 1))
    with pytest.raises(InputError, match="63 images are too few to calibrate with; give 64 or more"):
        Adaptive(model, ladder, 0.9, images[:63])
    with pytest.raises(InputError, match="tau is 0"):
        Adaptive(model, ladder, 0.0, images)
    with pytest.raises(InputError, match="num_classes is 5 in the ladder and 4 in the last model"):
        Adaptive(model, [lively(TINY | dict(num_classes=5))], 0.9, images)
    with pytest.raises(InputError, match="batch_size is 0"):
        Adaptive(model, ladder, 0.9, images, batch_size=0)
    with pytest.raises(InputError, match="which is not normalised"):
        Adaptive(model, ladder, 0.9, images * 1000)
    certain = Adaptive.with_route(model, ladder, Route((2,), (ALWAYS,)))
    with pytest.raises(InputError, match="which is not normalised"):
        [*certain.stream([images * 1000])]
    named, others = (lively(TINY) for _ in range(2))
    named.class_names, others.class_names = tuple("abcd"), tuple("abdc")
    with pytest.raises(InputError, match="have other class names, or these in another order"):
        Adaptive.with_route(named, [others], Route((1,), (ALWAYS,)))
    with pytest.raises(InputError, match=r"rungs \(0, 3\); they are some of 0 to 2"):
        Adaptive.with_route(model, ladder, Route((0, 3), (1.0, ALWAYS)))


@pytest.mark.parametrize(
    "route",
    [
        Route((), ()),
        Route((3,), (ALWAYS,)),
        Route((1, 0), (0.0, ALWAYS)),
        Route((0, 2), (ALWAYS,)),
        Route((0, 2), (0.0, 0.0)),
    ],
)
def test_routes_that_are_none(models, route):
    with pytest.raises(InputError, match="the route has"):
        Adaptive.with_route(*models, route)


def test_an_image_that_gives_no_numbers_is_answered_like_others(models, images):
    bad = images.copy()
    bad[0] = np.nan
    both = images.copy()
    both[0, 0, 0] = np.inf, -np.inf, 0
    answers = Adaptive.with_route(*models, Route((0, 1, 2), (0.0, 0.0, ALWAYS)), batch_size=8)
    found, expected = [np.concatenate([a.logits for a in answers.stream([x])]) for x in (bad, images)]
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], expected[1:], atol=1e-5)
    again = np.concatenate([a.logits for a in answers.stream([both.astype(np.float16)])])
    assert np.isnan(again[0]).all() and np.isfinite(again[1:]).all()
