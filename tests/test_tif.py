"""TIF: its filter, its adapter and what comes then."""

import functools

import jax
import numpy as np
from cases import call, embed, lively, numpy_images, numpy_model, row_of
from flax import nnx
from flax.core import FrozenDict
from scipy.special import erf

from tif_jax import cost, tokens
from tif_jax.models import create_model
from tif_jax.models.params import params_of
from tif_jax.reducers import tome

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)


def images():
    return numpy_images(4)


@functools.cache
def tif(**options):
    return numpy_model(TINY, reducer="tif", keep_ratio=0.5, **options)


@functools.cache
def jitted(model):
    return jax.jit(lambda x: model(x))


def test_tif_keeps_the_highest_logits_and_its_filter_is_the_written_mlp():
    model = tif()
    x = images()
    p = jax.tree.map(np.asarray, params_of(model)["reducer"]["filter"])
    patches = np.asarray(embed(model, x))[:, 1:].astype(np.float64)
    u = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True) + 1e-6)
    u = u * p["norm"]["scale"] + p["norm"]["bias"]
    z = np.concatenate([u, np.broadcast_to(u.mean(1, keepdims=True), u.shape)], axis=-1)
    first = np.concatenate([p["local_in"]["kernel"], p["global_in"]["kernel"]])
    y = z @ first + p["local_in"]["bias"]
    gelu = lambda y: y * (1 + erf(y / np.sqrt(2))) / 2  # noqa: E731
    for layer in ("layer_0", "layer_1"):
        y = gelu(y) @ p[layer]["kernel"] + p[layer]["bias"]
    aux = jitted(model)(x)[1]
    np.testing.assert_allclose(aux["filter_logits"], y[..., 0], atol=1e-5)
    np.testing.assert_array_equal(aux["kept"], np.sort(np.argsort(-y[..., 0], axis=1)[:, :8], axis=1))


def test_a_fresh_adapter_adds_nothing():
    params = params_of(create_model(TINY, reducer="tif", adapter=8))["reducer"]["adapter"]
    assert not params["to_patches"]["kernel"].any() and not params["to_special"]["kernel"].any()


def test_with_all_tokens_it_is_the_plain_vit():
    """An adapter tells the tokens that stay what is missing."""
    images = numpy_images(2, (TINY["image_size"],) * 2)
    model = lively(TINY, reducer="tif", keep_ratio=1.0, adapter=8)
    plain = lively(TINY)
    nnx.update(plain, {name: value for name, value in params_of(model).items() if name != "reducer"})
    np.testing.assert_array_equal(call(model, images)[0], call(plain, images)[0])


def test_the_adapter_is_what_is_written():
    """On every image's tokens one by one, in float64."""
    model, plain = tif(adapter=8), tif()
    x = images()
    given = embed(model, x)
    (kept,) = np.asarray(jitted(model)(x)[1]["kept"])[None]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params_of(model)["reducer"]["adapter"])

    def norm(y, name):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * p[name]["scale"] + p[name]["bias"]

    linear = lambda y, name: y @ p[name]["kernel"] + p[name].get("bias", 0)  # noqa: E731
    expected = []
    for tokens_of, rows in zip(np.asarray(given, np.float64), kept, strict=True):
        hidden = linear(norm(tokens_of[1:], "norm"), "narrow")
        qkv, mixed = linear(norm(hidden, "attention_norm"), "qkv"), np.zeros_like(hidden)
        for head in range(4):
            query, key, value = (qkv[:, 8 * part + 2 * head : 8 * part + 2 * head + 2] for part in range(3))
            for i in range(len(hidden)):
                weight = np.exp(key @ query[i] / 2**0.5)
                mixed[i, 2 * head : 2 * head + 2] = weight @ value / weight.sum()
        hidden = hidden + linear(mixed, "out")
        up = linear(norm(hidden, "feed_forward_norm"), "up")
        hidden = norm(hidden + linear(up * (1 + erf(up / 2**0.5)) / 2, "down"), "hidden_norm")
        special = tokens_of[:1] + linear(hidden.mean(0), "to_special")
        expected.append(np.concatenate([special, tokens_of[1:][rows] + linear(hidden[rows], "to_patches")]))
    walk = jax.jit(lambda x: predict_after(plain, x))
    np.testing.assert_allclose(jitted(model)(x)[0], walk(np.array(expected, np.float32)), atol=1e-4)


def predict_after(model, x):
    for block in model.blocks:
        x, _ = block(x, row_of(x))
    return model.predict(x, {})[0]


def test_tif_then_another_is_the_other_on_the_tokens_that_tif_keeps():
    then = dict(name="tome", num_merged=2)
    model = tif(then=FrozenDict(then))
    x = images()
    logits, aux = jitted(model)(x)
    kept = jitted(tif())(x)[1]["kept"]  # the same filter: drawn from the same key
    assert "kept" not in aux  # a patch that tif left may have been merged

    @jax.jit
    def by_hand(x):
        special, patches = tokens.split(model.embed(x), 1)
        state = tokens.at_rows(model.tokens(4), kept)
        y, aux = tome.Tome(num_merged=2)(model.blocks, tokens.join(special, tokens.take(patches, kept)), state)
        return model.predict(y, {})[0], aux["source"]

    expected, source = by_hand(x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(aux["source"], source)
    for kept_here, source_here in zip(np.asarray(kept), np.asarray(source), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(source_here >= 0), kept_here)
    assert cost(model).tokens == (1 + 6, 1 + 4, 1 + 2)


def test_then_has_parameters_of_its_own():
    model = tif(then=FrozenDict(name="prior", keep_ratio=0.5))
    params = params_of(model)["reducer"]
    assert set(params) == {"filter", "then"} and params["then"]["logits"].shape == (16,)
    _, aux = jitted(model)(images())
    assert aux["kept"].shape == (4, 4) and (np.asarray(aux["source"]) >= 0).sum() == 16
    for row, of_image in zip(np.asarray(aux["source"]), np.asarray(aux["kept"]), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row >= 0), of_image)


def test_a_filter_that_drops_nothing_is_not_paid_for():
    whole = cost(create_model(TINY)).gmac
    assert cost(create_model(TINY, reducer="tif", keep_ratio=1.0)).gmac == whole
    assert cost(create_model(TINY, reducer="tif", keep_ratio=0.9)).gmac != whole
