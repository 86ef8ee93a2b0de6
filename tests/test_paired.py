"""Paired comparisons and fronts against plain loops; budgets by speed against curves that are known."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import tif_jax
from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import read_entry
from tif_jax.impact.paired import difference, divergence, estimate, front, terms
from tif_jax.models import build, built_with, speed
from tif_jax.models.budget import Speed, read_budget
from tif_jax.models.cost import cost

FIELDS = dict(image_size=32, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)


def test_divergence_is_the_sum_over_classes():
    p, q = np.random.default_rng(0).normal(scale=3, size=(2, 4, 7))
    for one in (p, q):
        one -= np.log(np.exp(one).sum(axis=1, keepdims=True))
    expected = [sum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    found = divergence(jnp.asarray(p + 5, jnp.float32), jnp.asarray(q - 2, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert divergence(jnp.asarray(p, jnp.bfloat16), jnp.asarray(p, jnp.bfloat16)).dtype == jnp.float32


def test_pairs_know_a_difference_better_than_means():
    rng = np.random.default_rng(0)
    common = rng.normal(size=50)
    one, other = common + 0.1 * rng.normal(size=50) + 0.2, common + 0.1 * rng.normal(size=50)
    found = difference(one, other)
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(gaps) / 50
    assert found.mean == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 49 / 50))
    assert found.error < estimate(one).error / 3
    assert estimate(np.array([1.0])) == (1.0, None)


def test_terms_of_images_without_label():
    classes, whole, labels = np.array([1, 2, 0, 1]), np.array([1, 0, 0, 1]), np.array([1, -1, 2, -1])
    found = terms(classes, np.zeros(4), whole, labels)
    np.testing.assert_array_equal(found["agreement"], [1, 0, 1, 1])
    np.testing.assert_array_equal(found["top1"], [1, np.nan, 0, np.nan])
    assert estimate(found["top1"]).mean == 0.5
    assert "top1" not in terms(classes, np.zeros(4), whole, np.full(4, -1))


def test_the_front_is_who_is_not_beaten():
    for seed in range(20):
        costs, merits = np.random.default_rng(seed).integers(0, 6, (2, 12)).astype(float).tolist()
        points = list(zip(costs, merits, strict=True))
        expected = [not any(a <= c and b >= m and (a, b) != (c, m) for a, b in points) for c, m in points]
        assert front(costs, merits) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.8, 0.8), ("0.8", 0.8), (2, 2.0), ("120 images/s", Speed(120.0, False)), ("1.5x", Speed(1.5, True)),
        (" 2 x at 256", Speed(2.0, True, 256)), ("7images/s at 1", Speed(7.0, False, 1)),
    ],
)  # fmt: skip
def test_budgets(text, expected):
    found = read_budget(text)
    assert found == expected and type(found) is type(expected)
    assert read_budget(str(found)) == expected
    entry = read_entry({"name": "tome", "budget": text}, "reducer")
    assert read_entry(entry.described, "reducer") == entry and not {*" /"} & {*entry.label}


@pytest.mark.parametrize("text", ["fast", "0x", "-1x", "1.5x at 0", "x", "nan", 0, -0.5, True, "120 images/h"])
def test_what_is_no_budget(text):
    with pytest.raises(InputError, match=r"budget is .*; it is a number of GMAC, above 0, or a speed: '120 images/s'"):
        read_budget(text)


class Curve:
    """Amounts whose cost is known, and the speed at each: time = overhead + cost, with a bend and noise."""

    name = "keep_ratio"

    def __init__(self, overhead, noise, seed):
        self.values = [i / 1000 for i in range(1, 1001)]
        rng = np.random.default_rng(seed)
        shares = np.array(self.values)
        self.rates = 1 / (overhead + 0.7 * shares + 0.3 * shares**2) * (1 + noise * rng.normal(size=1000))
        self.asked = []

    def rate(self, i):
        self.asked.append(i)
        return float(self.rates[i])


@pytest.mark.parametrize("number", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("overhead, noise", [(0.0, 0.0), (0.1, 0.0), (0.05, 0.01)])
def test_a_speed_is_found_with_few_probes(number, overhead, noise):
    curve = Curve(overhead, noise, seed=0)
    found = speed.fastest_enough(number, curve, curve.rate, guess=round(1000 / number), known={999: 1.0}, wished="x")
    assert number <= curve.rates[found] <= 1.035 * number
    assert len(curve.asked) <= 6 and len({*curve.asked}) == len(curve.asked)


def test_a_speed_that_there_is_not():
    curve = Curve(0.4, 0, seed=0)
    with pytest.raises(
        InputError, match=r"budget is '3x'; the fastest that was found for this reducer here is 2\.\d+,"
    ):
        speed.fastest_enough(3.0, curve, curve.rate, guess=333, known={999: 1.0}, wished="3x")
    assert 0 in curve.asked


def test_load_and_create_take_a_speed(tmp_path, monkeypatch):
    """By a clock on which time is multiply-adds. What was found is kept."""

    def by_cost(self, model):
        gmac = cost(model).gmac
        return lambda: 1 / gmac

    monkeypatch.setattr(speed.Probes, "_turn", by_cost)
    monkeypatch.setattr(speed, "_path", lambda: tmp_path / "speeds.json")
    full = cost(tif_jax.create_model(FIELDS)).gmac
    model = tif_jax.create_model(FIELDS, reducer="random", budget="1.5x at 8")
    assert full / 1.5 * 0.96 < cost(model).gmac <= full / 1.5
    amount = built_with(model)["reducer"]["keep_ratio"]
    assert cost(tif_jax.create_model(FIELDS, reducer="random", keep_ratio=amount)).gmac == cost(model).gmac
    absolute = tif_jax.create_model(FIELDS, reducer="random", budget=f"{1.5 / full:.3f} images/s at 8")
    assert full / 1.5 * 0.96 < cost(absolute).gmac <= full / 1.5
    monkeypatch.setattr(speed.Probes, "__init__", lambda *_: pytest.fail("the answer is kept"))
    build._solved.cache_clear()
    build._probes.cache_clear()
    again = tif_jax.create_model(FIELDS, reducer="random", budget="1.5x at 8")
    assert built_with(again)["reducer"]["keep_ratio"] == amount
