"""The digest says whether arrays are the same; a backbone's, whether it is the same backbone."""

import jax
import jax.numpy as jnp
import numpy as np

from tif_jax.models.params import backbone_digest


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
