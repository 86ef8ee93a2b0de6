"""The digest says whether arrays are the same; a backbone's, whether it is the same backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tif_jax.models.params import backbone_digest
from tif_jax.runtime.digests import checksum
from tif_jax.runtime.mesh import make_mesh


def params():
    key = np.random.default_rng(0)
    return {
        "block_0": {"kernel": key.normal(size=(3, 4)).astype(np.float32), "bias": np.zeros(4, np.float32)},
        "scale": np.float32(2),
        "reducer": {"kernel": np.ones(3, np.float32)},
    }


def test_the_digest_depends_on_values_alone():
    numpy = params()
    on_device = jax.device_put(numpy, jax.devices()[-1])
    turned = {
        "scale": numpy["scale"],
        "block_0": dict(reversed(numpy["block_0"].items())) | {"kernel": np.asfortranarray(numpy["block_0"]["kernel"])},
    }
    other_filter = numpy | {"reducer": {"bias": np.zeros(1)}}
    assert {backbone_digest(tree) for tree in (numpy, on_device, turned, other_filter)} == {backbone_digest(params())}
    assert len(backbone_digest(numpy)) == 64


def test_every_change_of_the_backbone_changes_the_digest():
    def changed(**block):
        return params() | {"block_0": params()["block_0"] | block}

    kernel, bias = params()["block_0"].values()
    trees = [
        params(),
        changed(bias=bias + np.float32(1e-30)),
        changed(bias=bias.astype(np.float16)),
        changed(bias=jnp.asarray(bias, jnp.bfloat16)),
        changed(bias=bias[None]),
        changed(kernel=kernel.reshape(4, 3)),
        changed(kernel=kernel[:, ::-1]),
        changed(extra=bias),
        params() | {"block_1": params()["block_0"]},
        {"block_1": params()["block_0"], "scale": params()["scale"]},
    ]
    assert len({backbone_digest(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8])
def test_a_checksum_does_not_depend_on_where_arrays_lie(dtype):
    array = np.random.default_rng(0).normal(scale=50, size=(16, 8, 24)).astype(dtype)
    expected = checksum({"w": array})
    for fsdp in (1, 2, 8):
        for axis in range(3):
            where = NamedSharding(make_mesh(8, fsdp), PartitionSpec(*[None] * axis, "fsdp"))
            assert checksum({"w": jax.device_put(array, where)}) == expected
    assert checksum({"w": np.asfortranarray(array)}) == expected
    assert checksum({"w": array[..., :-1]}) != expected != checksum({"v": array})


def test_a_checksum_notices_every_small_change():
    array = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    bits, found = array.view(np.uint32), [checksum(array)]

    def changed(*places, bit):
        other = bits.copy()
        for place in places:
            other.reshape(-1)[place] ^= np.uint32(1 << bit)
        return checksum(other.view(np.float32))

    found += [changed(place, bit=bit) for place in range(60) for bit in (0, 23, 31)]
    found += [changed(place, other, bit=31) for place in range(60) for other in range(place)]  # two signs
    found += [checksum(array[::-1]), checksum(array[:, ::-1]), checksum(np.roll(array, 1))]
    for place in range(59):  # neighbours that change places
        other = array.copy()
        other.reshape(-1)[place : place + 2] = other.reshape(-1)[place : place + 2][::-1]
        found.append(checksum(other))
    assert len(set(found)) == len(found)
