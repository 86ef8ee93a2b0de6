"""What a call of a model leaves out in its last block, against the same model that computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import call, cost_of, lively, mostly_long, numpy_images, whole_cost_of
from flax import nnx

from tif_jax.models.special_alone import SpecialAlone
from tif_jax.tokens import raster_tokens
from tif_jax.training.losses import classification

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
DISTILLED = dict(
    distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.5, rotary="dinov3", qkv_bias=False
)
EVA = dict(swiglu=True, attention_inner_norm=True, mlp_inner_norm=True, rotary="eva02", remat=True, gelu="tanh")
HEADLESS = dict(num_registers=1, num_classes=0, pre_norm=True)
CASES = [
    ("full", {}, {}),
    ("full", {}, DISTILLED),
    ("full", {}, EVA),
    ("evo_vit", {}, {}),
    ("tosa", dict(keep_ratio=0.5, layers=(2,), selector="oracle"), {}),
    ("tif", dict(then=dict(name="tome", num_merged=2)), DISTILLED),
    ("dynamic_vit", dict(keep_ratio=0.5, sites=(1, 2)), {}),
    ("evit", dict(keep_ratio=0.5, sites=(1, 2)), {}),
    ("bat", dict(keep_ratio=0.5, sites=(2,)), EVA),
    ("ailurus", {}, HEADLESS),
    ("expediting", {}, {}),
    ("tome", dict(num_merged=3), EVA),
    ("mctf", dict(keep_ratio=0.5, sites=(2,), one_step_ahead=True), {}),
]
SHORT = (1, 3, 4, 5, 11)


def both(fields, **options):
    """The model, and one with its weights that computes every token of its last block."""
    return [lively(TINY | fields | dict(lean_last_block=lean), **options) for lean in (True, False)]


@pytest.mark.parametrize(("reducer", "options", "fields"), mostly_long(CASES, SHORT))
def test_it_says_the_same(reducer, options, fields):
    lean, whole = (call(model, numpy_images(3)) for model in both(fields, reducer=reducer, **options))
    assert np.abs(lean[0]).max() > 0.1
    np.testing.assert_allclose(lean[0], whole[0], rtol=1e-5, atol=1e-5)
    assert lean[1].keys() == whole[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), lean[1], whole[1])


@pytest.mark.parametrize(
    ("reducer", "fields"),
    mostly_long([("dynamic_vit", dict(drop_path=0.3, layer_scale=0.5)), ("full", EVA), ("tif", DISTILLED)]),
)
def test_it_learns_the_same(reducer, fields):
    """As in training, where dynamic_vit masks and branches of images are dropped."""
    batch = dict(label=jnp.array([0, 1, 4]))

    def gradient(model):
        graphdef, params = nnx.split(model)

        def loss(params):
            model = nnx.merge(graphdef, params)
            return classification(*model(numpy_images(3), nnx.Rngs(1)), batch)["loss"].mean()

        return jax.jit(jax.grad(loss))(params)

    lean, whole = map(gradient, both(fields, reducer=reducer))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), lean, whole)


def test_patches_pass_through_and_queries_and_keys_are_those_of_all():
    block = lively(TINY).blocks[-1]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, 32)), jnp.float32)
    tokens = raster_tokens(2, 1, (4, 4), has_class=True)
    y, qk = jax.jit(lambda x: SpecialAlone(block, 1)(x, tokens))(x)
    whole, expected = jax.jit(lambda x: block(x, tokens))(x)
    np.testing.assert_array_equal(y[:, 1:], x[:, 1:])
    np.testing.assert_allclose(y[:, :1], whole[:, :1], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), qk, expected)


def test_the_steps_compute_every_token():
    """`encode` is for features, decoders and teachers."""
    lean, whole = both({}, reducer="tif")
    steps = jax.jit(lambda model, x: model.encode(model.embed(x))[0])
    np.testing.assert_array_equal(steps(lean, numpy_images(2)), steps(whole, numpy_images(2)))


@pytest.mark.parametrize(
    "fields", [dict(pool="mean"), dict(pool="class_and_mean"), dict(task="depth", decoder="linear")]
)
def test_where_patches_are_read_nothing_is_left_out(fields):
    fields = TINY | fields | dict(decoder_blocks=(0, 2) if "task" in fields else None)
    lean = lively(fields)
    assert lean.blocks_of_prediction == lean.blocks
    assert cost_of(fields) == whole_cost_of(fields)


@pytest.mark.parametrize("fields", [{}, dict(distillation_token=True)])
def test_cost_is_the_formula(fields):
    """What one asks: its query, that times the keys' matrix, logits, their sums over x, values, output; its network."""
    num_read, width, heads = 1 + len(fields), 32, 2
    tokens = 16 + num_read
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    last = num_read * (12 * width**2 + 2 * tokens * heads * width)
    counted = cost_of(TINY | fields)
    assert round(1e9 * counted.gmac) == 16 * 192 * width + 2 * block + last + num_read * width * 5
    assert counted.tokens == (tokens,) * 3
    assert cost_of(TINY | fields, reducer="evit", sites=(2,)).gmac == counted.gmac  # who leaves there, leaves too late
