"""ToSA against its specification's pseudocode in numpy; the fitting of its selectors; its cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, call, cost_of, embed, feed_forward, mostly_long, numpy_images, numpy_model, whole_cost_of
from flax import nnx
from reference_tosa import attention_logits, predict, softmax, walk

from tif_jax.errors import InputError
from tif_jax.models import create_model
from tif_jax.models.params import params_of
from tif_jax.reducers.tosa import Tosa, _divergence
from tif_jax.tokens import at_rows
from tif_jax.training import losses

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)
EVERYTHING = dict(pool="mean", distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.7)
NO_CLASS = dict(pool="mean", class_token=False)


def lively(model, seed=3):
    """Random weights under which attention is far from uniform, so that rankings have no near ties."""
    leaves, tree = jax.tree.flatten(params_of(model))
    rng = np.random.default_rng(seed)
    noisy = [jnp.asarray(np.asarray(p) + 0.2 * rng.standard_normal(p.shape), p.dtype) for p in leaves]
    nnx.update(model, jax.tree.unflatten(tree, noisy))
    return model


@functools.cache
def tosa(fields=(), **options):
    return lively(numpy_model(TINY | dict(fields), reducer="tosa", **options))


@functools.cache
def encoder(fields=(), **options):
    model = tosa(fields, **options)
    return jax.jit(lambda x: model.encode(x))


def images(num=3, size=(32, 32), seed=0):
    return numpy_images(num, size, seed)


@pytest.mark.parametrize(
    ("fields", "options", "counts"),
    mostly_long(
        [
            ({}, dict(keep_ratio=0.5), {1: 8, 3: 8}),
            (EVERYTHING | dict(image_size=(24, 40)), dict(keep_ratio=(0.35, 0.7)), {1: 5, 3: 10}),
            (NO_CLASS, dict(layers=(2,), num_kept=(7,)), {2: 7}),
            ({}, dict(num_kept=(16, 16, 5, 16)), {2: 5}),
            (EVERYTHING, dict(selector="copy", keep_ratio=0.35), {1: 5, 3: 5}),
            (EVERYTHING, dict(selector="oracle", layers=(1, 3), keep_ratio=(1.0, 0.6)), {3: 9}),
            ({}, dict(selector="class"), {1: 12, 3: 12}),
            (dict(num_heads=16), dict(keep_ratio=0.5), {1: 8, 3: 8}),  # heads that are mixed by a product
        ],
        short=(1, 7),
    ),
)
def test_the_walk_of_the_specification(fields, options, counts):
    model = tosa(tuple(fields.items()), **options)
    x = embed(model, images(2, size=model.image_size))
    out, aux = encoder(tuple(fields.items()), **options)(x)
    for b in range(len(x)):
        expected, selected, margin = walk(model, np.asarray(x[b]), counts, options.get("selector", "learned"))
        assert margin > 1e-4  # the ranking does not hang on rounding
        np.testing.assert_allclose(out[b], expected, atol=2e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(aux["kept"][b], selected)
    np.testing.assert_array_equal(aux["source"], np.tile(np.arange(model.grid[0] * model.grid[1]), (len(x), 1)))
    assert aux["kept"].dtype == aux["source"].dtype == jnp.int32 and "loss/selector" not in aux


def test_an_untrained_selector_takes_the_next_maps_to_be_these():
    model = lively(numpy_model(TINY, reducer="tosa"))
    fresh = params_of(create_model(TINY, reducer="tosa"))["reducer"]
    assert all((np.asarray(fresh[f"selector_{i}"]["second"]["kernel"]) == 0).all() for i in (1, 3))
    nnx.update(model, {"reducer": fresh})
    copy = numpy_model(TINY, reducer="tosa", selector="copy")
    params = params_of(model)
    params.pop("reducer")
    nnx.update(copy, params)
    assert "reducer" not in params_of(copy)
    (out, aux), (expected, expected_aux) = (
        jax.jit(lambda x, m=m: m.encode(m.embed(x)))(images()) for m in (model, copy)
    )
    np.testing.assert_array_equal(aux["kept"], expected_aux["kept"])
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rngs", mostly_long([None, 7], short=(1,)))
def test_who_skips_stays_as_it_is(rngs):
    model = lively(numpy_model(TINY | dict(drop_path=0.3, depth=2), reducer="tosa", keep_ratio=0.5))

    @jax.jit
    def both(x):
        draw = lambda: None if rngs is None else nnx.Rngs(rngs)  # noqa: E731
        return model.blocks[0](x, model.tokens(len(x)), rngs=draw())[0], *model.encode(x, draw())

    dense, out, aux = map(jax.device_get, both(embed(model, images())))
    for b, kept in enumerate(aux["kept"]):
        skips = 1 + np.setdiff1d(np.arange(16), kept)
        np.testing.assert_array_equal(out[b, skips], dense[b, skips])
        if rngs is None:
            assert (np.abs(out[b, 1 + kept] - dense[b, 1 + kept]).max(axis=-1) > 0.1).all()


def test_order_of_patches_does_not_matter():
    model, encode = tosa(keep_ratio=0.5), encoder(keep_ratio=0.5)
    x, order = np.asarray(embed(model, images())), np.random.default_rng(1).permutation(16)
    out, aux = jax.device_get(encode(x))
    permuted, permuted_aux = jax.device_get(encode(np.concatenate([x[:, :1], x[:, 1:][:, order]], axis=1)))
    np.testing.assert_array_equal(np.sort(order[permuted_aux["kept"]], axis=1), aux["kept"])
    np.testing.assert_allclose(permuted[:, 1:], out[:, 1:][:, order], atol=1e-4 * np.abs(out).max())


def test_random_depends_on_seed_and_image_alone_unless_training():
    model = tosa(selector="random", layers=(3,), keep_ratio=0.5)
    x = embed(model, images())
    draw = jax.jit(lambda x, seed=0: model.reducer(model.blocks, x, model.tokens(len(x)))[1]["kept"])
    kept = np.asarray(draw(x))
    np.testing.assert_array_equal(draw(x[:2]), kept[:2])
    assert len(np.unique(kept, axis=0)) == 3
    train = jax.jit(lambda key: model.encode(x, nnx.Rngs(key))[1]["kept"])
    assert (train(jax.random.key(0)) != train(jax.random.key(1))).any()


@pytest.mark.long
def test_kept_follows_the_index():
    """Patch tokens that were picked before ToSA saw them."""
    model = tosa()
    index = jnp.tile(jnp.asarray([[1, 3, 4, 6, 9, 10, 14, 15]], jnp.int32), (3, 1))
    x, tokens = model.embed(images())[:, :9], model.tokens(3)
    walk = jax.jit(lambda x, index: model.reducer(model.blocks, x, at_rows(tokens, index))[1]["kept"])
    kept = walk(x, index)
    assert kept.shape == (3, 6) and np.isin(kept, index).all()


def test_fitting_runs_dense_and_measures_the_divergence():
    fields = EVERYTHING | dict(image_size=(24, 40))
    model = lively(numpy_model(TINY | fields, reducer="tosa", fitting=True))
    plain = numpy_model(TINY | fields)
    params = params_of(model)
    own = params.pop("reducer")
    nnx.update(plain, params)
    x = embed(model, images(2, size=(24, 40)))
    out, aux = jax.jit(lambda x: model.encode(x))(x)
    np.testing.assert_allclose(out, jax.jit(lambda x: plain.encode(x)[0])(x), atol=1e-5 * np.abs(out).max())
    for b in range(2):
        y, maps = x[b : b + 1], []
        for block in plain.blocks:
            middle, qk = attend(block, y)
            y = feed_forward(block, middle)
            maps.append(attention_logits(qk))
        divergences = []
        for i in (1, 3):
            target = softmax(maps[i])
            predicted = softmax(predict(own[f"selector_{i}"], maps[i - 1]))
            divergences += [
                np.sum(p * np.log(p / q)) for p, q in zip(np.vstack(target), np.vstack(predicted), strict=True)
            ]
        np.testing.assert_allclose(aux["loss/selector"][b], np.mean(divergences), rtol=1e-4)
    loss = losses.selector(None, aux, None)["loss"]  # reads no prediction
    np.testing.assert_array_equal(loss, aux["loss/selector"])


def test_divergence_is_zero_for_the_target_and_finite_for_any():
    logits, divergence = 50 * np.random.default_rng(0).standard_normal((2, 3, 5, 5), np.float32), jax.jit(_divergence)
    np.testing.assert_allclose(divergence(logits, logits + 7.0), 0, atol=1e-4)
    assert np.isfinite(divergence(100 * logits, -100 * logits)).all()


def test_fitting_teaches_the_selectors_and_nothing_else():
    fields = TINY | dict(depth=2)
    model = lively(numpy_model(fields, reducer="tosa", fitting=True))
    # Block 1 compares as block 0 does, the first head twice as sharply and the second not at all: that can be learned.
    params = params_of(model)
    for name in ("attention_norm", "attention"):
        params["block_1"][name] = params["block_0"][name]
    sharpness = np.repeat(np.asarray([2.0, 0.0, 1.0, 1.0, 1.0, 1.0], np.float32), 16)
    params["block_1"]["attention"] = params["block_1"]["attention"] | {
        "qkv": jax.tree.map(lambda p: p * sharpness[(None,) * (p.ndim - 1)], params["block_0"]["attention"]["qkv"])
    }
    params["block_0"]["attention"]["out"] = jax.tree.map(lambda p: 0.1 * p, params["block_0"]["attention"]["out"])
    params["block_0"]["mlp"]["down"] = jax.tree.map(lambda p: 0.1 * p, params["block_0"]["mlp"]["down"])
    nnx.update(model, params)
    graphdef, params = nnx.split(model)
    x = images(32)

    @jax.jit
    def gradient(params):
        loss = lambda params: losses.selector(None, nnx.merge(graphdef, params)(x)[1], None)["loss"].mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        return value, grads, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    def selected(params, selector):
        chooses = numpy_model(fields, reducer="tosa", keep_ratio=0.5, selector=selector)
        pure = nnx.to_pure_dict(params)
        nnx.update(chooses, pure if selector == "learned" else {k: v for k, v in pure.items() if k != "reducer"})
        return np.asarray(call(chooses, x)[1]["kept"])

    def agreement(params):
        """Share of the patches that the oracle would have selected."""
        pairs = zip(selected(params, "learned"), selected(params, "oracle"), strict=True)
        return np.mean([np.isin(a, b).mean() for a, b in pairs])

    before = agreement(params)
    start, grads, _ = gradient(params)
    grads = jax.device_get(nnx.to_pure_dict(grads))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads.pop("reducer")))
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(grads))
    for _ in range(60):
        loss, _, params = gradient(params)
    assert loss < 0.2 * start
    assert agreement(params) > max(0.8, before)


@pytest.mark.parametrize(
    ("name", "layers", "gmac"),
    mostly_long(
        [
            ("deit_tiny_patch16_224", (1, 3, 5, 7, 9, 11), (1.119, 1.056, 0.931, 0.784)),
            ("deit_tiny_patch16_224", None, (1.142, 1.089, 0.985, 0.863)),
            ("deit_small_patch16_224", (1, 3, 5, 7, 9, 11), (4.126, 3.898, 3.442, 2.888)),
            ("deit_small_patch16_224", None, (4.205, 4.015, 3.634, 3.173)),
            ("deit_base_patch16_224", (1, 3, 5, 7, 9, 11), (15.80, 14.94, 13.20, 11.05)),
        ],
        short=(),
    ),
)
def test_cost_of_the_specification(name, layers, gmac):
    for keep_ratio, expected in zip((0.8, 0.7, 0.5, 0.25), gmac, strict=True):
        assert whole_cost_of(name, reducer="tosa", layers=layers, keep_ratio=keep_ratio).gmac == pytest.approx(
            expected, rel=0.001
        )


def test_cost_is_the_formula():
    block = lambda n: 12 * n * 32**2 + 2 * n**2 * 32  # noqa: E731
    selector = 2 * 2**2 * 17**2
    counted = whole_cost_of(TINY, reducer="tosa", keep_ratio=0.5)
    assert counted.gmac * 1e9 == pytest.approx(16 * 192 * 32 + 2 * (block(17) + block(9) + selector) + 32 * 5)
    assert counted.tokens == (17, 9, 17, 9)
    assert counted.parameters - cost_of(TINY).parameters == 2 * (2 * 2**2 + 2)


def test_logits_are_computed_once():
    """What `cost` assumes: XLA merges the logits that a selector reads with those of the attention."""
    model = tosa((("depth", 2),), selector="copy", keep_ratio=0.5)
    program = jax.jit(lambda x: model.encode(x)[0]).lower(embed(model, images())).compile().as_text()
    assert len(re.findall(r"f32\[3,2,17,17\]\S* dot\(", program)) == 1
    assert len(re.findall(r"f32\[3,2,17,17\]\S* exponential\(", program)) == 1


@pytest.mark.parametrize(("depth", "layers"), [(12, (3, 5, 7, 9, 11)), (6, (3, 5)), (3, (1,)), (2, (1,)), (1, ())])
def test_default_layers(depth, layers):
    reducer = Tosa(selector="copy", num_heads=2, depth=depth, rngs=nnx.Rngs(0))
    assert reducer.layers == layers


@pytest.mark.long
def test_bfloat16_stays_bfloat16_and_selects_much_the_same():
    fields = tuple((EVERYTHING | dict(dtype="bfloat16")).items())
    x = tosa(tuple(EVERYTHING.items()), keep_ratio=0.5).embed(images())
    aux = encoder(tuple(EVERYTHING.items()), keep_ratio=0.5)(x)[1]
    out, half = encoder(fields, keep_ratio=0.5)(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and np.isfinite(out.astype(jnp.float32)).all()
    same = [np.isin(a, b).mean() for a, b in zip(np.asarray(aux["kept"]), np.asarray(half["kept"]), strict=True)]
    assert np.mean(same) > 0.8


@pytest.mark.parametrize(
    "options",
    mostly_long(
        [dict(fitting=True), dict(), dict(selector="random"), dict(selector="oracle"), dict(selector="class")],
        short=(0, 1, 2),
    ),
)
def test_strict_dtypes_in_training(options, strict_dtypes):
    model = numpy_model(TINY | dict(drop_path=0.1), reducer="tosa", **options)
    aux = jax.eval_shape(lambda x: model(x, nnx.Rngs(0)), images())[1]
    assert aux.get("loss/selector", np.zeros(3, np.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(selector="best"), "selector is 'best'; allowed: 'learned', 'copy'"),
        (dict(layers=(0, 2)), r"blocks \(0, 2\) select tokens; each needs a dense block before it"),
        (dict(layers=(2, 3)), r"blocks \(2, 3\) select tokens"),
        (dict(layers=(3, 1)), r"layers is \(3, 1\); it lists block indices"),
        (dict(num_kept=(16, 8, 8, 16)), r"blocks \(1, 2\) select tokens"),
        (dict(layers=(1, 3), keep_ratio=(0.5,)), "keep_ratio has 1 entries for 2 layers"),
        (dict(selector="copy", fitting=True), "fitting needs a learned selector"),
        (dict(sites=(1,)), "takes keep_ratio, layers, num_kept, selector, fitting, draw_seed; got"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="tosa", **options)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    mostly_long(
        [
            ({}, dict(layers=(2, 4)), r"layers is \(2, 4\); the model has blocks 0..3"),
            ({}, dict(num_kept=(8, 4)), None),
            ({}, dict(num_kept=(8, 4, 4)), "num_kept has 3 entries for 2 layers and 4 blocks"),
            ({}, dict(num_kept=(8, 4, 8, 4)), "num_kept begins with 8; block 0 is dense: give 16, all patches"),
            (
                NO_CLASS,
                dict(selector="class"),
                "tosa with selector 'class' ranks patches by the attention of the class token",
            ),
            (NO_CLASS, dict(selector="copy"), None),
        ],
        short=(3, 4),
    ),
)
def test_misuse_that_only_the_model_shows(fields, options, message):
    model = numpy_model(TINY | fields, reducer="tosa", **options)
    if message is None:
        jax.eval_shape(model, images())
        return
    with pytest.raises(InputError, match=message):
        jax.eval_shape(model, images())
