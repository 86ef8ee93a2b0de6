"""DynamicViT's two forms against a slow walk written from its description, against each other, and its gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mostly_long, numpy_images, numpy_model, whole_cost_of
from flax import nnx
from reference_dynamic_vit import (
    DEPTH,
    HEADS,
    SITES,
    double,
    gathering_reference,
    linear,
    masked_attention,
    masking_reference,
    norm,
)

from tif_jax import reducers
from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model
from tif_jax.models.cost import cost
from tif_jax.models.grids import to_grid
from tif_jax.models.params import params_of
from tif_jax.reducers import dynamic_vit
from tif_jax.tokens import raster_tokens, top_k

TINY = dict(image_size=32, patch_size=8, width=16, depth=DEPTH, num_heads=HEADS, mlp_dim=32, num_classes=5)
SPECIAL = TINY | dict(distillation_token=True, num_registers=2, pool="mean", qk_norm=True, layer_scale=0.3)
KEY = jax.random.key(5)


def images(num=3, seed=0):
    return numpy_images(num, (32, 32), seed)


@functools.cache
def lively(special=False, dtype="float32"):
    """A model whose attention differs between patches and whose predictors know what they want."""
    model = numpy_model(
        (SPECIAL if special else TINY) | dict(dtype=dtype), reducer="dynamic_vit", keep_ratio=0.7, sites=SITES
    )
    params = {name: of_part for name, of_part in params_of(model).items() if name != "reducer"}
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p) * (4 if p.ndim == 2 else 1)), params)
    nnx.update(model, params)
    return model


def run(model, x, key=None):
    """Tokens after the last block, logits and aux; the masking form with a key."""

    def forward(x):
        tokens, aux = model.encode(model.embed(x), None if key is None else nnx.Rngs(key))
        return tokens, *model.predict(tokens, aux)

    return jax.tree.map(np.asarray, jax.jit(forward)(x))


def noises():
    """The Gumbel noise of the sites under KEY, (site, image, patch, 2)."""
    rngs = nnx.Rngs(KEY)
    return np.stack([jax.random.gumbel(rngs.keep_decisions(), (3, 16, 2)) for _ in SITES]).astype(np.float64)


def embedded(model, x):
    return np.asarray(jax.jit(model.embed)(x), np.float64)


def test_masking_against_the_reference():
    model, x = lively(), images()
    tokens, _, aux = run(model, x, KEY)
    params, noise = double(params_of(model)), noises()
    assert (
        tokens.shape == (3, 17, 16) and set(aux) == {"mask", "source", "loss/ratio"} and aux["mask"].dtype == np.float32
    )
    for b, row in enumerate(embedded(model, x)):
        expected, mask, ratio = masking_reference(params, row, noise[:, b])
        np.testing.assert_array_equal(aux["mask"][b], mask)
        np.testing.assert_allclose(tokens[b], expected, atol=2e-4)
        np.testing.assert_allclose(aux["loss/ratio"][b], ratio, rtol=1e-5)
    assert 0 < aux["mask"].mean() < 1 and len(np.unique(aux["mask"], axis=0)) == 3


def test_gathering_against_the_reference():
    model, x = lively(), images()
    tokens, logits, aux = run(model, x)
    params = double(params_of(model))
    assert set(aux) == {"kept", "source"} and aux["kept"].dtype == aux["source"].dtype == np.int32
    for b, row in enumerate(embedded(model, x)):
        expected, kept = gathering_reference(params, row)
        assert len(kept) == 7
        np.testing.assert_array_equal(aux["kept"][b], kept)
        rows = {position: place for place, position in enumerate(kept.tolist())}
        np.testing.assert_array_equal(aux["source"][b], [rows.get(n, -1) for n in range(16)])
        np.testing.assert_allclose(tokens[b], expected, atol=2e-4)
        head = linear(params["head"], norm(params["norm"], expected[0], 1e-6))
        np.testing.assert_allclose(logits[b], head, atol=1e-4)


@pytest.mark.parametrize("special", mostly_long([False, True], short=(1,)))
def test_masked_tokens_are_as_good_as_gone(special, monkeypatch):
    """The masking form, made to keep what the gathering form keeps, computes the same for those and the special tokens."""
    model, x = lively(special), images()
    gathered, logits, aux = run(model, x)
    numbers, left = iter((11, 7)), [jnp.ones((3, 16))]

    def best(log_probs, noise):
        kept = top_k(jnp.where(left[-1] > 0, log_probs[..., 0], -jnp.inf), next(numbers))
        left.append(jnp.zeros((3, 16)).at[jnp.arange(3)[:, None], kept].set(1.0))
        return left[-1]

    monkeypatch.setattr(dynamic_vit, "decide", best)
    masked, masked_logits, masked_aux = run(model, x, KEY)
    np.testing.assert_array_equal(masked_aux["mask"], aux["source"] >= 0)
    # On the raster, as a dense head reads them: what is gone is filled from the same neighbours.
    (full, few), tokens = (masked, gathered), model.tokens(3)
    grids = [
        to_grid(jnp.asarray(of), tokens._replace(source=jnp.asarray(said["source"])))
        for of, said in ((full, masked_aux), (few, aux))
    ]
    np.testing.assert_allclose(grids[0], grids[1], atol=1e-4)
    num = model.num_special
    rows = np.concatenate([np.tile(np.arange(num), (3, 1)), num + aux["kept"]], axis=1)
    np.testing.assert_allclose(np.take_along_axis(masked, rows[..., None], axis=1), gathered, atol=1e-4)
    np.testing.assert_allclose(masked_logits, logits, atol=1e-4)


def test_decisions_are_drawn_by_their_probability_and_pass_the_relaxed_gradient():
    log_probs = jnp.log(jnp.asarray([[[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]]))
    noise = jax.random.gumbel(KEY, (1, 3, 2))
    many = jax.random.gumbel(KEY, (4000, 3, 2))
    drawn = dynamic_vit.decide(jnp.broadcast_to(log_probs, many.shape), many)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.mean(axis=0), [0.2, 0.9, 0.5], atol=5 * 0.5 / 4000**0.5)
    gradient = jax.grad(lambda p: dynamic_vit.decide(p, noise).sum())(log_probs)
    keep, drop = np.moveaxis(np.asarray(log_probs + noise, np.float64), 2, 0)
    soft = 1 / (1 + np.exp(drop - keep))
    slope = soft * (1 - soft)
    np.testing.assert_allclose(gradient, np.stack([slope, -slope], axis=2), rtol=1e-3)


def test_masked_attention_and_its_gradient_where_the_mask_is_0():
    """What a dropped token would change if it came back: the slope that log(0) does not have."""
    layer = lively().block_0.attention
    x = np.asarray(jax.random.normal(KEY, (2, 6, 16)))
    mask = np.array([[1, 0, 1, 0.3, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32)
    direction = np.random.default_rng(0).normal(size=x.shape)

    def ours(mask):
        tokens = raster_tokens(2, 0, (2, 3), has_class=False)
        return (layer(jnp.asarray(x), tokens, key_weight=mask)[0] * direction.astype(np.float32)).sum(axis=(1, 2))

    def reference(mask):
        p, total = double(nnx.to_pure_dict(nnx.state(layer, nnx.Param))), []
        for b in range(2):
            parts = np.split(linear(p["qkv"], x[b].astype(np.float64)), 3, axis=1)
            heads = [masked_attention(*(part[:, h : h + 8] for part in parts), mask[b]) for h in (0, 8)]
            total.append((linear(p["out"], np.concatenate(heads, axis=1)) * direction[b]).sum())
        return np.array(total)

    value, slope = jax.jit(lambda mask: (ours(mask), jax.grad(lambda mask: ours(mask).sum())(mask)))(mask)
    np.testing.assert_allclose(value, reference(mask), rtol=1e-3, atol=1e-4)
    expected = np.zeros_like(mask)
    for n in range(6):
        step = np.zeros_like(mask, np.float64)
        step[:, n] = 1e-5
        expected[:, n] = (reference(mask + step) - reference(mask - step)) / 2e-5
    assert abs(expected[mask == 0]).min() > 1e-3
    np.testing.assert_allclose(slope, expected, rtol=5e-3, atol=1e-3)


def test_gradient_through_a_relaxed_walk_against_finite_differences(monkeypatch):
    """Through masks into all predictors: the one of site 1 acts on what site 2 decides."""
    relaxed = lambda log_probs, noise: jax.nn.softmax(log_probs + noise)[..., 0]  # noqa: E731
    monkeypatch.setattr(dynamic_vit, "decide", relaxed)
    model, x, noise = lively(), images(), noises()
    graphdef, state = nnx.split(model)
    rows = embedded(model, x)
    weight = np.random.default_rng(1).normal(size=(17, 16))

    def loss(state):
        model = nnx.merge(graphdef, state)
        tokens, aux = model.encode(jnp.asarray(rows, jnp.float32), nnx.Rngs(KEY))
        return (tokens * weight[None].astype(np.float32)).sum() + 100 * aux["loss/ratio"].sum()

    gradient = double(nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))["reducer"])
    assert all(abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    params, rng = double(params_of(model)), np.random.default_rng(2)
    for site in SITES:
        predictor = f"predictor_{site}"
        step = jax.tree.map(lambda p: 1e-5 * rng.normal(size=p.shape), params["reducer"][predictor])

        def value(sign, predictor=predictor, step=step):
            moved = jax.tree.map(lambda p, s: p + sign * s, params["reducer"][predictor], step)
            moved = params | {"reducer": params["reducer"] | {predictor: moved}}
            walks = [masking_reference(moved, row, noise[:, b], relaxed=True) for b, row in enumerate(rows)]
            return sum((tokens * weight).sum() + 100 * ratio for tokens, _, ratio in walks)

        along = jax.tree.map(lambda g, s: (g * s).sum(), gradient[predictor], step)
        np.testing.assert_allclose(sum(jax.tree.leaves(along)), (value(1) - value(-1)) / 2, rtol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_losing_every_patch_is_no_nan(dtype, pool):
    model = create_model(TINY | dict(dtype=dtype, pool=pool), reducer="dynamic_vit", keep_ratio=0.5)
    graphdef, params = nnx.split(model)
    for site in range(3):
        params["reducer"][f"predictor_{site}"]["layer_2"]["bias"].set_value(jnp.asarray([-50.0, 50.0]))

    def loss(params):
        prediction, aux = nnx.merge(graphdef, params)(images(), nnx.Rngs(KEY))
        return prediction.var() + aux["loss/ratio"].sum() + aux["mask"].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(g).all() for g in (value, *jax.tree.leaves(nnx.to_pure_dict(grads))))


@pytest.mark.long
def test_drop_path_draws_as_in_the_plain_model():
    fields = TINY | dict(drop_path=0.5)
    model, full = create_model(fields, reducer="dynamic_vit", keep_ratio=1.0), create_model(fields)
    nnx.update(model, params_of(full))
    call = lambda model: jax.jit(lambda key: model(images(), nnx.Rngs(key)))(jax.random.key(7))  # noqa: E731
    (logits, aux), expected = call(model), call(full)[0]
    np.testing.assert_array_equal(logits, expected)
    assert (aux["mask"] == 1).all() and (aux["loss/ratio"] == 0).all()


def test_strict_dtypes(strict_dtypes):
    model = lively()
    jax.eval_shape(lambda x: model(x, nnx.Rngs(KEY)), images())


def left_at(**options):
    """The number of patch tokens that leave each block of a model with 4 blocks and 16 patches, and its predictors."""
    model = nnx.eval_shape(blueprint(TINY | dict(depth=4), reducer="dynamic_vit", **options), jax.random.key(0))
    names = sorted(params_of(model).get("reducer", {}))
    return [n - 1 for n in cost(model).tokens], [int(name.removeprefix("predictor_")) for name in names]


@pytest.mark.parametrize(
    ("options", "left", "predictors"),
    [
        (dict(), [16, 11, 7, 5], [1, 2, 3]),  # 11.2, 7.84, 5.488: of the original 16, floor
        (dict(keep_ratio=(0.5, 1.0, 0.25), sites=(0, 1, 3)), [8, 8, 8, 2], [0, 1, 3]),
        (dict(keep_ratio=0.01), [16, 1, 1, 1], [1, 2, 3]),
        (dict(keep_ratio=1.0), [16] * 4, [1, 2, 3]),
        (dict(num_kept=(9, 5), sites=(1, 3)), [16, 9, 9, 5], [1, 3]),
        (dict(num_kept=(16, 9, 9, 4)), [16, 9, 9, 4], [1, 3]),  # per block: a predictor where the number falls
        (dict(num_kept=(99, 40, 30, 4)), [16, 16, 16, 4], [3]),
    ],
)
def test_schedules(options, left, predictors):
    assert left_at(**options) == (left, predictors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(keep_ratio=(0.5, 0.5), sites=(1,)), "2 entries for 1 sites"),
        (dict(sites=(2, 3)), r"sites is \(2, 3\); the model has blocks 0..2"),
        (dict(num_kept=(4, 2), sites=(1,)), "num_kept has 2 entries for 1 sites and 3 blocks"),
        (dict(ratio_weight=-1.0), "ratio_weight is -1.0"),
        (dict(rho=0.7), "takes keep_ratio, sites, num_kept, ratio_weight; got rho"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message) as error:
        create_model(TINY, reducer="dynamic_vit", **options)
    assert "\n" not in str(error.value)


def test_options_can_be_checked_without_a_model():
    reducers.build("dynamic_vit", width=2, num_patches=4, rngs=nnx.Rngs(0), sites=(30,))
    with pytest.raises(InputError, match="keep_ratio is 2"):
        reducers.build("dynamic_vit", width=2, num_patches=4, rngs=nnx.Rngs(0), keep_ratio=2.0)


@pytest.mark.parametrize(
    ("fields", "keep_ratio", "published"),
    mostly_long(
        [
            ("deit_small_patch16_224", 0.7, 2.9),
            ("deit_base_patch16_224", 0.7, 11.4),
            (dict(width=256, num_heads=4), 0.7, 1.3),
            ("deit_small_patch16_224", 0.8, 3.4),
            ("deit_small_patch16_224", 0.9, 4.0),
        ],
        short=(),
    ),
)
def test_published_cost(fields, keep_ratio, published):
    """Every published figure is our count cut after the first decimal, predictors included."""
    counted = whole_cost_of(fields, reducer="dynamic_vit", keep_ratio=keep_ratio)
    assert math.floor(10 * counted.gmac) / 10 == published


def test_cost_is_the_blocks_and_the_predictors():
    counted = whole_cost_of("deit_small_patch16_224", reducer="dynamic_vit")
    width = 384
    predictors = sum(n * (width**2 + width * width // 2 + width * width // 8 + width // 2) + n * width // 2
                     for n in (196, 137, 96))  # fmt: skip
    blocks = sum(3 * (12 * n * width**2 + 2 * n**2 * width) for n in (197, 138, 97, 68))
    assert counted.tokens == tuple(n for n in (197, 138, 97, 68) for _ in range(3))
    assert counted.gmac * 1e9 == pytest.approx(196 * 768 * width + blocks + predictors + 1000 * width, rel=1e-9)
    assert counted.gmac == pytest.approx(2.981, abs=0.001)
