"""TokenLearner against sums over patches in numpy, what it leaves, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images, whole_cost_of
from flax import nnx

from tif_jax import InputError, create_model
from tif_jax.models.params import params_of

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean", image_size=(48, 24))


def shares_of(params, patches):
    """(S, N) of one image: LN, 64 hidden units with the GELU of tanh, a softmax over the patches."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    centred = patches - patches.mean(axis=1, keepdims=True)
    y = centred / np.sqrt(patches.var(axis=1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
    y = y @ p["up"]["kernel"] + p["up"]["bias"]
    assert y.shape[1] == 64
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    y = np.exp(y @ p["down"]["kernel"] + p["down"]["bias"]).T
    return y / y.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("variant", "options", "site", "num_tokens"),
    mostly_long([({}, dict(keep_ratio=0.3), 1, 5), (BARE, dict(keep_ratio=0.5, site=2), 2, 9)]),
)
def test_equals_the_reference(variant, options, site, num_tokens):
    model = lively(TINY | variant, reducer="token_learner", **options)
    special, params = model.num_special, params_of(model)["reducer"]["weights"]
    x = embed(model, numpy_images(2, model.image_size))
    found, aux = jax.jit(lambda model, x: model.encode(x))(model, x)
    assert found.shape[1] == special + num_tokens
    for b in range(2):
        walked = x[b][None]
        for block in model.blocks[:site]:
            walked = feed_forward(block, attend(block, walked)[0])
        patches = np.asarray(walked, np.float64)[0, special:]
        shares = shares_of(params, patches)
        learned = np.array([sum(share * patch for share, patch in zip(row, patches, strict=True)) for row in shares])
        np.testing.assert_array_equal(aux["source"][b], shares.argmax(axis=0))
        walked = jnp.concatenate([walked[:, :special], jnp.asarray(learned, jnp.float32)[None]], axis=1)
        for block in model.blocks[site:]:
            walked = feed_forward(block, attend(block, walked)[0])
        np.testing.assert_allclose(found[b], walked[0], atol=2e-3)


def test_it_learns_in_fine_tuning():
    graphdef, params = nnx.split(lively(TINY, reducer="token_learner", keep_ratio=0.3))
    images = numpy_images(2)
    loss = lambda params: nnx.merge(graphdef, params)(images)[0].var()  # noqa: E731
    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))["reducer"]["weights"]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves((grads["up"], grads["norm"], grads["down"]["kernel"])))


def test_all_patches_need_no_network():
    full, whole = (cost_of(TINY, **options) for options in ({}, dict(reducer="token_learner", keep_ratio=1.0)))
    assert whole == full


def test_cost_of_deit():
    counted = whole_cost_of("deit_tiny_patch16_224", reducer="token_learner", keep_ratio=16 / 196, site=9)
    assert counted.tokens == (197,) * 9 + (17,) * 3
    blocks = sum(12 * t * 192**2 + 2 * t**2 * 192 for t in counted.tokens) + 196 * 768 * 192 + 192 * 1000
    assert counted.gmac == pytest.approx((blocks + 196 * (192 * 64 + 64 * 16 + 16 * 192)) / 1e9, rel=1e-9)
    plain = cost_of("deit_tiny_patch16_224")
    assert counted.parameters - plain.parameters == 2 * 192 + 193 * 64 + 65 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), r"keep_ratio is 0\.0"),
        (dict(site=-1), "site is -1; it is how many blocks"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="token_learner", **options)


def test_behind_a_filter_its_ratio_is_of_the_raster():
    then = dict(name="token_learner", keep_ratio=0.25, site=1)
    assert cost_of(TINY, reducer="tif", keep_ratio=0.5, then=then).tokens == (9, 5, 5)
    with pytest.raises(
        InputError, match=r"8 tokens of the 8 patches that arrive; its keep_ratio, 0\.5, is of all patches"
    ):
        cost_of(TINY, reducer="tif", keep_ratio=0.5, then=then | dict(keep_ratio=0.5))
