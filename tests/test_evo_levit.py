"""Evo-LeViT against its specification's pseudocode, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, feed_forward, lively, mostly_long, numpy_images, row_of
from flax import nnx
from test_evo_vit import class_attention_of

from tif_jax.errors import InputError
from tif_jax.models import blueprint
from tif_jax.models.params import params_of
from tif_jax.reducers.evo_levit import EvoLevit
from tif_jax.tokens import QueryKey

VIT = dict(image_size=32, patch_size=8, width=16, depth=4, num_heads=2, num_classes=5)
LEVIT = dict(family="levit", image_size=(64, 80), widths=(16, 24), depths=(3, 2), num_heads=(2, 3), key_dim=8,
             num_classes=5, positions="absolute", class_token=True)  # fmt: skip
PYRAMID = dict(widths=(16, 24, 32), depths=(3, 2, 2), num_heads=(2, 3, 4))


def images(size, num=2):
    return numpy_images(num, size)


def walk(model, x, keep_ratio=0.5, layer_wise=False, representative=True):
    """The specification for one image x (T, D), token by token; blocks are black boxes of two halves."""
    shares = 1 / (1 + np.exp(-np.asarray(model.reducer.theta[...], np.float64)))
    blocks, (rows, columns) = model.blocks, model.grid
    at = [(r, c) for r in range(rows) for c in range(columns)]  # where in the input raster each patch token lies
    margins, g, slow, stage_begins, first_stage = [], None, None, False, True
    for i, block in enumerate(blocks):
        if hasattr(block, "stride"):
            middle, qk = attend(block, np.asarray(x, np.float32)[None])
            x = np.asarray(feed_forward(block, middle))[0]
            shown = [j for j in range(len(at)) if (j // columns) % 2 == 0 and (j % columns) % 2 == 0]
            a, total = class_attention_of(qk, 1) / qk.query.shape[2], g.sum()
            g = np.array([(1 - shares[i]) * g[j] + shares[i] * a[j] for j in shown])
            g = g * total / g.sum()
            at = [at[j] for j in shown]
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
            stage_begins, first_stage = True, False
            continue
        dense = first_stage and i < 2
        if dense:
            slow = list(range(len(at)))
        elif stage_begins or layer_wise or (first_stage and i == 2):
            num_slow = max(1, int(np.floor(len(at) * keep_ratio)))
            order = sorted(range(len(at)), key=lambda j: -g[j])
            slow = sorted(order[:num_slow])
            margins.append(g[order[num_slow - 1]] / g[order[num_slow]] - 1)
        rest = [j for j in range(len(at)) if j not in slow]
        begins = dense or stage_begins or layer_wise or (first_stage and i == 2)
        stage_begins = False
        z = [x[0]] + [x[1 + j] for j in slow]
        if rest and representative:
            if begins:
                stand_in = sum(g[j] * x[1 + j] for j in rest) / sum(g[j] for j in rest)
            z.append(stand_in)
        before = np.stack(z)[None].astype(np.float32)
        middle, qk = attend(block, before)
        after = np.asarray(feed_forward(block, middle))
        a = class_attention_of(qk, 1) / qk.query.shape[2]  # the mean over heads
        g = a.copy() if g is None else g.copy()
        for row, j in enumerate(slow):
            g[j] = (1 - shares[i]) * g[j] + shares[i] * a[row]
        x = x.copy()
        x[0] = after[0, 0]
        for row, j in enumerate(slow):
            x[1 + j] = after[0, 1 + row]
        if rest and representative:
            for j in rest:
                x[1 + j] += (np.asarray(middle) - before)[0, -1] + (after - np.asarray(middle))[0, -1]
            stand_in = after[0, -1]
    return x, [at[j] for j in slow], min(margins)


@pytest.mark.parametrize(
    ("fields", "options"),
    mostly_long(
        [
            (LEVIT, {}),
            (LEVIT | PYRAMID, dict(keep_ratio=0.3, layer_wise=True)),
            (LEVIT | dict(depths=(1, 2)), dict(keep_ratio=0.7, representative=False)),
            (VIT, dict(layer_wise=True)),
        ]
    ),
)
def test_the_walk_of_the_specification(fields, options):
    model = lively(fields, reducer="evo_levit", **options)
    x = jax.jit(lambda images: model.embed(images))(images(model.image_size))
    out, aux = jax.jit(lambda x: model.encode(x))(x)
    for b in range(len(x)):
        expected, slow, margin = walk(model, np.asarray(x[b]), **options)
        assert margin > 1e-4  # the ranking does not hang on rounding
        np.testing.assert_allclose(out[b], expected, atol=1e-4 * np.abs(expected).max())
        assert [divmod(int(i), model.grid[1]) for i in aux["kept"][b]] == slow
    assert aux["kept"].dtype == aux["source"].dtype == jnp.int32


def test_keeping_everything_is_the_dense_model_bit_for_bit():
    dense, reduced = lively(LEVIT), lively(LEVIT, reducer="evo_levit", keep_ratio=1.0)
    own = params_of(reduced)
    assert own.pop("reducer")["theta"].shape == (6,)
    assert jax.tree.structure(own) == jax.tree.structure(params_of(dense))
    nnx.update(reduced, params_of(dense))
    x = images((64, 80))
    logits, aux = jax.jit(lambda x: reduced(x))(x)
    np.testing.assert_array_equal(logits, jax.jit(lambda x: dense(x)[0])(x))
    np.testing.assert_array_equal(aux["kept"], np.tile([0, 2, 4, 10, 12, 14], (2, 1)))
    np.testing.assert_array_equal(
        aux["source"][0].reshape(4, 5), [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [3, 3, 4, 4, 5]]
    )


class Straight:
    """A block whose class token attends to patch j by exp(logits[j]); its tokens are squared."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, x, tokens, key_log_weight=None, rngs=None):
        logits = jnp.zeros(x.shape[:2]).at[:, 1 : 1 + len(self.logits)].set(self.logits[None])
        return x**2, QueryKey(jnp.ones((*x.shape[:2], 1, 1)), logits[:, :, None, None])


class Shrink(Straight):
    """Leaves every second patch of a row."""

    stride = 2

    def __call__(self, x, tokens, key_log_weight=None, rngs=None):
        _, qk = super().__call__(x, tokens)
        return jnp.concatenate([x[:, :1], self.subsample(x[:, 1:])], axis=1), qk

    def subsample(self, rows):
        return rows[:, ::2]


def evolve(x, theta, *blocks, **options):
    reducer = EvoLevit(depth=len(blocks), **options)
    reducer.theta[...] = theta
    return reducer(blocks, x, row_of(x, num_special=1), None)


def test_loss_reaches_theta_and_attention_through_the_weights_alone():
    x = jax.random.normal(jax.random.key(0), (1, 9, 4))
    theta, logits = jnp.asarray([5.0, 0.3, -0.4, 0.0]), jnp.asarray([0.0, 3.0, 1.0, 2.0, -1.0, 0.5, 2.5, 0.2])
    flat = jnp.zeros(1)

    def placeholders(theta, logits, x):  # of the first patches after the shrink block, 2 of 4 are slow
        out, aux = evolve(x, theta, Straight(logits), Straight(flat), Shrink(logits), Straight(flat))
        return out[0, 1:], aux["kept"]

    jitted = jax.jit(jax.value_and_grad(lambda *args: placeholders(*args)[0].sum(), argnums=(0, 1)))
    _, (by_theta, by_logits) = jitted(theta, logits, x)
    assert (by_theta[1:3] != 0).all() and by_logits.any()
    np.testing.assert_array_equal(by_theta[jnp.asarray([0, 3])], 0)  # nothing to average with; nobody asks afterwards

    # By hand: the score after three blocks, the shrunk one of unchanged sum, and the placeholders' common increment.
    share = 1 / (1 + np.exp(-np.asarray(theta)))
    attention = lambda z: np.exp(z) / (1 + np.exp(z).sum())  # noqa: E731  (1: the class token's own logit is 0)
    score = (1 - share[1]) * attention(np.asarray(logits)) + share[1] * np.full(8, 1 / 9)
    shrunk = ((1 - share[2]) * score + share[2] * attention(np.asarray(logits)))[::2]
    shrunk = shrunk * score.sum() / shrunk.sum()
    out, kept = jax.jit(placeholders)(theta, logits, x)
    rows = (np.asarray(x)[0, 1:] ** 4)[::2]
    rest = np.argsort(shrunk)[:2]
    assert sorted(2 * np.argsort(shrunk)[2:]) == kept[0].tolist()
    weight = shrunk[rest] / shrunk[rest].sum()
    stand_in = weight @ rows[rest]
    np.testing.assert_allclose(out[rest], rows[rest] + stand_in**2 - stand_in, rtol=1e-4)


# Parameters in millions, multiply-adds in millions: computed from the authors' code.


@pytest.mark.parametrize(
    ("name", "size", "parameters", "mmac"),
    mostly_long(
        [
            ("128s", 224, 7.84, 256), ("128", 224, 9.27, 305), ("192", 224, 11.03, 510), ("256", 224, 19.01, 880),
            ("384", 224, 39.30, 1849), ("128s", 384, 7.96, 825), ("128", 384, 9.39, 984), ("192", 384, 11.21, 1654),
            ("256", 384, 19.24, 2763), ("384", 384, 39.64, 5622),
        ],
        short=(1,),
    ),
)  # fmt: skip
def test_published_cost(name, size, parameters, mmac):
    counted = cost_of(f"evo_levit_{name}", reducer="evo_levit", image_size=size)
    assert counted.parameters / 1e6 == pytest.approx(parameters, abs=0.0051)
    assert counted.gmac * 1e3 == pytest.approx(mmac, rel=1e-3)
    if (name, size) == ("128", 224):  # class token, slow tokens and representative; a shrink block is dense
        assert counted.tokens == (197,) * 2 + (100,) * 2 + (50,) + (26,) * 4 + (17,) + (10,) * 4


def test_strict_dtypes_in_training(strict_dtypes):
    model = nnx.eval_shape(blueprint(LEVIT, reducer="evo_levit", drop_path=0.1), jax.random.key(0))
    graphdef, params = nnx.split(model)
    logits, _ = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x, nnx.Rngs(0)), params, images((64, 80)))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (VIT, dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (VIT, dict(stages=(1,)), "takes keep_ratio, layer_wise, representative; got stages"),
        (LEVIT | dict(positions="relative", class_token=False), {}, "EvoLevit needs a LeViT with class_token=True"),
        (LEVIT | dict(class_token=False), {}, "EvoLevit needs a LeViT with class_token=True"),
    ],
)
def test_misuse(fields, options, message):
    with pytest.raises(InputError, match=message):
        nnx.eval_shape(blueprint(fields, reducer="evo_levit", **options), jax.random.key(0))
