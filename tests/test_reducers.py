"""The contract that every reducer is put through. A new file in reducers/ is picked up by itself."""

import collections
import functools
from types import NoneType, UnionType
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    ALIKE,
    attend,
    cost_of,
    embed,
    feed_forward,
    mostly_long,
    numpy_images,
    numpy_model,
    one_of_a_kind,
    predict,
)
from flax import nnx

from tif_jax import cost, reducers, tokens
from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model
from tif_jax.models.params import params_of
from tif_jax.tokens import num_kept

TINY = dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, num_classes=5)
VARIANTS = {
    "plain": {},
    "everything": dict(
        image_size=(32, 16), pool="mean", distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.3,
        gelu="tanh", qkv_bias=False, special_positions=False,
    ),
    "clip": dict(pre_norm=True, gelu="quick"),
    "siglip": dict(pool="attention", class_token=False, gelu="tanh"),
}  # fmt: skip
FRONT = ("even", "norm", "prior", "random", "tif")  # choose once, before the first block: what follows is a plain walk


def images(num=4, size=(32, 32), seed=0):
    return numpy_images(num, size, seed)


@functools.cache
def model_of(name, keep_ratio=0.5, variant="plain", **options):
    if "keep_ratio" in reducers.options(name):
        options["keep_ratio"] = keep_ratio
    elif "num_merged" in reducers.options(name):
        options["num_merged"] = 0 if keep_ratio == 1 else 2
    return numpy_model(TINY | VARIANTS[variant], reducer=name, **options)


@functools.cache
def jitted(model, **compiler_options):
    """Compiled once per model: every test of the contract calls the same program."""

    def call(x):
        NUM_TRACES[id(model)] += 1
        return model(x)

    return jax.jit(call, compiler_options=compiler_options)


NUM_TRACES = collections.Counter()


@pytest.fixture(params=reducers.known())
def name(request):
    return request.param


# Of the baselines that differ in their ranking alone one stands for all, and of methods alike one, where a program has to
# be compiled for each.
OTHERS = ("even", "norm", "prior", "diffrate", "expediting", "ailurus")
ONE_OF_A_KIND = pytest.mark.parametrize("name", one_of_a_kind(reducers.known(), also=OTHERS))
# Where that program serves no other test: of a ViT evo_levit is evo_vit, and random ranks as norm does.
FEWER = pytest.mark.parametrize("name", one_of_a_kind(reducers.known(), also=(*OTHERS, "full", "random", "evo_levit")))
CLASS_RANKED = ("as_vit", "bat", "diffrate", "evit", "evo_vit", "evo_levit")
BIT_FOR_BIT = [(n, v) for n in reducers.known() for v in VARIANTS if v != "siglip" or n not in CLASS_RANKED]
# The baselines choose tokens as tif does; other reducers are compared with a reference on such a model, in their own tests.
EVERYTHING = ("tif", "bat", "evo_levit")
SHORT = {("evit", "clip"), ("tome", "siglip"), *((name, "everything") for name in EVERYTHING)}
PLAIN = {(name, "plain") for name in reducers.known() if name not in (*ALIKE, *OTHERS, *dict(SHORT))}
ALWAYS = [i for i, of in enumerate(BIT_FOR_BIT) if of in SHORT | PLAIN]


def test_parameters_are_the_plain_vits_and_its_own(name):
    plain, reduced = model_of("full"), model_of(name)
    params = params_of(reduced)
    params.pop("reducer", None)
    assert jax.tree.structure(params) == jax.tree.structure(params_of(plain))
    assert jax.tree.map(lambda a, b: a.shape == b.shape, params, params_of(plain))


def test_every_option_has_a_type_and_a_default(name):
    """The types that a text on the command line is read by."""
    kinds = (bool, int, float, str, dict, NoneType, tuple[int, ...], tuple[float, ...])
    for option in reducers.options(name).values():
        annotation = option.annotation
        assert set(get_args(annotation) if isinstance(annotation, UnionType) else [annotation]) <= set(kinds)
        assert option.default is not option.empty


@ONE_OF_A_KIND
def test_static_shapes_one_compilation(name):
    model = model_of(name)
    call = jitted(model)
    call(images(seed=1))
    num_traces = NUM_TRACES[id(model)]
    call(images(seed=2))
    assert NUM_TRACES[id(model)] == num_traces > 0


@pytest.mark.parametrize(("name", "variant"), mostly_long(BIT_FOR_BIT, ALWAYS))
def test_keeping_everything_is_the_plain_model_bit_for_bit(name, variant):
    size = (32, 16) if variant == "everything" else (32, 32)
    plain = model_of("full", variant=variant)
    reduced = nnx.clone(model_of(name, keep_ratio=1.0, variant=variant))
    nnx.update(reduced, params_of(plain))
    x = images(size=size)
    # Without fusion emitters XLA's CPU compiler joins a gather that keeps everything to the sum that follows.
    reduced, plain = (jitted(model, xla_cpu_use_fusion_emitters=True) for model in (reduced, plain))
    np.testing.assert_array_equal(reduced(x)[0], plain(x)[0])


@ONE_OF_A_KIND
def test_kept_and_source_say_where_patches_are(name):
    """kept: raster positions, ascending. source: the row, among the patch tokens that come out, that a patch lives in."""
    model = model_of(name)
    aux = jitted(model)(images())[1]
    assert ("kept" in aux or "source" in aux) == (name != "full")
    if "kept" in aux:
        kept = np.asarray(aux["kept"])
        assert kept.shape[0] == 4 and kept.dtype == np.int32
        assert (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < 16
    if "source" in aux:
        x = jax.eval_shape(lambda x: model.encode(model.embed(x))[0], images())
        source = np.asarray(aux["source"])
        assert source.shape == (4, 16) and source.dtype == np.int32
        assert source.min() >= -1 and source.max() < x.shape[1] - model.num_special
    if name in FRONT:
        assert kept.shape == (4, num_kept(0.5, 16))


def test_only_kept_patches_matter(name):
    """Noise in the patches that were dropped changes nothing, as long as the ranking stays as it is."""
    if name not in (
        "even",
        "prior",
    ):  # the others' ranking looks at the patches, or they drop them later: see their own tests
        pytest.skip(f"the outcome of {name} depends on every patch")
    model = model_of(name)
    x = np.array(images())
    logits, aux = jitted(model)(jnp.asarray(x))
    for b, kept in enumerate(np.asarray(aux["kept"])):
        for i in set(range(16)) - set(kept.tolist()):
            row, column = divmod(i, 4)
            x[b, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0
    np.testing.assert_allclose(jitted(model)(jnp.asarray(x))[0], logits, atol=1e-6)


def test_equals_a_walk_over_the_kept_tokens(name):
    """Independent of `keep`: gather with numpy what aux says was kept, and run the blocks by hand."""
    if name not in ("full", *FRONT):
        pytest.skip(f"{name} reduces between the blocks")
    model = model_of(name)
    x = images()
    logits, aux = jitted(model)(jnp.asarray(x))
    kept = np.asarray(aux.get("kept", np.tile(np.arange(16), (4, 1))))
    embedded = np.asarray(embed(model, x))
    walked = jnp.asarray(np.stack([np.concatenate([e[:1], e[1 + k]]) for e, k in zip(embedded, kept, strict=True)]))
    for block in model.blocks:
        walked = feed_forward(block, attend(block, walked)[0])
    np.testing.assert_allclose(predict(model, walked), logits, atol=1e-5)


@FEWER
def test_differentiable(name):
    graphdef, params = nnx.split(model_of(name))
    loss = lambda params: nnx.merge(graphdef, params)(images())[0].var()  # noqa: E731
    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    grads.pop("reducer", None)
    norms = jax.tree.map(lambda g: np.abs(g).max(), grads)
    assert all(np.isfinite(n) for n in jax.tree.leaves(norms))
    assert norms["block_0"]["attention"]["qkv"]["kernel"] > 0 and norms["patch_embedding"]["kernel"] > 0


@ONE_OF_A_KIND
def test_order_of_images_does_not_matter(name):
    call, x = jitted(model_of(name)), images()
    np.testing.assert_allclose(call(x[::-1])[0], call(x)[0][::-1], atol=1e-6)


@FEWER
def test_order_of_patches_does_not_matter(name):
    """The class token comes out the same, and the same patches are kept, wherever in the array the patches are."""
    if name in ("random", "tome", "mctf", "tofu"):
        pytest.skip(f"{name} draws, or deals tokens into two sets, by their place in the array")
    model, x = model_of(name), images()
    order = np.random.default_rng(0).permutation(16)

    @jax.jit
    def both(x):
        x, plain = model.embed(x), model.tokens(4)
        special, patches = tokens.split(x, 1)
        moved = tokens.join(special, patches[:, order]), tokens.at_rows(plain, jnp.broadcast_to(order, (4, 16)))
        return model.reducer(model.blocks, x, plain), model.reducer(model.blocks, *moved)

    (out, aux), (permuted, permuted_aux) = both(x)
    np.testing.assert_allclose(permuted[:, 0], out[:, 0], atol=1e-4)
    if "kept" in aux:
        np.testing.assert_array_equal(np.sort(permuted_aux["kept"], axis=1), np.sort(aux["kept"], axis=1))


@FEWER
def test_no_nan_in_bfloat16(name):
    logits, _ = jitted(model_of(name, dtype="bfloat16"))(images())
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_strict_dtypes(name, strict_dtypes):
    model = model_of(name)  # not while tracing: it is kept for other tests
    jax.eval_shape(lambda x: model(x), images())


def test_random_is_repeatable_and_fresh_with_rngs():
    model = model_of("random")
    call = jitted(model)
    x = images()
    kept = call(x)[1]["kept"]
    np.testing.assert_array_equal(call(x)[1]["kept"], kept)
    np.testing.assert_array_equal(call(x[:2])[1]["kept"], kept[:2])  # whatever the batch
    assert len(np.unique(np.asarray(kept), axis=0)) > 1  # images differ
    draw = jax.jit(lambda key: model(x, nnx.Rngs(key))[1]["kept"])
    assert (draw(jax.random.key(0)) != draw(jax.random.key(1))).any()


def test_of_no_images_there_are_no_keys():
    assert tokens.image_keys(0, jnp.zeros((0, 4, 4, 3))).shape == (0,)


def test_random_is_uniform():
    model = model_of("random", keep_ratio=0.25)
    kept = np.asarray(jitted(model)(images(512))[1]["kept"])
    counts = np.bincount(kept.ravel(), minlength=16)
    assert abs(counts - 512 / 4).max() < 5 * np.sqrt(512 * 0.25 * 0.75)


def test_norm_keeps_the_largest():
    model = model_of("norm")
    x = images()
    norms = np.linalg.norm(np.asarray(embed(model, x))[:, 1:], axis=-1)
    np.testing.assert_array_equal(jitted(model)(x)[1]["kept"], np.sort(np.argsort(-norms, axis=1)[:, :8], axis=1))


@pytest.mark.parametrize("reducer", mostly_long(["tif", "tome", "evit", "bat", "dynamic_vit"], short=(0, 1)))
def test_a_budget_is_used_up(reducer):
    fields = TINY | dict(depth=3)
    full = cost_of(fields).gmac
    model = nnx.eval_shape(blueprint(fields, reducer=reducer, budget=0.7 * full), jax.random.key(0))
    assert cost(model).gmac <= 0.7 * full
    one_more = (
        dict(num_merged=model.reducer.num_merged - 1 / 3)
        if reducer == "tome"
        else dict(keep_ratio=model.reducer.keep_ratio + 0.001)
    )
    assert cost_of(fields, reducer=reducer, **one_more).gmac > 0.7 * full


BUDGETS = (1.1, 0.811, 0.657)
SOLVED = [name for name in reducers.known() if name not in ("full", "evo_levit")]


@pytest.mark.parametrize(
    ("reducer", "options", "budget"),
    mostly_long(
        [("tome", {}, 0.811), ("tome", {}, 0.657), ("tome", dict(schedule="decreasing"), 0.657)]
        + [("tome", dict(schedule=ramp), budget) for ramp in ("decreasing", "increasing") for budget in (1.1, 0.95)]
        + [(reducer, {}, budget) for reducer in SOLVED for budget in BUDGETS if (reducer, budget) != ("tosa", 0.657)],
        short=(),
    ),
)
def test_a_budget_is_spent_to_one_percent(reducer, options, budget):
    """One token of 196 more in every block costs 0.6 % of a DeiT-Ti; of ToSA's budget .657 is less than it can do."""
    counted = cost_of("deit_tiny_patch16_224", reducer=reducer, **options, budget=budget)
    assert 0.99 * budget < counted.gmac <= budget


@pytest.mark.parametrize("reducer", CLASS_RANKED)
def test_registers_are_no_class_token(reducer):
    model = numpy_model(TINY | dict(class_token=False, pool="mean", num_registers=2), reducer=reducer)
    with pytest.raises(InputError, match="attention of the class token; this model has none"):
        jax.eval_shape(model, images())


@pytest.mark.parametrize(
    ("reducer", "options", "message"),
    [
        ("baat", {}, "Unknown reducer 'baat'. Known: "),
        ("tif", {"keep_rate": 0.5}, "takes keep_ratio, then, adapter, round_to; got keep_rate"),
        ("tif", {"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ("random", {"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ("full", {"keep_ratio": 0.5}, "takes no options; got keep_ratio"),
        ("full", {"budget": 0.5}, "neither keep_ratio nor num_merged"),
        ("evit", {"budget": 0.5, "keep_ratio": 0.5}, "budget and keep_ratio are given"),
        ("tome", {"budget": 1e-6}, "budget is 1e-06 GMAC; the least that this reducer can do is 0.000"),
        ("tif", {"then": {"keep_ratio": 0.5}}, "then is {'keep_ratio': 0.5}; it is a dict that names a reducer"),
        ("tif", {"then": {"name": "tomme"}}, "Unknown reducer 'tomme'"),
    ],
)
def test_misuse(reducer, options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer=reducer, **options)
