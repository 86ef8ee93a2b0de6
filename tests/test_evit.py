"""EViT against a slow walk written from its description, and against its published cost."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, embed, feed_forward, mostly_long, numpy_images, numpy_model, predict, whole_cost_of
from flax import nnx

from tif_jax import reducers
from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.reducers.evit import Evit, reorganise
from tif_jax.tokens import at_rows

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=2, num_classes=5)
SPECIAL = TINY | dict(distillation_token=True, num_registers=2, pool="mean", qk_norm=True, layer_scale=0.3)


def images(num=3, seed=0):
    return numpy_images(num, seed=seed)


@functools.cache
def plain(special):
    """A model whose weights are large enough that attention differs between patches."""
    model = numpy_model(SPECIAL if special else TINY)
    nnx.update(model, jax.tree.map(lambda p: p * 4 if p.ndim == 2 else p, params_of(model)))
    return model


def with_evit(special=False, dtype="float32", **options):
    model = numpy_model((SPECIAL if special else TINY) | dict(dtype=dtype), reducer="evit", **options)
    nnx.update(model, params_of(plain(special)))
    return model


def run(model, x):
    """Tokens after the last block, logits and aux."""

    def forward(x):
        tokens, aux = model.encode(model.embed(x))
        return tokens, *model.predict(tokens, aux)

    return jax.tree.map(np.asarray, jax.jit(forward)(x))


def class_attention(qk, num_special):
    """(T - num_special,) of one image: softmax of the class token's row, mean over heads."""
    query, key = (np.asarray(a, np.float64)[0] for a in (qk.query, qk.key))
    num_tokens, num_heads, channels = key.shape
    scores = np.zeros(num_tokens)
    for head in range(num_heads):
        logits = np.array([query[0, head] @ key[t, head] for t in range(num_tokens)]) / math.sqrt(channels)
        weights = np.exp(logits - logits.max())
        scores += weights / weights.sum() / num_heads
    return scores[num_special:]


def reference(model, image, ratios, fuse):
    """Output tokens of one image and, per output patch token, the raster positions in it and whether it is a patch itself.

    ratios: {block: keep ratio}. A walk over a list of tokens, each with the set of patches that it stands for.
    """
    num_special = model.num_special
    rows = np.asarray(embed(model, image[None]))[0]
    special, patches = rows[:num_special], list(rows[num_special:])
    members, is_patch = [{i} for i in range(len(patches))], [True] * len(patches)
    for i, block in enumerate(model.blocks):
        x, qk = attend(block, jnp.asarray(np.stack([*special, *patches])[None]))
        x = np.asarray(x)[0]
        special, patches = x[:num_special], list(x[num_special:])
        num_kept = math.ceil(ratios.get(i, 1) * len(patches))
        if num_kept < len(patches):
            scores = class_attention(qk, num_special)
            ranking = sorted(range(len(patches)), key=lambda j: -scores[j])
            attentive, inattentive = sorted(ranking[:num_kept]), ranking[num_kept:]
            token = sum(scores[j] * patches[j].astype(np.float64) for j in inattentive).astype(np.float32)
            lost = set().union(*(members[j] for j in inattentive))
            patches, members, is_patch = ([a[j] for j in attentive] for a in (patches, members, is_patch))
            if fuse:
                patches, members, is_patch = [*patches, token], [*members, lost], [*is_patch, False]
        x = np.asarray(feed_forward(block, jnp.asarray(np.stack([*special, *patches])[None])))[0]
        special, patches = x[:num_special], list(x[num_special:])
    return np.stack([*special, *patches]), members, is_patch


@pytest.mark.parametrize(
    ("special", "options", "ratios", "num_tokens"),
    mostly_long(
        [
            (False, dict(keep_ratio=0.5), {1: 0.5, 2: 0.5, 3: 0.5}, 4),  # 16 -> 8 + 1 -> 5 + 1 -> 3 + 1
            (False, dict(keep_ratio=0.5, fuse=False), {1: 0.5, 2: 0.5, 3: 0.5}, 2),  # 16 -> 8 -> 4 -> 2
            (False, dict(keep_ratio=0.7, sites=(0,)), {0: 0.7}, 13),  # 11.2 -> 12 + 1
            (False, dict(keep_ratio=(0.6, 1.0, 0.3), sites=(0, 2, 3)), {0: 0.6, 3: 0.3}, 5),  # 10 + 1 -> 11 -> 4 + 1
            (False, dict(keep_ratio=(0.6, 1.0, 0.3), sites=(0, 2, 3), fuse=False), {0: 0.6, 3: 0.3}, 3),
            (False, dict(keep_ratio=0.97, sites=(1,)), {}, 16),  # ceil(15.52) is all of them: nothing to fuse
            (True, dict(keep_ratio=0.6), {1: 0.6, 2: 0.6, 3: 0.6}, 6),  # 16 -> 10 + 1 -> 7 + 1 -> 5 + 1
            (True, dict(keep_ratio=0.6, fuse=False), {1: 0.6, 2: 0.6, 3: 0.6}, 4),  # 16 -> 10 -> 6 -> 4
        ],
        short=(6,),
    ),
)
def test_against_the_reference(special, options, ratios, num_tokens):
    model, x = with_evit(special, **options), images()
    fuse = options.get("fuse", True)
    tokens, logits, aux = run(model, x)
    assert tokens.shape[1] == model.num_special + num_tokens
    assert aux["source"].shape == (3, 16) and aux["source"].dtype == np.int32
    assert ("kept" in aux) == (not fuse or len(ratios) <= 1)
    for b in range(len(x)):
        expected, members, is_patch = reference(model, x[b], ratios, fuse)
        np.testing.assert_allclose(tokens[b], expected, atol=2e-5)
        row_of = {position: row for row, positions in enumerate(members) for position in positions}
        np.testing.assert_array_equal(aux["source"][b], [row_of.get(position, -1) for position in range(16)])
        if "kept" in aux:
            own = [p for positions, patch in zip(members, is_patch, strict=True) if patch for p in positions]
            np.testing.assert_array_equal(aux["kept"][b], own)
            assert aux["kept"].dtype == np.int32
        expected_logits = predict(model, jnp.asarray(expected[None]))[0]
        np.testing.assert_allclose(logits[b], expected_logits, atol=1e-4)


def test_every_patch_lives_somewhere_when_fused():
    source = run(with_evit(keep_ratio=0.5), images(16))[2]["source"]
    assert source.min() == 0 and source.max() == 3
    assert ((source == 3).sum(axis=1) >= 3).all()  # the last site fuses three tokens, some of them fused before


def test_the_fused_token_is_dropped_in_some_images_and_kept_in_others():
    """Why there is no `kept`: the number of patches that are tokens of their own is not a static shape."""
    source = run(with_evit(keep_ratio=0.5, sites=(1, 3)), images(64))[2]["source"]
    members = np.stack([np.bincount(row, minlength=6) for row in source])
    alone = (members[:, :5] == 1).sum(axis=1)  # 16 -> 8 + 1 -> 5 + 1
    assert set(alone.tolist()) == {4, 5}


def test_source_follows_the_order_of_the_index_and_kept_is_raster():
    """Patch tokens that were picked before EViT saw them."""
    model = with_evit(keep_ratio=0.5, sites=(1,))
    x = embed(model, images())
    index = jnp.tile(jnp.asarray([[1, 3, 4, 6, 9, 10, 14, 15]], jnp.int32), (3, 1))
    x = jnp.concatenate([x[:, :1], jnp.take_along_axis(x[:, 1:], index[..., None], axis=1)], axis=1)
    x, aux = jax.jit(lambda x: model.reducer(model.blocks, x, at_rows(model.tokens(3), index)))(x)
    assert x.shape[1] == 1 + 4 + 1 and aux["source"].shape == (3, 16) and aux["kept"].shape == (3, 4)
    for kept, source in zip(np.asarray(aux["kept"]), np.asarray(aux["source"]), strict=True):
        np.testing.assert_array_equal(np.flatnonzero((0 <= source) & (source < 4)), kept)
        np.testing.assert_array_equal(np.flatnonzero(source >= 0), np.asarray(index)[0])


@pytest.mark.long
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_keeping_everything_is_the_plain_model(special, fuse):
    tokens, logits, aux = run(with_evit(special, keep_ratio=1.0, fuse=fuse), images())
    expected = run(plain(special), images())
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_array_equal(logits, expected[1])
    np.testing.assert_array_equal(aux["source"], np.tile(np.arange(16), (3, 1)))
    np.testing.assert_array_equal(aux["kept"], aux["source"])


def test_the_fused_token_passes_gradient_to_its_weights_and_members():
    model = numpy_model(TINY)
    x = embed(model, images())
    kept = jnp.tile(jnp.arange(8, dtype=jnp.int32)[None], (3, 1))
    fused = jnp.tile(jnp.arange(16)[None] >= 8, (3, 1))
    scores = jax.random.uniform(jax.random.key(1), (3, 16))
    total = lambda x, scores: reorganise(x, scores, kept, fused)[:, -1].sum()  # noqa: E731
    to_x, to_scores = (np.asarray(g) for g in jax.jit(jax.grad(total, argnums=(0, 1)))(x, scores))
    np.testing.assert_allclose(to_scores[:, 8:], np.asarray(x)[:, 9:].sum(axis=-1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(to_x[:, 9:], np.tile(np.asarray(scores)[:, 8:, None], (1, 1, 32)), rtol=1e-5)
    assert (to_scores[:, :8] == 0).all() and (to_x[:, :9] == 0).all()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite(dtype):
    graphdef, params = nnx.split(with_evit(keep_ratio=0.5, dtype=dtype))
    grads = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(images())[0].var()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(nnx.to_pure_dict(grads)))


@pytest.mark.long
@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16(fuse):
    tokens, logits, aux = run(with_evit(dtype="bfloat16", keep_ratio=0.5, fuse=fuse), images())
    assert tokens.dtype == jnp.bfloat16 and logits.dtype == jnp.float32 and aux["source"].dtype == np.int32
    assert np.isfinite(logits).all() and np.isfinite(tokens.astype(np.float32)).all()


@pytest.mark.long
@pytest.mark.parametrize("fuse", [False, True])
def test_strict_dtypes(strict_dtypes, fuse):
    model = numpy_model(TINY, reducer="evit", keep_ratio=0.5, fuse=fuse)
    jax.eval_shape(lambda x: model(x), images())


@pytest.mark.long
def test_rngs_reach_both_half_steps():
    """In training drop-path draws twice per block, as in the plain model."""
    fields = TINY | dict(drop_path=0.5)
    model, full = numpy_model(fields, reducer="evit", keep_ratio=1.0), numpy_model(fields)
    call = lambda model: jax.jit(lambda key: model(images(), nnx.Rngs(key))[0])(jax.random.key(7))  # noqa: E731
    np.testing.assert_array_equal(call(model), call(full))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), "keep_ratio is 0.0"),
        (dict(keep_ratio=(0.5, 1.5, 0.5)), "keep_ratio is 1.5"),
        (dict(keep_ratio=(0.5, 0.5), sites=(1, 2, 3)), "2 entries for 3 sites"),
        (dict(sites=(3, 1)), r"sites is \(3, 1\)"),
        (dict(fuse_token=True), "takes keep_ratio, sites, num_kept, fuse; got fuse_token"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="evit", **options)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, dict(sites=(1, 4)), r"sites is \(1, 4\); the model has blocks 0..3"),
        ({}, dict(keep_ratio=(0.5, 0.5)), "2 entries for 3 sites"),
        (dict(class_token=False, pool="mean"), {}, "attention of the class token; this model has none"),
    ],
)
def test_misuse_that_only_the_model_reveals(fields, options, message):
    model = nnx.eval_shape(blueprint(TINY | fields, reducer="evit", **options), jax.random.key(0))
    with pytest.raises(InputError, match=message):
        cost(model)


def test_misuse_that_the_type_checker_of_the_tests_would_see_first():
    with pytest.raises(InputError, match="fuse is 'sum'; allowed: True, False"):
        Evit.__post_init__(SimpleNamespace(keep_ratio=0.5, sites=None, num_kept=None, fuse="sum"))


def test_options():
    defaults = {k: p.default for k, p in reducers.options("evit").items()}
    assert defaults == dict(keep_ratio=0.7, sites=None, num_kept=None, fuse=True)
    assert hash(Evit(keep_ratio=(0.5, 0.6), sites=(1, 2))) == hash(Evit(keep_ratio=(0.5, 0.6), sites=(1, 2)))


@pytest.mark.parametrize(
    ("keep_ratio", "published"), mostly_long([(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)], short=(2,))
)  # the authors' table, rounded to 0.1
def test_published_cost(keep_ratio, published):
    assert evit_cost(keep_ratio=keep_ratio).gmac == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize(
    ("fuse", "counted", "tokens"), [(True, 3.032, (197, 140, 100, 72)), (False, 3.000, (197, 139, 98, 69))]
)
def test_cost_against_a_count_on_the_official_code(fuse, counted, tokens):
    """torchprofile counts norms and element-wise products too: 4.604 for a plain DeiT-S, where we count 4.599."""
    reduced = evit_cost(keep_ratio=0.7, fuse=fuse)
    assert reduced.gmac == pytest.approx(counted, abs=0.006)
    assert reduced.tokens == tuple(n for n in tokens for _ in range(3))
    assert reduced.parameters == evit_cost(keep_ratio=1.0).parameters


def evit_cost(**options):
    return whole_cost_of("deit_small_patch16_224", reducer="evit", **options)
