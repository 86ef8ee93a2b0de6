"""Training is the same on any number of devices, however parameters are divided among them, and takes up anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mostly_long, numpy_model
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from steps import step_and_state

from tif_jax.errors import InputError
from tif_jax.models.gradients import for_gradients
from tif_jax.models.params import params_of
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.training import losses, optim
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.mixing import Mixing
from tif_jax.training.state import shardings

TINY = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3)
NUM_STEPS = 50


def mesh_of(data, fsdp=1):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(16, 16, 16, 3)).astype(np.float32),
        "label": rng.integers(3, size=16).astype(np.int32),
    }


@functools.cache
def training(mesh, *, stochastic=True, accumulate=1, remat=False):
    """A training step and how to make its first state."""
    model = numpy_model(TINY | dict(remat=remat, drop_path=0.2 if stochastic else 0.0))
    optimizer = optim.adamw(100, learning_rate=5e-3, weight_decay=0.1, clip_norm=1.0)
    params = jax.device_get(params_of(model))
    trainable = optim.match((("position_embedding", False),), params, True)
    step, init = step_and_state(
        model, losses.classification, optimizer, trainable, mesh, stochastic=stochastic,
        mixing=Mixing(mixup=0.8, cutmix=1.0) if stochastic else None, accumulate=accumulate, ema=0.9,
    )  # fmt: skip
    return step, lambda: init(params)


def losses_of(mesh, state=None, steps=range(NUM_STEPS), **options):
    step, fresh = training(mesh, **options)
    state, told = fresh() if state is None else state, []
    for i in steps:
        state, metrics = step(state, shard(batch(i % 4), mesh))
        told.append(metrics["loss"])
    return np.array(jax.device_get(told)), state


@functools.cache
def on_one_device():
    return losses_of(mesh_of(1))


@pytest.mark.parametrize("data, fsdp, remat", mostly_long([(4, 1, False), (8, 1, True), (4, 2, False)], (1, 2)))
def test_loss_curves_coincide(data, fsdp, remat):
    expected, _ = on_one_device()
    found, _ = losses_of(mesh_of(data, fsdp), remat=remat)
    assert expected[-4:].mean() < expected[:4].mean() - 0.1  # there is a curve
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_parameters_moments_and_average_are_divided():
    state = training(mesh_of(4, 2))[1]()
    kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        divided = leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        assert divided == (name.endswith(("kernel']", "embedding']")) and leaf.shape[-1] % 2 == 0), name
        kernels += "block_0']['mlp']['up']['kernel" in name
    assert kernels == 4  # parameter, two moments, average
    after = training(mesh_of(4, 2))[0](state, shard(batch(0), mesh_of(4, 2)))[0]
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == shardings(after, mesh_of(4, 2))


def test_a_table_says_what_is_divided():
    state = training(mesh_of(1))[1]()
    where = shardings(state, mesh_of(1, 8), ((r"mlp/up/kernel$", 0), (r"head/kernel$", 1)))
    assert where.params["block_0"]["mlp"]["up"]["kernel"].spec == PartitionSpec("fsdp", None)
    assert where.params["head"]["kernel"].spec == PartitionSpec()  # 3 classes over 8 devices
    assert where.params["block_0"]["mlp"]["down"]["kernel"].spec == PartitionSpec()
    with pytest.raises(InputError, match="no parameter path matches 'kernal'"):
        shardings(state, mesh_of(1, 8), (("kernal", 0),))


def test_the_average_follows_the_parameters():
    step, fresh = training(mesh_of(1))
    state = fresh()
    expected = jax.device_get(state.params)
    for i in range(3):
        state, _ = step(state, shard(batch(i), mesh_of(1)))
        decay = (0.1, 2 / 11, 3 / 12)[i]  # on its way to 0.9
        expected = jax.tree.map(
            lambda a, p, decay=decay: decay * a + (1 - decay) * p, expected, jax.device_get(state.params)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(state.ema), expected)


def test_a_batch_in_parts_is_the_same_batch():
    whole, expected = losses_of(mesh_of(4), steps=range(5), stochastic=False)
    parts, found = losses_of(mesh_of(4), steps=range(5), stochastic=False, accumulate=2)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found.params, expected.params)


def test_rematerialisation_keeps_less():
    barriers = []  # by which the compiler is kept from undoing it
    for remat in (False, True):
        step, fresh = training(mesh_of(8), remat=remat)
        program = step.func.lower(*step.args, fresh(), shard(batch(0), mesh_of(8)))
        barriers.append(program.as_text().count("optimization_barrier"))
    assert barriers[0] == 0 < barriers[1]


def test_blocks_that_keep_products_alone_have_the_same_gradient():
    model, images = numpy_model(TINY), jnp.asarray(batch(0)["image"])
    found = []
    for one in (model, for_gradients(model, jax.devices())):
        graphdef, params = nnx.split(one)
        loss = lambda params, graphdef=graphdef: (nnx.merge(graphdef, params)(images)[0] ** 2).sum()  # noqa: E731
        found.append(jax.grad(loss)(params))
        has_any = "DotsSaveable" in str(jax.make_jaxpr(jax.grad(loss))(params))
        assert has_any == (one is not model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
    step, fresh = training(mesh_of(1))  # this is a CPU
    assert "DotsSaveable" in str(jax.make_jaxpr(step.func)(*step.args, fresh(), shard(batch(0), mesh_of(1))))


@pytest.mark.parametrize("to", [(4, 2), pytest.param((1, 1), marks=pytest.mark.long)])
def test_a_checkpoint_goes_on_elsewhere(tmp_path, to):
    there, here = mesh_of(4), mesh_of(*to)
    _, state = losses_of(there, steps=range(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {}, {})
    expected, _ = losses_of(there, state, range(3, 6))
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(training(here)[1]())
    found, _ = losses_of(here, restored, range(3, 6))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_meshes():
    assert make_mesh(8).shape == {"data": 8, "fsdp": 1}
    assert make_mesh(7).shape == {"data": 7, "fsdp": 1}
    assert make_mesh(16, fsdp=4).shape == {"data": 2, "fsdp": 4}
    assert make_mesh(6, fsdp=2).shape == {"data": 3, "fsdp": 2}
    with pytest.raises(InputError, match=r"a batch of 7 .* sharding.fsdp 4"):
        make_mesh(7, fsdp=4)
