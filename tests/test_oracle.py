"""The oracle against brute force: a slow numpy network that masks one token at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import embed, mostly_long, numpy_images, numpy_model, row_of
from flax import nnx
from reference import random_timm_tensors, vit_forward
from scipy.special import log_softmax, softmax

from tif_jax.errors import InputError
from tif_jax.impact import oracle
from tif_jax.impact.oracle import ESTIMATORS, check_options, shared_scores
from tif_jax.impact.token_impact import token_impact
from tif_jax.tokens import gates_to_log_weight
from tif_jax.weights.loading import load

NUM_PATCHES, NUM_HEADS = 6, 2
LABELS = np.array([0, 3, 1])
POOLS = ("class", "mean", "normed_mean", "class_and_mean", "attention")
PRE_NORM = ("class",)  # one of them has a norm before the first block
KEYWORD = {"zero": "zeroed", "content": "position_only", "drop": "dropped"}


@pytest.fixture(scope="module", params=POOLS)
def network(request, tmp_path_factory):
    """(tensors in timm's layout, pool, our model in float64, images)."""
    rng = np.random.default_rng(0)
    variant = dict(pool=request.param, pre_norm=request.param in PRE_NORM)
    tensors = random_timm_tensors(rng, width=16, depth=2, patch_size=4, grid=(2, 3), num_classes=5, **variant)
    import safetensors.numpy

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with jax.enable_x64(True):
        given = dict(num_heads=NUM_HEADS, gelu="exact", norm_eps=1e-6)
        model = load(path, image_size=(8, 12), dtype="float64", pool=request.param, **given)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(model, nnx.Param)))
    return tensors, request.param, model, rng.normal(size=(3, 8, 12, 3))


def brute_force(tensors, pool, images, mask, target):
    """Impact by the definition, one masked forward at a time."""
    forward = lambda **masked: vit_forward(tensors, images, num_heads=NUM_HEADS, pool=pool, **masked)  # noqa: E731
    clean = forward()

    def loss(logits):
        if target == "label":
            return -log_softmax(logits, axis=1)[np.arange(3), LABELS]
        return (softmax(clean, axis=1) * (log_softmax(clean, axis=1) - log_softmax(logits, axis=1))).sum(axis=1)

    return np.stack([loss(forward(**{KEYWORD[mask]: [i]})) - loss(clean) for i in range(NUM_PATCHES)], axis=1)


@pytest.mark.parametrize(
    "network, mask, target",
    mostly_long(
        [(pool, mask, target) for pool in POOLS for mask in oracle.MASKS for target in oracle.TARGETS],
        short=(0, 3, 8, 13, 21, 28),
    ),
    indirect=["network"],
)
def test_exact_is_brute_force(network, mask, target):
    tensors, pool, model, images = network
    expected = brute_force(tensors, pool, images, mask, target)
    with jax.enable_x64(True):
        impact = token_impact(
            model, jnp.asarray(images), LABELS, mask=mask, target=target, chunk=12
        )  # 6 = 4 + 2 padded
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(impact, expected, atol=1e-10)


ONE_BLOCK = dict(depth=1)
EVERYTHING = dict(depth=3, layer_scale=0.5, qk_norm=True, num_registers=2, distillation_token=True, drop_path=0.1)
NO_SPECIAL_TOKENS = dict(depth=3, qk_norm=True, pool="mean", class_token=False, layer_scale=0.5)
CLIP = dict(depth=2, pre_norm=True, gelu="quick")
SIGLIP = dict(depth=2, pool="attention", class_token=False, gelu="tanh")


@pytest.mark.parametrize(
    "fields, mask",
    mostly_long(
        [
            (fields, mask)
            for fields in (ONE_BLOCK, EVERYTHING, NO_SPECIAL_TOKENS, CLIP, SIGLIP)
            for mask in oracle.MASKS
        ],
        short=(2, 5, 8, 10, 12),
    ),
)
def test_exact_is_brute_force_for_every_kind_of_block(fields, mask):
    model = numpy_model(dict(image_size=(16, 24), patch_size=8, width=16, num_heads=2, num_classes=3) | fields)
    # Large weights: attention far from uniform.
    nnx.update(model, jax.tree.map(lambda x: 4 * x, nnx.state(model, nnx.Param)))
    images, labels = numpy_images(2, (16, 24)), np.array([0, 2])

    @jax.jit
    def loss(x):
        for block in model.blocks:
            x, _ = block(x, row_of(x))
        return -jax.nn.log_softmax(model.predict(x, {})[0])[jnp.arange(2), labels]

    x = np.asarray(embed(model, images))
    stand_in = np.asarray(model.patch_positions()) * (mask == "content")
    expected = []
    for i in range(6):
        at = model.num_special + i
        if mask == "drop":
            masked = np.delete(x, at, axis=1)
        else:
            masked = x.copy()
            masked[:, at] = stand_in[:, i]
        expected.append(np.asarray(loss(masked)) - np.asarray(loss(x)))
    impact = token_impact(model, images, labels, mask=mask, chunk=4)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(impact, np.stack(expected, axis=1), atol=1e-4)


def gated_loss(model, images, gates):
    x = model.embed(images)
    weight = gates_to_log_weight(gates, model.num_special)
    for block in model.blocks:
        x, _ = block(x, model.tokens(len(x)), weight)
    logits = model.predict(x, {}, gates)[0]
    return -jax.nn.log_softmax(logits)[jnp.arange(3), LABELS]


# The pools that read the class token, both kinds of tokens, and all by attention.
SOME_POOLS = pytest.mark.parametrize("network", mostly_long(POOLS, short=(0, 3, 4)), indirect=True)


@SOME_POOLS
def test_gate_zero_is_drop(network):
    _, _, model, images = network
    with jax.enable_x64(True):
        images = jnp.asarray(images)
        gates = jnp.ones((3, NUM_PATCHES))
        loss = jax.jit(lambda gates: gated_loss(model, images, gates))
        without = loss(gates.at[:, 2].set(0.0)) - loss(gates)
        dropped = token_impact(model, images, LABELS, mask="drop")[:, 2]
    np.testing.assert_allclose(without, dropped, atol=1e-10)


@SOME_POOLS
def test_gradient_is_the_finite_difference_of_the_gated_loss(network):
    _, _, model, images = network
    with jax.enable_x64(True):
        images = jnp.asarray(images)
        gradient = token_impact(model, images, LABELS, estimator="gradient")
        loss = jax.jit(lambda gates: gated_loss(model, images, gates))
        step = 1e-5
        for i in range(NUM_PATCHES):
            up, down = (jnp.ones((3, NUM_PATCHES)).at[:, i].add(s) for s in (step, -step))
            np.testing.assert_allclose(gradient[:, i], -(loss(up) - loss(down)) / (2 * step), atol=1e-6)


def test_sampled_is_unbiased():
    """The mean over many random masks is the mean over all of them, here all 2^4, each with its probability."""
    model = numpy_model(dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3))
    images = 3 * numpy_images(3, (16, 16), seed=1)
    labels = jnp.array([0, 1, 2])
    masks = np.array([[(m >> i) & 1 for i in range(4)] for m in range(16)], np.float32)

    def loss(gates):
        x = model.embed(images)
        weight = gates_to_log_weight(gates, 1)
        for block in model.blocks:
            x, _ = block(x, model.tokens(len(x)), weight)
        return -jax.nn.log_softmax(model.predict(x, {})[0])[jnp.arange(3), labels].sum()

    at = jax.jit(jax.vmap(lambda mask: -jax.grad(loss)(jnp.broadcast_to(jnp.maximum(mask, 1e-3)[None], (3, 4)))))(masks)
    kept = masks.sum(axis=1)
    probability = 0.7**kept * 0.3 ** (4 - kept)
    expected = np.einsum("m,mbn->bn", probability, at)
    deviation = np.sqrt(np.einsum("m,mbn->bn", probability, (at - expected[None]) ** 2))
    sampled = token_impact(model, images, labels, estimator="sampled", num_samples=4000, keep_ratio=0.7, chunk=512)
    assert (np.abs(sampled - expected) < 5 * deviation / np.sqrt(4000) + 1e-6).all()
    one, other = (token_impact(model, images, labels, estimator="sampled", num_samples=8, seed=s) for s in (0, 1))
    again = token_impact(model, images, labels, estimator="sampled", num_samples=8, seed=0)
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()


def test_unlabelled_images_have_no_loss_but_teacher_impact():
    model = numpy_model(dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3))
    images = numpy_images(2, (16, 16))
    impact = token_impact(model, images, target="teacher")
    assert (np.asarray(impact) >= -1e-6).all() and np.abs(impact).max() > 0
    options = oracle.check_options("exact", "zero", "teacher", num_samples=1, keep_ratio=0.5)
    scores = jax.jit(lambda x: oracle.shared_scores(model, x, {"label": jnp.array([-1, -1])}, seed=0, **options))(
        images
    )
    assert np.isnan(scores.loss).all() and np.isfinite(scores.impact).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(estimator="shapley"), "estimator is 'shapley'; allowed: exact, gradient, sampled"),
        (dict(mask="blur"), "mask is 'blur'; allowed"),
        (dict(target="model"), "target is 'model'; allowed"),
        (dict(estimator="sampled", mask="zero"), "'drop' by definition"),
        (dict(estimator="gradient", target="teacher"), "zero everywhere"),
        (dict(estimator="sampled", num_samples=0), "num_samples is 0"),
        (dict(estimator="sampled", keep_ratio=1.5), "keep_ratio is 1.5"),
    ],
)
def test_misuse(options, message):
    model = numpy_model(dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3))
    with pytest.raises(InputError, match=message):
        token_impact(model, jnp.zeros((1, 16, 16, 3)), jnp.zeros(1, jnp.int32), **options)
    with pytest.raises(InputError, match="target 'label' needs labels"):
        token_impact(model, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(InputError, match=r"classes 0\.\.2"):
        token_impact(model, jnp.zeros((1, 16, 16, 3)), jnp.array([3]))


@pytest.mark.parametrize(
    ("dtype", "estimator"),
    mostly_long([(dtype, estimator) for dtype in ("float32", "bfloat16") for estimator in ESTIMATORS], (0, 1, 2, 3)),
)
def test_float32_is_not_rounded_before_products(estimator, dtype):
    """In the program as it goes to the compiler: what JAX leaves to the device, TPUs do in bfloat16 and GPUs in TF32."""
    model = numpy_model(dict(image_size=16, patch_size=8, width=8, depth=2, num_heads=2, num_classes=3, dtype=dtype))
    options = check_options(estimator, None, "label", 2, 0.5) | {"seed": 0}
    graphdef, params = nnx.split(model)
    program = jax.jit(lambda *given: shared_scores(nnx.merge(graphdef, given[0]), *given[1:], **options)).lower(
        params, jnp.zeros((2, 16, 16, 3)), {"label": jnp.zeros(2, jnp.int32)}
    )
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", program.as_text())
    exact = ["HIGHEST" in product for product in products]
    assert len(products) > 10 and all(exact) == any(exact) == (dtype == "float32")
