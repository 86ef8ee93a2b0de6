"""LeViT against a slow reference, published sizes, and weights in timm's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cost_of, lively, mostly_long, row_of, write_safetensors
from flax import nnx, traverse_util
from reference_levit import levit_forward, random_levit_tensors
from steps import step_and_state

from tif_jax import reducers, token_impact
from tif_jax.errors import InputError
from tif_jax.layers import BatchNorm
from tif_jax.models import LeViT, blueprint
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.training import losses, optim
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State
from tif_jax.weights import timm_levit
from tif_jax.weights.layout import SAME, Rule
from tif_jax.weights.loading import load
from tif_jax.weights.positions import resize_positions
from tif_jax.weights.pretrained import read_weights
from tif_jax.weights.timm_levit import infer_fields, to_params

TINY = dict(family="levit", image_size=48, widths=(16, 24), depths=(1, 2), num_heads=(2, 3), key_dim=8, num_classes=5)
THREE = dict(widths=(16, 24, 32), depths=(1, 2, 1), num_heads=(2, 3, 4))
EVO = TINY | dict(positions="absolute", class_token=True)


def tiny(**variant):
    return random_levit_tensors(np.random.default_rng(0), **variant)


def changed(**by_name):
    """Tensors of a tiny file with those changed; None takes one away."""
    tensors = tiny() | {name.replace("__", "."): tensor for name, tensor in by_name.items()}
    return {name: t for name, t in tensors.items() if t is not None and not name.endswith("num_batches_tracked")}


def images(height=48, width=48, num=2):
    return np.random.default_rng(1).normal(size=(num, height, width, 3)).astype(np.float32)


def predict(model, x):
    return jax.jit(lambda x: model(x)[0])(x)


def with_flat(model, flat):
    nnx.update(model, traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in flat.items()}, sep="/"))
    return model


@pytest.mark.parametrize(
    ("variant", "size"),
    mostly_long(
        [(THREE | dict(grid=(2, 5)), (32, 80)), (dict(convolutional=True), None), (dict(distilled=False), None)]
    ),
)
def test_same_logits_as_the_reference(tmp_path, variant, size):
    tensors = tiny(**variant)
    path, x = write_safetensors(tmp_path / "w.safetensors", tensors), images(*size or (48, 48))
    model = load(path, **{"image_size": size} if size else {})
    np.testing.assert_allclose(predict(model, x), levit_forward(tensors, x), atol=1e-4)
    aux = jax.eval_shape(model, x)[1]
    assert set(aux) == ({"logits/main", "logits/distillation"} if "head_dist.bn.bias" in tensors else set())


def test_same_logits_as_the_reference_with_class_token_and_absolute_positions():
    tensors = tiny(evo=True)
    rules = timm_levit._rules((1, 2))
    rules |= {"cls_token": Rule("class_token", SAME), "pos_embed": Rule("position_embedding", SAME)}
    rules |= {"stages.1.downsample.pos_embed": Rule("block_1/position_embedding", SAME)}
    read = {rules[name]: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    flat = {path: transform.read(tensor) for (path, transform), tensor in read.items()}
    model = nnx.eval_shape(blueprint(EVO), jax.random.key(0))
    assert set(flat) == set(traverse_util.flatten_dict(params_of(model), sep="/"))
    np.testing.assert_allclose(predict(with_flat(model, flat), images()), levit_forward(tensors, images()), atol=1e-4)


def test_same_logits_as_timm(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    theirs = timm.models.levit.LevitDistilled(
        img_size=48, num_classes=5, embed_dim=(16, 24), key_dim=8, depth=(1, 2), num_heads=(2, 3)
    )
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tiny().items()}
    theirs.load_state_dict(tensors)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images().transpose(0, 3, 1, 2)))
    model = load(write_safetensors(tmp_path / "w.safetensors", tiny()))
    np.testing.assert_allclose(predict(model, images()), expected.numpy(), atol=1e-4)


# Parameters in millions, multiply-adds in millions. LeViT: published. Evo-LeViT: computed from its authors' code.


@pytest.mark.parametrize(
    ("name", "size", "parameters", "mmac"),
    mostly_long(
        [
            ("levit_128s", 224, 7.8, 305), ("levit_128", 224, 9.2, 405), ("levit_192", 224, 10.9, 657),
            ("levit_256", 224, 18.9, 1127), ("levit_384", 224, 39.1, 2352), ("levit_128s", 384, 7.8, 979),
            ("levit_128", 384, 9.2, 1362), ("levit_192", 384, 10.9, 2208), ("levit_256", 384, 18.9, 3653),
            ("levit_384", 384, 39.1, 7347),
        ]
    ),
)  # fmt: skip
def test_published_cost(name, size, parameters, mmac):
    counted = cost_of(name, image_size=size)
    assert counted.parameters / 1e6 == pytest.approx(parameters, abs=0.06)
    assert counted.gmac * 1e3 == pytest.approx(mmac, abs=0.51)
    first, *_, last = counted.tokens
    assert (first, last) == ((196, 16) if size == 224 else (576, 36))


# Steps of the model


def test_batch_norm_in_training():
    norm = BatchNorm(3)
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.0, 1.0, -1.0])
    x = np.random.default_rng(0).normal(2, 3, size=(4, 5, 3)).astype(np.float32)
    rows = x.reshape(-1, 3)
    y = norm(jnp.asarray(x), training=True)
    expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * np.asarray(norm.scale) + np.asarray(norm.bias)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(norm.mean, 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var, 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)


def test_statistics_are_weights_that_no_gradient_reaches():
    graphdef, state = nnx.split(BatchNorm(3))
    x = jnp.arange(6.0).reshape(2, 3)
    grads = jax.jit(jax.grad(lambda state: nnx.merge(graphdef, state)(x).sum()))(state)
    assert {name: bool(jnp.any(grad[...] != 0)) for name, grad in grads.items()} == {
        "scale": True, "bias": True, "mean": False, "var": False
    }  # fmt: skip
    model = nnx.eval_shape(blueprint(TINY), jax.random.key(0))
    assert params_of(model)["block_0"]["mlp"]["up"]["norm"].keys() == grads.keys()
    flat = traverse_util.flatten_dict(params_of(model), sep="/")
    assert len(flat) == len(jax.tree.leaves(nnx.split(model)[1]))
    num_statistics = sum(leaf.size for path, leaf in flat.items() if path.endswith(("/mean", "/var")))
    assert cost(model).parameters == sum(leaf.size for leaf in flat.values()) - num_statistics


def test_training_step_updates_statistics_and_learns():
    model = lively(TINY | dict(widths=(16,), depths=(1,), num_heads=(2,), drop_path=0.1))
    params = params_of(model)
    step, init = step_and_state(model, losses.classification, optim.adamw(100, learning_rate=3e-3, weight_decay=0.5))
    batch = {"image": images(num=8), "label": np.arange(8) % 5}
    first = np.asarray(jax.jit(model.stem.layer_0.conv)(batch["image"])).reshape(-1, 2)
    state = init(params)
    entries = []
    for _ in range(12):
        state, metrics = step(state, batch)
        entries.append(float(metrics["loss"]))
        if len(entries) == 1:
            found, old = (tree["stem"]["layer_0"]["norm"] for tree in (state.params, params))
            np.testing.assert_allclose(found["mean"], 0.9 * old["mean"] + 0.1 * first.mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found["var"], 0.9 * old["var"] + 0.1 * first.var(0, ddof=1), rtol=1e-4)
    assert min(entries[-3:]) < 0.8 * entries[0]
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_a_step_with_a_teacher_updates_all_statistics():
    fields = TINY | dict(widths=(16,), depths=(1,), num_heads=(2,))
    model, teacher = lively(fields), lively(fields, seed=1)
    params = params_of(model)
    optimizer = optim.adamw(1, learning_rate=1e-3, weight_decay=0.0)
    step, init = step_and_state(model, losses.hard_distillation, optimizer, teacher=teacher)
    state, _ = step(init(params), {"image": images(num=8), "label": np.arange(8) % 5})
    found, old = (traverse_util.flatten_dict(tree, sep="/") for tree in (state.params, params))
    statistics = [path for path in old if path.endswith(("/mean", "/var"))]
    assert {path.split("/")[0] for path in statistics} == {"stem", "block_0", "head", "distillation_head"}
    assert not [path for path in statistics if np.array_equal(found[path], old[path])]


def test_statistics_of_parts_of_a_batch_on_several_devices_and_their_average():
    """Each part of a batch moves the statistics a tenth of the way, by all of its images on all devices."""
    model = lively(TINY | dict(widths=(16,), depths=(1,), num_heads=(2,)))
    params = params_of(model)
    optimizer = optim.adamw(9, learning_rate=0.0)
    step, init = step_and_state(model, losses.classification, optimizer, mesh=make_mesh(4), accumulate=2, ema=0.99)
    x = images(num=8)
    state, _ = step(
        init(params), shard({"image": np.asarray(x), "label": np.arange(8, dtype=np.int32) % 5}, make_mesh(4))
    )
    convolved = np.asarray(jax.jit(model.stem.layer_0.conv)(x))
    expected = {name: np.asarray(params["stem"]["layer_0"]["norm"][name]) for name in ("mean", "var")}
    for part in (convolved[::2], convolved[1::2]):
        rows = part.reshape(-1, part.shape[-1])
        newest = {"mean": rows.mean(axis=0), "var": rows.var(axis=0, ddof=1)}
        expected = {name: 0.9 * old + 0.1 * newest[name] for name, old in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(state.params["stem"]["layer_0"]["norm"][name], value, rtol=1e-4, atol=1e-6)
        average = 0.1 * params["stem"]["layer_0"]["norm"][name] + 0.9 * value  # of the first step
        np.testing.assert_allclose(state.ema["stem"]["layer_0"]["norm"][name], average, rtol=1e-4, atol=1e-6)


def test_key_log_weight_of_minus_infinity_removes_a_token():
    block = lively(EVO).blocks[0]
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    weight = jnp.zeros((2, 6)).at[:, 3].set(-jnp.inf)
    without = jnp.delete(x, 3, axis=1)
    all_of, some_of = jax.jit(lambda x, y: (block(x, row_of(x), weight)[0], block(y, row_of(y))[0]))(x, without)
    np.testing.assert_allclose(np.delete(all_of, 3, axis=1), some_of, atol=1e-5 * np.abs(some_of).max())


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    model = lively(EVO, dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(params_of(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.embed, images()).dtype == jnp.bfloat16
    logits = predict(model, images())
    assert logits.dtype == jnp.float32
    exact = np.asarray(predict(lively(EVO), images()))
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("fields", mostly_long([TINY, EVO | dict(class_head=True)], short=(1,)))
def test_strict_dtypes_and_heads_in_training(fields, strict_dtypes):
    model = nnx.eval_shape(blueprint(fields, drop_path=0.1, dtype="bfloat16"), jax.random.key(0))
    graphdef, params = nnx.split(model)
    logits, aux = jax.eval_shape(lambda params, x: nnx.merge(graphdef, params)(x, nnx.Rngs(0)), params, images())
    class_heads = {"logits/class", "logits/class_distillation"} if "class_head" in fields else set()
    assert aux.keys() == {"logits/main", "logits/distillation"} | class_heads
    assert {leaf.dtype for leaf in (logits, *aux.values())} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(image_size=40), "40x40 is not a multiple of 16"),
        (dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\) and num_heads \(2, 3\) need one entry per stage"),
        (dict(depths=(1, 0)), r"depths is \(1, 0\); it is a tuple of whole numbers, at least 1"),
        (dict(widths=(12, 24)), "the first width is 12; the stem needs a multiple of 8"),
        (dict(key_dim=5), "width 16 is not a multiple of key_dim 5"),
        (dict(positions="none"), "positions is 'none'; allowed"),
        (dict(class_token=True), "class_token=True needs positions='absolute'"),
        (dict(class_head=True), "class_head=True needs class_token=True"),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(patch_size=8), "Unknown model fields patch_size. Known: activation"),
        (dict(family="resnet"), "family is 'resnet'; allowed: 'vit', 'levit'"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(InputError, match=message):
        nnx.eval_shape(blueprint(TINY | fields), jax.random.key(0))


@pytest.mark.parametrize("name", sorted(set(reducers.known()) - {"full", "evo_levit"}))
def test_reducers_that_do_not_walk_pyramids_are_refused(name):
    with pytest.raises(InputError, match=r"can not reduce a LeViT, .*; use reducer 'full', or 'evo_levit'"):
        nnx.eval_shape(blueprint(EVO, reducer=name), jax.random.key(0))


def test_what_needs_a_vit():
    with pytest.raises(InputError, match="impact needs a ViT; a LeViT has no token for each patch"):
        token_impact(lively(TINY), images(), np.zeros(2, int))
    with pytest.raises(InputError, match=r"takes \(B, 48, 48, 3\)"):
        lively(TINY)(images(32, 48))


# Weights


def test_read_weights(tmp_path):
    fields, params = read_weights(write_safetensors(tmp_path / "w.safetensors", tiny(convolutional=True)))
    assert fields == TINY | dict(
        positions="relative", class_token=False, distillation_head=True, activation="hard_swish"
    )
    shapes = params_of(nnx.eval_shape(blueprint(fields), jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert {(type(p), p.dtype) for p in jax.tree.leaves(params)} == {(np.ndarray, np.dtype("float32"))}


def test_fresh_heads(tmp_path):
    path = write_safetensors(tmp_path / "w.safetensors", tiny())
    fields, params = read_weights(path, num_classes=7)
    assert fields["num_classes"] == 7 and not {"head", "distillation_head"} & params.keys()


def test_checkpoint_keeps_the_statistics(tmp_path):
    model = load(write_safetensors(tmp_path / "w.safetensors", tiny()))
    config = {"model": TINY, "reducer": {"name": "full"}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(State(jnp.int32(0), params_of(model), ()), config, {})
    again = load(tmp_path)
    assert isinstance(again, LeViT)
    jax.tree.map(np.testing.assert_array_equal, params_of(again), params_of(model))
    with pytest.raises(InputError, match="biases are for 3x3 patches and are not resized; leave image_size at 48x48"):
        load(tmp_path, image_size=64)


def test_absolute_positions_are_resized():
    old, new = (
        params_of(nnx.eval_shape(blueprint(EVO | THREE | dict(image_size=s)), jax.random.key(0))) for s in (64, 112)
    )
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), old)
    resized = resize_positions(ones, (4, 4), (7, 7))
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, new)
    for tree in (resized, resized["block_1"], resized["block_4"]):
        np.testing.assert_allclose(tree["position_embedding"], 1, rtol=1e-5)


QKV = "stages__1__blocks__0__attn__qkv__linear__weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(head__bn__bias=None, **{QKV.replace("__0__", "__1__"): None}),
         "missing: head.bn.bias, stages.1.blocks.1.attn.qkv.linear.weight"),
        (changed(head__bn__bias=np.zeros(31)), r"wrong: head.bn.bias has shape \(31,\), which gives \(31,\), not"),
        (changed(stem__conv1__bn__weight=np.zeros(2, int)), "stem.conv1.bn.weight has dtype int64, not a float"),
        (changed(stages__1__blocks__0__x=np.zeros(3), norm__bias=np.zeros(3)), "surplus: norm.bias, stages.1.blocks.0.x"),
        (changed(stem__conv4__linear__weight=None), "a stem of stride 8"),
        (changed(stem__conv1__linear__weight=None), r"not a LeViT in timm's layout: no stem.conv1.linear.weight"),
        (changed(**{QKV: None}), "no stages.1.blocks.0.attn.qkv.linear.weight"),
        (changed(**{QKV: np.zeros(24)}), r"shape of stages.1.blocks.0.attn.qkv.linear.weight \(24,\) is impossible"),
        (changed(**{QKV: np.zeros((80, 24))}), "do not explain the attn.qkv tensors"),
        (changed(stages__0__blocks__0__attn__attention_biases=np.zeros((2, 6))), "6 patches, no square raster; give the"),
        (changed(head__linear__weight=None), r"no head \(head.linear.weight\); give num_classes"),
        ({"blocks.0.m.qkv.c.weight": np.zeros(3)}, "'blocks.0.m.qkv.c.weight' belongs to the layout of the authors' own"),
        ({"patch_embed.0.c.weight": np.zeros(3)}, "'patch_embed.0.c.weight' belongs to the layout of the authors' own"),
        ({"levit.encoder.stages.0.layers.0.module.queries_keys_values.linear.weight": np.zeros(3)}, "HF transformers"),
    ],
)  # fmt: skip
def test_layout_that_does_not_fit(tensors, message):
    assert timm_levit.is_levit(tensors)
    with pytest.raises(InputError, match=message) as error:
        to_params(tensors, infer_fields(tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(image_size=64), r"w\.safetensors: the attention biases are for 3x3 patches and are not resized"),
        (dict(key_dim=4), r"key_dim=4 \(the file: 8\) contradicts the weights"),
    ],
)
def test_given_fields_that_do_not_fit(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        read_weights(write_safetensors(tmp_path / "w.safetensors", tiny()), **given)
