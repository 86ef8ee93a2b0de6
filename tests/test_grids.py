"""Features on the raster of patches: whatever a reducer does, every patch has some, and the right ones."""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import lively, numpy_images, one_of_a_kind
from flax import nnx

from tif_jax import reducers, tokens
from tif_jax.errors import InputError
from tif_jax.models.around import Around
from tif_jax.models.grids import grid_features, to_grid
from tif_jax.models.params import params_of
from tif_jax.models.trace import trace
from tif_jax.tokens import raster_tokens

DEPTH, GRID, SIZE = 4, (3, 5), (12, 20)
FIELDS = dict(
    image_size=SIZE, patch_size=4, width=16, depth=DEPTH, num_heads=2, num_registers=2, task="depth",
    decoder="linear", decoder_blocks=(0, 1, 2, 3), pool="mean",
)  # fmt: skip
OPTIONS = {
    **{name: dict(num_merged=2) for name in ("diffrate", "tofu", "tome")},
    "evo_vit": dict(keep_ratio=0.5, stages=(1, 3)),
    "tosa": dict(keep_ratio=0.4, layers=(1, 3)),
}
NAMES = [name for name in reducers.known() if name != "evo_levit"]  # of a ViT it is evo_vit with another momentum
# They do to the raster what tif (the first three) and tome do, or what tests of their own look at.
OTHERS = ("even", "norm", "prior", "random", "diffrate", "expediting", "ailurus")
FEWER = ("full", *OTHERS, "dynamic_vit")  # it drops patches between blocks, as bat does


def options_of(name, keep_ratio=0.5):
    if name in OPTIONS and keep_ratio != 1:
        return OPTIONS[name]
    known = reducers.options(name)
    return {"keep_ratio": keep_ratio} if "keep_ratio" in known else {"num_merged": 0} if "num_merged" in known else {}


@functools.cache
def model_of(name, **options):
    return lively(FIELDS, reducer=name, **(options or options_of(name)))


@functools.cache
def grids_of(name, **options):
    """The features of all blocks on the raster, of two images."""
    model = model_of(name, **options)
    aux = jax.jit(lambda x: model.encode(model.embed(x))[1])(numpy_images(2, SIZE))
    return [np.asarray(aux[f"blocks/{i}"]) for i in range(DEPTH)]


@dataclass(frozen=True)
class Noting(Around):
    """Notes what goes into a block and what comes out, and nothing of which patch is where."""

    seen: list = field(default_factory=list)

    def attend(self, x, tokens, *args, **kwargs):
        self.seen.append([x])
        return self.block.attend(x, tokens, *args, **kwargs)

    def feed_forward(self, x, *args, **kwargs):
        y = self.block.feed_forward(x, *args, **kwargs)
        self.seen[-1].append(y)
        return y


def both_grids(name):
    """What every patch is after each block: as the model says, and from `trace`, which finds patches by derivatives."""
    model, images = model_of(name), numpy_images(2, SIZE)

    @jax.jit
    def noted(x):
        seen: list = []
        embedded = model.embed(x)
        aux = model.encode(embedded, blocks=[Noting(block, seen) for block in model.blocks])[1]
        return [aux[f"blocks/{i}"] for i in range(DEPTH)], embedded, seen

    ours, embedded, seen = noted(images)
    sources = [np.asarray(source) for source in trace(model, images).sources]
    before = np.asarray(embedded)[:, model.num_special :]
    found = []
    for (going_in, coming_out), source in zip(seen, sources, strict=True):
        start, rows = (np.asarray(x)[:, model.num_special :] for x in (going_in, coming_out))
        now = np.full(before.shape, np.nan, np.float32)
        for b, p in np.ndindex(source.shape):
            row = source[b, p]
            if name == "evo_vit" and row == rows.shape[1] - 1 and len(np.flatnonzero(source[b] == row)) > 1:
                now[b, p] = before[b, p] + rows[b, row] - start[b, row]  # as fast as the representative
            elif row >= 0:
                now[b, p] = rows[b, row]
            elif name == "tosa":
                now[b, p] = before[b, p]
        for b, p in np.argwhere(np.isnan(now[..., 0])):
            held = [q for q in range(now.shape[1]) if source[b, q] >= 0]
            distance = [sum((np.array(divmod(p, GRID[1])) - divmod(q, GRID[1])) ** 2) for q in held]
            now[b, p] = rows[b, source[b, held[int(np.argmin(distance))]]]
        found.append(now.reshape(2, *GRID, -1))
        before = now
    return ours, found


@pytest.mark.parametrize(
    "name",
    one_of_a_kind(
        [name for name in NAMES if name not in ("full", "prior", "norm", "expediting", "token_learner")],
        also=("diffrate", "random", "dynamic_vit"),
    ),
)
def test_after_every_block_every_patch_is_what_a_slow_walk_says(name):
    for i, (ours, slow) in enumerate(zip(*both_grids(name), strict=True)):
        np.testing.assert_allclose(ours, slow, atol=2e-4, err_msg=f"block {i}")


def test_a_classifier_has_features_on_the_raster_too():
    depth, images = model_of("tome"), numpy_images(2, SIZE)
    classifier = lively(FIELDS | dict(task="classification", num_classes=3), reducer="tome", **OPTIONS["tome"])
    nnx.update(classifier, {name: of for name, of in params_of(depth).items() if name != "decoder"})
    found = jax.jit(lambda x: grid_features(classifier, x, (2, 0)))(images)
    for ours, i in zip(found, (2, 0), strict=True):
        np.testing.assert_allclose(ours, grids_of("tome")[i], atol=1e-5)
    with pytest.raises(InputError, match=r"blocks are \(4,\) and fill is 'position'; the model has blocks 0..3"):
        grid_features(classifier, images, (4,))


@pytest.mark.parametrize("name", one_of_a_kind(NAMES, also=FEWER))
def test_where_nothing_is_reduced_they_are_the_plain_models_bit_for_bit(name):
    plain, reduced = (
        model_of("full"),
        nnx.clone(model_of(name, **options_of(name, 1.0)) if name != "full" else model_of(name)),
    )
    nnx.update(reduced, params_of(plain))

    @jax.jit
    def both(x):
        (left, plain_aux), (y, aux) = (m.encode(m.embed(x)) for m in (plain, reduced))
        ends = left[:, plain.num_special :].reshape(2, *GRID, -1), reduced.to_grid(y, aux, reduced.embed(x))
        return [(plain_aux[f"blocks/{i}"], aux[f"blocks/{i}"]) for i in range(DEPTH)] + [ends]

    for ours, theirs in both(numpy_images(2, SIZE)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", one_of_a_kind(NAMES, also=FEWER))
def test_a_constant_image_gives_a_constant_map(name):
    # EViT's fused token is a sum by class attention, whose shares are less than 1 together: another token by its definition.
    options = options_of(name) | ({"fuse": False} if name == "evit" else {})
    model = lively(FIELDS | dict(absolute_positions=False), reducer=name, **options)
    depth, aux = jax.jit(lambda x: model(x))(jnp.full((1, *SIZE, 3), 0.7))
    assert depth.shape == (1, *SIZE)
    assert depth.min() > 0
    if name == "tosa":  # a patch that skipped blocks is another than one that went through, even if they began alike
        grid = np.asarray(jax.jit(lambda x: model.encode(model.embed(x))[1])(jnp.full((1, *SIZE, 3), 0.7))["blocks/3"])
        went = np.isin(np.arange(15), aux["kept"][0])
        for same in (grid.reshape(15, -1)[went], grid.reshape(15, -1)[~went]):
            np.testing.assert_allclose(same, same[:1].repeat(len(same), axis=0), atol=1e-4)
    else:
        assert depth.max() - depth.min() < 1e-4


@pytest.mark.parametrize("name", one_of_a_kind(NAMES, also=FEWER))
def test_no_nan_in_bfloat16(name):
    model = lively(FIELDS, reducer=name, dtype="bfloat16", **options_of(name))
    depth, aux = jax.jit(lambda x: model(x))(numpy_images(2, SIZE))
    assert depth.dtype == jnp.float32 and np.isfinite(depth).all()
    assert not [key for key in aux if key.startswith("blocks/")]  # read, and gone


DEALT = ("random", "tome", "mctf", "tofu")


@pytest.mark.parametrize("name", one_of_a_kind([n for n in NAMES if n not in DEALT], also=FEWER))
def test_the_order_of_the_rows_does_not_matter(name):
    """Those in `DEALT` draw, or deal tokens into two sets, by their place in the array."""
    if name in ("expediting", "ailurus"):
        pytest.skip(f"{name} asks for the whole raster, in order")
    model, order = model_of(name), np.random.default_rng(0).permutation(15)

    @jax.jit
    def both(x):
        x, plain = model.embed(x), model.tokens(2)
        special, patches = tokens.split(x, model.num_special)
        moved = tokens.at_rows(plain, jnp.broadcast_to(order, (2, 15)))
        walks = (
            model.reducer(model.blocks, x, plain),
            model.reducer(model.blocks, tokens.join(special, patches[:, order]), moved),
        )
        return [
            to_grid(y, state._replace(source=aux.get("source", state.source)))
            for state, (y, aux) in zip((plain, moved), walks, strict=True)
        ]

    np.testing.assert_allclose(*both(numpy_images(2, SIZE)), atol=1e-4)


def test_patches_that_are_gone_are_filled_by_the_nearest_or_by_the_most_alike():
    here = raster_tokens(1, 1, (1, 4), has_class=True)
    x = jnp.asarray([[[9.0, 0.0], [10.0, 0.0], [20.0, 0.0]]])
    left = here._replace(source=jnp.asarray([[0, -1, -1, 1]], jnp.int32))
    embedded = jnp.asarray([[[1.0, 0.0], [0.1, 3.0], [2.0, 0.1], [0.0, 1.0]]])
    np.testing.assert_array_equal(to_grid(x, left)[0, 0, :, 0], [10, 10, 20, 20])
    np.testing.assert_array_equal(to_grid(x, left, "embedding", embedded)[0, 0, :, 0], [10, 20, 10, 20])
    one = here._replace(source=jnp.asarray([[-1, 0, -1, 1]], jnp.int32))  # 2 is as near to 1 as to 3: the first
    np.testing.assert_array_equal(to_grid(x, one)[0, 0, :, 0], [10, 10, 10, 20])
    with pytest.raises(InputError, match="fill is 'embedding', and the embedded patches are not given"):
        to_grid(x, left, "embedding")


def test_a_mixture_of_rows():
    here = raster_tokens(1, 0, (1, 3), has_class=False)
    spread = tokens.Spread(
        jnp.asarray([[[0, 1], [0, 1], [1, 0]]]), jnp.asarray([[[1.0, 0.0], [0.25, 0.75], [1.0, 0.0]]])
    )
    mixed = here._replace(source=jnp.asarray([[0, 1, 1]], jnp.int32), spread=spread)
    np.testing.assert_allclose(to_grid(jnp.asarray([[[4.0], [8.0]]]), mixed)[0, 0, :, 0], [4, 7, 8])


def test_a_reducer_that_does_not_say_where_patches_are_is_told():
    @dataclass(frozen=True)
    class Silent:
        def __call__(self, blocks, x, state, rngs=None):
            x, state = tokens.keep(x, state, jnp.zeros(state.index.shape), 0.5)
            for block in blocks:
                x, _ = block(x, state)
            return x, {}

    model = model_of("full")
    with pytest.raises(InputError, match=r"returned 8 patch tokens for 15 patches and no aux\['source'\]"):
        jax.eval_shape(lambda x: model.encode(model.embed(x), reducer=Silent()), numpy_images(2, SIZE))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(task="depths"), "task is 'depths'; allowed: 'classification', 'depth', 'segmentation'"),
        (dict(task="depth", fill="zero"), "fill is 'zero'; allowed: 'position', 'embedding'"),
        (dict(fill="zero"), "fill is 'zero'; allowed: 'position', 'embedding'"),
        (dict(task="depth", pool="max"), "pool is 'max'"),
        (
            dict(task="depth", depth=3, decoder_blocks=None),
            "depth is 3, too few for a block of each quarter",
        ),
        (
            dict(task="depth", decoder_blocks=(0, 9)),
            r"decoder_blocks is \(0, 9\); it lists blocks of 0..3 in ascending order",
        ),
        (
            dict(task="depth", decoder="dpt", decoder_blocks=(0, 3)),
            "decoder 'dpt' reads four blocks; decoder_blocks names 2",
        ),
        (dict(task="segmentation", num_classes=1), "num_classes is 1; segmentation tells two classes apart at least"),
        (dict(task="depth", distillation_token=True), "are for classification; the task is 'depth'"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(InputError, match=message):
        lively(FIELDS | fields)
