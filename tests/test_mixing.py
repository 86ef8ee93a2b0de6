"""Mixup and CutMix: what is mixed, how often and how much, on one device and on eight, and the loss of mixed labels."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cases import mostly_long
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats
from scipy.special import log_softmax

from tif_jax.errors import InputError
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.training import losses
from tif_jax.training.mixing import Mixing, mix

DEIT = Mixing(mixup=0.8, cutmix=1.0)


def batch(num=5, size=(12, 16), dtype=np.float32):
    images = np.random.default_rng(0).standard_normal((num, *size, 3))
    return {"image": jnp.asarray(images, dtype), "label": jnp.arange(num, dtype=jnp.int32), "index": jnp.arange(num)}


@functools.cache
def many(options, num=4000, size=(12, 16)):
    """Which pixels each of num draws keeps (num, Y, X), in shares, and the weight of the label (num,)."""
    images = jnp.stack([jnp.ones((*size, 3)), jnp.zeros((*size, 3))])
    given = {"image": images, "label": jnp.arange(2)}
    mixed = jax.jit(jax.vmap(lambda key: mix(key, given, options)))(jax.random.split(jax.random.key(0), num))
    return np.asarray(mixed["image"][:, 0, :, :, 0]), np.asarray(mixed["label_weight"][:, 0])


def fits(statistic):
    return statistic.pvalue > 1e-3


# What is mixed --------------------------------------------------------------------------------------------------------


def test_with_neither_the_batch_stays_as_it_is():
    given = batch()
    mixed = mix(jax.random.key(0), given, Mixing(switch=0.3, probability=0.5))
    assert mixed.keys() == given.keys() and all(mixed[name] is given[name] for name in given)


@pytest.mark.parametrize(
    "num, dtype, tolerance",
    mostly_long(
        [(n, *of_type) for n in (4, 5) for of_type in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-8))], short=(0, 3)
    ),
)
def test_mixup_is_a_weighted_mean_with_the_batch_reversed(strict_dtypes, num, dtype, tolerance):
    given = batch(num, dtype=dtype)
    mixed = jax.jit(mix, static_argnums=2)(jax.random.key(1), given, Mixing(mixup=0.8))
    weight = np.asarray(mixed["label_weight"])
    assert mixed["image"].dtype == dtype and weight.dtype == np.float32 and 0.01 < weight[0] < 0.99
    images = np.asarray(given["image"], np.float64)
    expected = weight[0] * images + (1 - weight[0]) * images[::-1]
    np.testing.assert_allclose(np.asarray(mixed["image"], np.float64), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(weight, weight[0])
    np.testing.assert_array_equal(mixed["label"], np.arange(num))
    np.testing.assert_array_equal(mixed["other_label"], np.arange(num)[::-1])
    np.testing.assert_array_equal(mixed["index"], given["index"])


@pytest.mark.parametrize("dtype", mostly_long([jnp.bfloat16, jnp.float32]))
def test_cutmix_pastes_one_box_of_the_batch_reversed(strict_dtypes, dtype):
    given = batch(dtype=dtype)
    mixed = jax.jit(mix, static_argnums=2)(jax.random.key(0), given, Mixing(cutmix=1.0))
    own, other, image = (np.asarray(x, np.float32) for x in (given["image"], given["image"][::-1], mixed["image"]))
    pasted = (image[0] != own[0]).any(axis=-1)
    ys, xs = pasted.any(axis=1), pasted.any(axis=0)
    np.testing.assert_array_equal(pasted, ys[:, None] & xs)
    assert (np.diff(np.flatnonzero(ys)) == 1).all() and (np.diff(np.flatnonzero(xs)) == 1).all() and pasted.any()
    np.testing.assert_array_equal(image, np.where(pasted[:, :, None], other, own))
    np.testing.assert_allclose(mixed["label_weight"], np.full(5, 1 - pasted.mean()), rtol=1e-6)
    np.testing.assert_array_equal(mixed["other_label"], np.arange(5)[::-1])


# How often and how much -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", mostly_long([0.2, 0.8]))
def test_mixups_weight_is_beta_distributed(alpha):
    kept, weight = many(Mixing(mixup=alpha))
    np.testing.assert_allclose(kept.min(axis=(1, 2)), weight, rtol=1e-6)
    np.testing.assert_allclose(kept.max(axis=(1, 2)), weight, rtol=1e-6)
    assert fits(stats.kstest(weight, stats.beta(alpha, alpha).cdf))


@pytest.mark.parametrize("size", [(12, 16), pytest.param((12, 12), marks=pytest.mark.long)])
def test_cutmix_boxes_are_those_of_the_paper(size):
    kept, weight = many(Mixing(cutmix=1.0), size=size)
    assert np.isin(kept, (0, 1)).all()
    np.testing.assert_allclose(weight, kept.mean(axis=(1, 2)), rtol=1e-6)
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(20_000):
        share, ones = rng.beta(1, 1), np.ones(size)
        height, width = (int(length * math.sqrt(1 - share)) for length in size)
        y, x = rng.integers(size[0]) - height // 2, rng.integers(size[1]) - width // 2
        ones[max(y, 0) : y + height, max(x, 0) : x + width] = 0
        expected.append(ones)
    expected = np.array(expected)
    assert fits(stats.ks_2samp(kept.sum(axis=(1, 2)), expected.sum(axis=(1, 2))))
    np.testing.assert_allclose(kept.mean(axis=0), expected.mean(axis=0), atol=0.04)


@pytest.mark.parametrize("switch, probability", mostly_long([(0.5, 1.0), (0.2, 0.7)], short=(1,)))
def test_how_often(switch, probability):
    kept, weight = many(Mixing(mixup=0.8, cutmix=1.0, switch=switch, probability=probability))
    blended = ((kept > 0) & (kept < 1)).any(axis=(1, 2))
    cut = ~blended & (weight < 1)
    assert fits(stats.binomtest(int(blended.sum()), len(kept), probability * (1 - switch)))
    # One box in 144 is so small that it has no pixel: 12 rows times the root of its area.
    assert fits(stats.binomtest(int(cut.sum()), len(kept), probability * switch * (1 - 1 / 144)))
    assert (kept[weight == 1] == 1).all()
    assert fits(stats.kstest(weight[blended], stats.beta(0.8, 0.8).cdf))


# Devices --------------------------------------------------------------------------------------------------------------


def test_a_sharded_batch_is_mixed_alike():
    given, mesh = batch(16), make_mesh(16)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(mix, static_argnums=2)
    whole = [step(jax.random.key(seed), given, DEIT) for seed in range(6)]
    sharded = [step(jax.device_put(jax.random.key(seed), everywhere), shard(given, mesh), DEIT) for seed in range(6)]
    assert sharded[0]["image"].sharding.num_devices == 8 and not sharded[0]["image"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(whole))
    assert len({float(mixed["label_weight"][0]) for mixed in whole}) == 6  # every key is a draw of its own


# Loss -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_mixed_labels(strict_dtypes, smoothing):
    rng = np.random.default_rng(0)
    logits, weight = rng.standard_normal((4, 5)), np.array([0.0, 0.25, 0.7, 1.0])
    label, other = np.array([0, 1, 2, 3]), np.array([4, 1, 0, 2])
    given = {"label": label, "other_label": other, "label_weight": weight.astype(np.float32)}
    loss = jax.jit(lambda logits, given: losses.classification(logits, {}, given, label_smoothing=smoothing))
    terms = loss(jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, given))
    expected = []
    for i in range(4):  # as timm's mixup_target: both labels smoothed, then mixed
        target = np.full(5, smoothing / 5)
        target[label[i]] += weight[i] * (1 - smoothing)
        target[other[i]] += (1 - weight[i]) * (1 - smoothing)
        expected.append(-target @ log_softmax(logits[i]))
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-5)
    np.testing.assert_array_equal(terms["top1"], logits.argmax(axis=1) == label)


def test_losses_that_build_on_it_take_mixed_labels_too():
    rng = np.random.default_rng(0)
    logits, taught = (jnp.asarray(rng.standard_normal((4, 5)), jnp.float32) for _ in range(2))
    plain = {"label": jnp.array([0, 1, 2, 3]), "teacher/logits": taught}
    reverse = {**plain, "label": plain["label"][::-1]}
    mixed = {**plain, "other_label": reverse["label"], "label_weight": jnp.full(4, 0.3)}
    for loss in (
        losses.classification,
        losses.hard_distillation,
        functools.partial(losses.distillation, tokens_weight=0.0),
    ):
        of_all = jax.jit(lambda logits, all, loss=loss: [loss(logits, {}, given)["loss"] for given in all])
        own, other, both = of_all(logits, (plain, reverse, mixed))
        np.testing.assert_allclose(both, 0.3 * own + 0.7 * other, rtol=1e-5)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"mixup": -0.1},
        {"mixup": math.inf},
        {"cutmix": math.nan},
        {"cutmix": "1.0"},
        {"switch": 1.1},
        {"probability": -1.0},
        {"probability": None},
    ],
)
def test_bad_options(wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # outside tests nothing else looks at types
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{name} is {value!r}; it is a number[^\n]*$"):
        Mixing(**wrong)


@pytest.mark.parametrize("label", [-1, 5, 2**31 - 1])
@pytest.mark.parametrize("loss", [losses.classification, losses.hard_distillation])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_that_is_no_class_is_not_learned(loss, label, smoothing):
    """jax.nn.one_hot makes zeros of it: the loss was 0, and with mixed or smoothed labels merely too small."""
    prediction = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    for given in (
        {"label": np.array([1, label])},
        {"label": np.array([1, 1]), "other_label": np.array([0, label]), "label_weight": np.float32([0.5, 0.5])},
    ):
        batch = given | {"teacher/logits": prediction}
        base = {"label_smoothing": smoothing}
        if loss is losses.hard_distillation:
            base = {"base": lambda *args: losses.classification(*args, label_smoothing=smoothing)}
        found = loss(prediction, {}, batch, **base)["loss"]
        assert np.isfinite(found[0]) and np.isnan(found[1])
