"""Evo-ViT against its specification's pseudocode, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, mostly_long, numpy_images, numpy_model, row_of, whole_cost_of
from flax import nnx

from tif_jax.errors import InputError
from tif_jax.models import create_model
from tif_jax.reducers.evo_vit import EvoVit
from tif_jax.tokens import QueryKey, put, take

TINY = dict(image_size=32, patch_size=8, width=32, depth=6, num_heads=2, num_classes=5)
EVERYTHING = dict(pool="mean", distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.7)


def lively(model, seed=3):
    """Random weights under which attention is far from uniform, so that rankings have no near ties."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [jnp.asarray(np.asarray(p) + 0.2 * rng.standard_normal(p.shape), p.dtype) for p in leaves]
    nnx.update(model, jax.tree.unflatten(tree, noisy))
    return model


def images(num=3, size=(32, 32), seed=0):
    return numpy_images(num, size, seed)


def class_attention_of(qk, num_special):
    """Of one image: the sum over heads, as the official code has it, of the class token's row without special columns."""
    query, key = np.asarray(qk.query, np.float64)[0], np.asarray(qk.key, np.float64)[0]
    total = 0
    for head in range(query.shape[1]):
        logits = key[:, head] @ query[0, head] / np.sqrt(query.shape[2])
        weights = np.exp(logits - logits.max())
        total = total + weights / weights.sum()
    return total[num_special:]


def evolve(model, x, keep_ratio, stages, representative):
    """The specification's pseudocode for one image x (T, D), token by token; blocks are black boxes of two halves."""
    front, num_patches = model.num_special, len(x) - model.num_special
    num_slow = max(1, int(np.floor(num_patches * keep_ratio)))
    margins, g, slow = [], None, None
    for start, stop in zip((0, *stages), (*stages, model.depth), strict=True):
        if start == 0:
            slow = list(range(num_patches))
        else:
            order = sorted(range(num_patches), key=lambda j: -g[j])
            slow = sorted(order[:num_slow])
            margins.append(g[order[num_slow - 1]] / g[order[num_slow]] - 1)
        rest = [j for j in range(num_patches) if j not in slow]
        z = [x[i] for i in range(front)] + [x[front + j] for j in slow]
        with_representative = representative and start > 0
        if with_representative:
            total = sum(g[j] for j in rest)
            z.append(sum(g[j] / total * x[front + j] for j in rest))
        increment = 0
        for block in model.blocks[start:stop]:
            before = np.stack(z)[None].astype(np.float32)
            middle, qk = attend(block, jnp.asarray(before))
            after = np.asarray(feed_forward(block, middle))
            middle = np.asarray(middle)
            increment = increment + (middle - before)[0, -1] + (after - middle)[0, -1]
            a = class_attention_of(qk, front)
            if start == 0:
                g = a.copy()
            else:
                for row, j in enumerate(slow):
                    g[j] = (g[j] + a[row]) / 2
            z = list(after[0])
        x = x.copy()
        x[:front] = z[:front]
        for row, j in enumerate(slow):
            x[front + j] = z[front + row]
        if with_representative:
            for j in rest:
                x[front + j] += increment
    return x, slow, min(margins)


@pytest.mark.parametrize(
    ("fields", "options", "stages"),
    mostly_long(
        [
            ({}, {}, (2, 4)),
            ({}, dict(stages=(2, 3, 4, 5), keep_ratio=0.3, representative=False), (2, 3, 4, 5)),
            (EVERYTHING | dict(image_size=(24, 40)), dict(stages=(1, 5)), (1, 5)),
        ],
        short=(2,),
    ),
)
def test_the_walk_of_the_specification(fields, options, stages):
    model = lively(numpy_model(TINY | fields, reducer="evo_vit", **options))
    x = embed(model, images(2, size=model.image_size))
    out, aux = jax.jit(lambda x: model.encode(x))(x)
    num_patches = model.grid[0] * model.grid[1]
    for b in range(len(x)):
        expected, slow, margin = evolve(
            model, np.asarray(x[b]), options.get("keep_ratio", 0.5), stages, options.get("representative", True)
        )
        assert margin > 1e-4  # the ranking does not hang on rounding
        np.testing.assert_allclose(out[b], expected, atol=2e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(aux["kept"][b], slow)
    np.testing.assert_array_equal(aux["source"], np.tile(np.arange(num_patches), (len(x), 1)))
    assert aux["kept"].dtype == aux["source"].dtype == jnp.int32


@pytest.mark.parametrize("rngs", [None, 7])
def test_placeholders_move_by_one_vector_per_image_or_not_at_all(rngs):
    model = lively(numpy_model(TINY | dict(drop_path=0.3), reducer="evo_vit", stages=(2,)))
    x = embed(model, images())

    def walk(x, representative):
        draw = lambda: None if rngs is None else nnx.Rngs(rngs)  # noqa: E731
        dense, _ = model.blocks[0](x, model.tokens(len(x)), rngs=(stream := draw()))
        dense, _ = model.blocks[1](dense, model.tokens(len(x)), rngs=stream)
        return dense, *EvoVit(stages=(2,), representative=representative)(model.blocks, x, model.tokens(len(x)), draw())

    both = jax.jit(lambda x: [walk(x, representative) for representative in (False, True)])
    for representative, found in zip((False, True), jax.device_get(both(x)), strict=True):
        dense, out, aux = found
        for b in range(len(x)):
            rest = 1 + np.setdiff1d(np.arange(16), aux["kept"][b])
            moved = np.asarray(out[b] - dense[b])[rest]
            if representative:
                assert np.abs(moved).max() > 0.1
                np.testing.assert_allclose(
                    moved, np.broadcast_to(moved[:1], moved.shape), atol=1e-5 * np.abs(out).max()
                )
            else:
                np.testing.assert_array_equal(moved, 0)


def test_order_of_patches_does_not_matter_without_positions():
    model = lively(numpy_model(TINY | dict(pool="mean"), reducer="evo_vit"))
    x = embed(model, images())
    order = jax.random.permutation(jax.random.key(1), 16)
    call = jax.jit(lambda x: model.encode(x))
    out, aux = call(x)
    permuted, permuted_aux = call(jnp.concatenate([x[:, :1], x[:, 1:][:, order]], axis=1))
    np.testing.assert_allclose(permuted[:, 1:], out[:, 1:][:, order], atol=1e-3)
    np.testing.assert_array_equal(np.sort(np.asarray(order)[permuted_aux["kept"]], axis=1), aux["kept"])


class Straight:
    """A block whose class token attends to patch j by exp(logits[j]) and whose tokens all grow by `step`."""

    def __init__(self, logits, step=0.0):
        self.logits, self.step = logits, step

    def __call__(self, x, tokens, key_log_weight=None, rngs=None):
        logits = jnp.zeros(x.shape[:2]).at[:, 1 : 1 + len(self.logits)].set(self.logits[None])
        query = jnp.ones((*x.shape[:2], 1, 1))
        return x + self.step, QueryKey(query, logits[:, :, None, None])


def walk_straight(x, *blocks, **options):
    return jax.jit(lambda x: EvoVit(**options)(blocks, x, row_of(x, num_special=1), None))(x)


@pytest.mark.long
def test_weights_and_ranking_pass_no_gradient():
    x = jax.random.normal(jax.random.key(0), (1, 7, 4))

    class Square(Straight):  # the representative's increment depends on the representative
        def __call__(self, x, tokens, key_log_weight=None, rngs=None):
            y, qk = super().__call__(x, tokens)
            return y**2, qk

    def last(logits, x):
        return walk_straight(x, Straight(logits), Square(jnp.zeros(3)), stages=(1,))[0]

    logits = jnp.asarray([0.0, 3.0, 1.0, 2.0, -1.0, 0.5])
    assert not np.allclose(last(logits, x), last(logits.at[0].add(0.3), x))
    by_logits, by_x = jax.grad(lambda *args: last(*args).sum(), argnums=(0, 1))(logits, x)
    np.testing.assert_array_equal(by_logits, 0)
    # Slow: 1, 2, 3. The others: x_j + r^2 - r with r = sum_i w_i x_i, thrice.
    weight = np.exp(np.asarray(logits))[[0, 4, 5]]
    weight = weight / weight.sum()
    rest = np.asarray(x)[0, [1, 5, 6]]
    expected = 1 + 3 * weight[:, None] * (2 * weight @ rest - 1)[None]
    np.testing.assert_allclose(by_x[0, [1, 5, 6]], expected, rtol=1e-5)


def test_attention_of_zero_to_all_placeholders_is_no_nan():
    x = jax.random.normal(jax.random.key(0), (1, 7, 4))
    logits = jnp.asarray([0.0, -1e4, -1e4, 0.0, 0.0, -1e4])
    out, aux = walk_straight(x, Straight(logits), Straight(jnp.zeros(3), 1.5), stages=(1,))
    np.testing.assert_array_equal(aux["kept"], [[0, 3, 4]])
    np.testing.assert_allclose(out, x + 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("keep_ratio", "num_patches", "num_slow"), [(0.5, 49, 24), (0.5, 9, 4), (0.5, 16, 8), (0.05, 9, 1)]
)
def test_number_of_slow_tokens_is_rounded_down(keep_ratio, num_patches, num_slow):
    x, flat = np.ones((1, 1 + num_patches, 4), np.float32), Straight(np.zeros(1, np.float32))
    aux = jax.eval_shape(lambda x: walk_straight(x, flat, flat, stages=(1,), keep_ratio=keep_ratio)[1], x)
    assert aux["kept"].shape == (1, num_slow)


@pytest.mark.parametrize(("depth", "stages"), [(12, (4, 8)), (3, (1, 2)), (2, (1,))])
def test_default_stages(depth, stages):
    def tokens(**options):
        fields = TINY | dict(depth=depth)
        return cost_of(fields, reducer="evo_vit", **options).tokens

    assert tokens() == tokens(stages=stages) == (17,) * stages[0] + (10,) * (depth - stages[0])


@pytest.mark.parametrize(
    ("name", "published", "with_representative"),
    mostly_long(
        [
            ("deit_tiny_patch16_224", 0.818, 0.822),
            ("deit_small_patch16_224", 3.033, 3.049),
            ("deit_base_patch16_224", 11.658, 11.717),
        ],
        short=(1,),
    ),
)
def test_published_cost(name, published, with_representative):
    for representative, gmac in ((False, published), (True, with_representative)):
        counted = whole_cost_of(name, reducer="evo_vit", representative=representative)
        # Published without the class attention and the representative's making.
        assert counted.gmac == pytest.approx(gmac, abs=0.0015)
        assert counted.tokens == (197,) * 4 + (99 + representative,) * 8


@pytest.mark.long
def test_bfloat16_stays_bfloat16_and_near():
    model = lively(numpy_model(TINY | EVERYTHING, reducer="evo_vit"))
    x = embed(model, images())
    half = lively(numpy_model(TINY | EVERYTHING | dict(dtype="bfloat16"), reducer="evo_vit"))
    out, _ = jax.jit(lambda x: half.encode(x))(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and np.isfinite(out.astype(jnp.float32)).all()
    exact = model.encode(x)[0]
    assert jnp.abs(out.astype(jnp.float32) - exact).mean() < 0.1 * jnp.abs(exact).mean()


def test_strict_dtypes_in_training(strict_dtypes):
    model = numpy_model(TINY | dict(drop_path=0.1), reducer="evo_vit")
    jax.eval_shape(lambda x: model(x, nnx.Rngs(0)), images())


def test_put_undoes_take():
    x = jax.random.normal(jax.random.key(0), (2, 6, 3))
    index = jnp.asarray([[1, 2, 5], [0, 3, 4]])
    np.testing.assert_array_equal(put(x, index, take(x, index)), x)
    changed = np.asarray(put(x, index, 1 + take(x, index)) - x)
    assert (np.abs(changed).max(axis=-1) > 0.5).astype(int).tolist() == [[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]]
    np.testing.assert_array_equal(put(x[..., 0], index, take(x[..., 0], index)), x[..., 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(stages=()), r"stages is \(\); it lists"),
        (dict(stages=(0, 4)), r"stages is \(0, 4\); it lists block indices, at least 1"),
        (dict(stages=(4, 2)), r"stages is \(4, 2\)"),
        (dict(sites=(4, 8)), "takes keep_ratio, stages, num_kept, representative; got sites"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="evo_vit", **options)


def test_misuse_that_only_the_model_shows():
    model = numpy_model(TINY, reducer="evo_vit", stages=(2, 6))
    with pytest.raises(InputError, match=r"stages is \(2, 6\); the model has blocks 0..5"):
        jax.eval_shape(lambda x: model(x), images())
    model = numpy_model(TINY | dict(pool="mean", class_token=False), reducer="evo_vit")
    with pytest.raises(InputError, match="attention of the class token; this model has none"):
        jax.eval_shape(lambda x: model(x), images())
