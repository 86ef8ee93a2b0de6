"""Rotary positions, SwiGLU and norms inside a block: EVA-02, DINOv3 and their like, against a slow numpy forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mostly_long, numpy_images, numpy_model, row_of, write_safetensors
from flax import nnx
from reference_eva import LAYOUTS, eva_forward, random_eva_tensors

from tif_jax import reducers, token_impact
from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model, with_defaults
from tif_jax.models.names import model_fields
from tif_jax.models.params import params_of
from tif_jax.models.rotary import Rotary
from tif_jax.tokens import at_rows, attention_logits, keep
from tif_jax.weights import timm_eva
from tif_jax.weights.loading import load
from tif_jax.weights.pretrained import read_weights, to_tensors

SIZE = (12, 16)  # 3 x 4 patches of 4x4 pixels


def tensors_of(name):
    kind, drawn, _ = LAYOUTS[name]
    return random_eva_tensors(np.random.default_rng(0), kind, **drawn)


def loaded(tmp_path, name, **options):
    how = dict(preprocessing=dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=1.0, interpolation="bicubic"))
    path = write_safetensors(tmp_path / f"{name}.safetensors", tensors_of(name))
    return load(path, num_heads=2, image_size=SIZE, pool=LAYOUTS[name][2], **how, **options)


def expected_of(name, x, **options):
    kind, _, pool = LAYOUTS[name]
    return eva_forward(tensors_of(name), x, kind, pool=pool, **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_logits_as_the_reference_and_back(tmp_path, name):
    model, x = loaded(tmp_path, name), np.asarray(numpy_images(2, SIZE))
    expected = expected_of(name, x)
    np.testing.assert_allclose(jax.jit(lambda x: model(x)[0])(x), expected, atol=2e-4)
    elsewhere = np.roll(np.stack(np.divmod(np.arange(12), 4), -1)[None], 1, axis=1).astype(float)
    assert np.abs(expected_of(name, x, around=elsewhere) - expected).max() > 0.01  # positions matter
    fields, params = read_weights(tmp_path / f"{name}.safetensors", num_heads=2, image_size=SIZE, pool=LAYOUTS[name][2])
    written, _ = to_tensors(params, fields)
    assert written.keys() == tensors_of(name).keys()
    for key, tensor in tensors_of(name).items():
        np.testing.assert_array_equal(written[key], tensor)


def among(kept, num_patches=12):
    """(B, N) whether a patch is among those kept."""
    return (np.asarray(kept)[:, :, None] == np.arange(num_patches)).any(axis=1)


FROM = {  # a reducer that drops: its options, and the block from which on what it drops is no key any more
    "random": (dict(keep_ratio=0.5), 0),
    "evit": (dict(keep_ratio=0.5, sites=(0,), fuse=False), 1),
    "dynamic_vit": (dict(keep_ratio=0.5, sites=(1,)), 1),
    "tif": (dict(keep_ratio=0.5, then=dict(name="evit", keep_ratio=1.0)), 0),
    "norm": (dict(keep_ratio=0.5), 0),
    "prior": (dict(keep_ratio=0.5), 0),
}


@pytest.mark.parametrize("reducer", mostly_long(FROM, short=(1, 2)))
def test_what_is_dropped_is_what_is_masked_out_at_its_own_place(tmp_path, reducer):
    options, start = FROM[reducer]
    model, x = loaded(tmp_path, "dinov3", reducer=reducer, **options), np.asarray(numpy_images(2, SIZE))
    logits, aux = jax.jit(lambda x: model(x))(x)
    alive = [among(aux["kept"]) if i >= start else np.ones((2, 12), bool) for i in range(3)]
    assert alive[2].sum() == 12
    np.testing.assert_allclose(logits, expected_of("dinov3", x, alive=alive), atol=2e-4)


SKIPPED = {
    "tosa": (dict(keep_ratio=0.5, layers=(1,)), [1]),
    "evo_vit": (dict(stages=(1,), representative=False), [1, 2]),
}


@pytest.mark.parametrize("reducer", mostly_long(SKIPPED))
def test_what_skips_a_block_is_no_key_in_it(tmp_path, reducer):
    options, blocks = SKIPPED[reducer]
    model, x = loaded(tmp_path, "rope_vit", reducer=reducer, **options), np.asarray(numpy_images(2, SIZE))
    logits, aux = jax.jit(lambda x: model(x))(x)
    alive = [among(aux["kept"]) if i in blocks else np.ones((2, 12), bool) for i in range(3)]
    np.testing.assert_allclose(logits, expected_of("rope_vit", x, alive=alive, skip=True), atol=2e-4)


class Spy:
    """A block that notes where its tokens lie."""

    def __init__(self, block, seen):
        self.block, self.seen = block, seen

    def attend(self, x, tokens, *args, **kwargs):
        self.seen.append(tokens.position)
        return self.block.attend(x, tokens, *args, **kwargs)

    def feed_forward(self, *args, **kwargs):
        return self.block.feed_forward(*args, **kwargs)


def test_a_merged_token_lies_at_the_mean_of_its_members(tmp_path):
    model = loaded(tmp_path, "dinov3", reducer="tome", num_merged=(3, 2, 0))

    @jax.jit
    def walk(x):
        seen, tokens = [], model.tokens(2)
        _, aux = model.reducer([Spy(block, seen) for block in model.blocks], model.embed(x), tokens)
        return tokens.position, seen, aux["source"]

    place, seen, source = map(jax.device_get, walk(numpy_images(2, SIZE)))
    np.testing.assert_array_equal(place, np.tile(np.stack(np.divmod(np.arange(12), 4), -1)[None], (2, 1, 1)))
    assert [position.shape[1] for position in seen] == [12, 9, 7]
    for b in range(2):
        means = [place[b, source[b] == row].mean(axis=0) for row in range(7)]
        np.testing.assert_allclose(seen[2][b], means, atol=1e-5)


def test_a_reducer_that_forgets_the_tokens_is_told(tmp_path):
    model = loaded(tmp_path, "rope_vit")
    x, tokens = jnp.zeros((2, 13, 16)), model.tokens(2)
    fewer, left = keep(x, tokens, jnp.zeros((2, 12)), 0.5)
    jax.eval_shape(lambda x: model.blocks[0](x, left), fewer)
    with pytest.raises(
        InputError, match="a block got 7 tokens and the positions of 12 patches behind 1 special tokens"
    ):
        model.blocks[0].attend(fewer, tokens)


@pytest.mark.parametrize("kind", ["eva02", "rope_vit", "dinov3"])
def test_logits_know_distances_alone(kind):
    rng, rotary = np.random.default_rng(0), Rotary(kind, 8, (3, 4))
    query, key = (jnp.asarray(rng.normal(size=(1, 12, 2, 8)), jnp.float32) for _ in range(2))
    here = row_of(query)._replace(position=jnp.asarray(rng.uniform(0, 4, (1, 12, 2)), jnp.float32))
    there = here._replace(position=here.position + jnp.asarray([[[1.5, -0.25]]]))
    logits = [attention_logits(rotary.turn(query, at), rotary.turn(key, at)) for at in (here, there)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    assert np.abs(logits[0] - attention_logits(query, key)).max() > 0.1
    order = jnp.asarray(rng.permutation(12), jnp.int32)[None]  # positions follow their tokens
    moved = rotary.turn(query[:, order[0]], at_rows(here, order))
    np.testing.assert_array_equal(moved, rotary.turn(query, here)[:, order[0]])


@pytest.mark.parametrize(
    ("name", "mask"),
    mostly_long(
        [("dinov3", "drop"), ("rope_vit", "zero"), ("eva02_clip", "drop"), ("eva02_base", "zero"), ("eva02_clip", "zero"),
         ("rope_vit", "drop"), ("dinov3", "zero")],
        short=(0, 1),
    ),
)  # fmt: skip
def test_exact_impact_is_brute_force(tmp_path, name, mask):
    model, x, labels = loaded(tmp_path, name), np.asarray(numpy_images(2, SIZE)), np.array([0, 2])

    def loss(**options):
        logits = expected_of(name, x, **options)
        return np.log(np.exp(logits).sum(axis=1)) - logits[[0, 1], labels]

    expected = []
    for i in range(12):
        without = np.broadcast_to(np.arange(12) != i, (2, 12))
        how = dict(zeroed=[i]) if mask == "zero" else dict(alive=[without] * 3)
        expected.append(loss(**how) - loss())
    impact = token_impact(model, x, labels, mask=mask, chunk=6)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(impact, np.stack(expected, axis=1), atol=5e-4)


def test_gates_remove_what_drop_removes(tmp_path):
    """The finite difference of the gated loss, towards which `gradient` goes."""
    model, x = loaded(tmp_path, "rope_vit"), jnp.asarray(numpy_images(2, SIZE))
    gradient = token_impact(model, x, np.array([0, 2]), estimator="gradient")
    tokens, step = model.tokens(2), 1e-2

    @jax.jit
    def loss(gates):
        y = model.embed(x)
        for block in model.blocks:
            y, _ = block(y, tokens, jnp.pad(jnp.log(gates), ((0, 0), (1, 0))))
        return -jax.nn.log_softmax(model.predict(y, {}, gates)[0])[jnp.arange(2), jnp.asarray([0, 2])]

    for i in (0, 7):
        up, down = (jnp.ones((2, 12)).at[:, i].add(by) for by in (step, -step))
        np.testing.assert_allclose(gradient[:, i], -(loss(up) - loss(down)) / (2 * step), atol=2e-3)


def test_another_image_size(tmp_path):
    """Rotary positions need no resizing; EVA-02's coordinates are for 16 x 16 patches whatever the raster."""
    path = write_safetensors(tmp_path / "w.safetensors", tensors_of("dinov3"))
    fields, params = read_weights(path, num_heads=2, pool="normed_mean", image_size=(16, 8))
    x = np.asarray(numpy_images(1, (16, 8)))
    model = numpy_model(fields | dict(image_size=(16, 8)))
    nnx.update(model, jax.tree.map(jnp.asarray, params))
    assert "position_embedding" not in params_of(model)
    expected = eva_forward(tensors_of("dinov3"), x, "dinov3", pool="normed_mean")
    np.testing.assert_allclose(jax.jit(lambda x: model(x)[0])(x), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rotary="rope"), "rotary is 'rope'; allowed: None, 'eva02', 'rope_vit', 'dinov3'"),
        (dict(rotary="dinov3", rotary_grid=16), "stretches every raster to -1 to 1; leave out rotary_grid"),
        (dict(rotary="dinov3", width=12), "heads of 6 channels; rotary positions need a multiple of 4"),
        (dict(rotary="dinov3", rotary_temperature=0.0), "rotary_temperature"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(InputError, match=message):
        create_model(dict(image_size=16, patch_size=8, width=16, num_heads=2, depth=1) | fields)


def test_what_is_not_read_is_named(tmp_path):
    """Learned frequencies; RMSNorm; a half of what belongs together."""
    base = tensors_of("rope_vit")
    mixed = base | {"rope.freqs": np.ones((2, 3, 2, 4), np.float32)}
    rms = {name: tensor for name, tensor in base.items() if not name.endswith("norm1.bias")}
    half = {name: tensor for name, tensor in tensors_of("eva02_base").items() if "blocks.1.attn.k_proj" not in name}
    for tensors, message in ((mixed, "learned frequencies"), (rms, "RMSNorm"), (half, r"blocks.1.attn.\w_proj")):
        with pytest.raises(InputError, match=message):
            read_weights(write_safetensors(tmp_path / "w.safetensors", tensors), num_heads=2, image_size=SIZE)


@pytest.mark.parametrize(
    "name", mostly_long(["eva02_small_patch14_224", "eva02_large_patch14_224", "vit_base_patch16_dinov3"], short=(0, 2))
)
def test_names_are_what_their_files_are_read_as(name):
    """A file of the shapes that a model by this name has is read as that model."""
    fields = with_defaults(model_fields(name) | dict(num_classes=7))
    model = nnx.eval_shape(blueprint(fields), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params_of(model))
    tensors = timm_eva.to_tensors(params, fields)
    again = timm_eva.infer_fields(tensors, image_size=fields["image_size"])
    assert with_defaults(again) == fields | dict(mlp_dim=again["mlp_dim"])


@pytest.mark.parametrize("reducer", mostly_long([name for name in reducers.known() if name != "full"], short=(2,)))
def test_keeping_everything_is_the_plain_model(tmp_path, reducer):
    x = numpy_images(2, SIZE)
    options = dict(num_merged=0) if "num_merged" in reducers.options(reducer) else dict(keep_ratio=1.0)
    reduced, plain = loaded(tmp_path, "dinov3", reducer=reducer, **options), loaded(tmp_path, "dinov3")
    both = [jax.jit(lambda x, model=model: model(x)[0])(x) for model in (reduced, plain)]
    np.testing.assert_allclose(*both, atol=1e-5 * np.abs(both[1]).max())
