"""Each of JAX's operations that has a translation computes in onnxruntime what it computes in JAX, at two batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tif_jax import InputError
from tif_jax.export import onnx_indexing, onnx_ops
from tif_jax.export.fusion import fused
from tif_jax.export.onnx import graph_of
from tif_jax.export.program import traced

onnxruntime = pytest.importorskip("onnxruntime")

# x: (B, 6, 5), normal; ranks: (B, 6), a permutation of 0..5 in each row.
CASES = {
    "arithmetic": lambda x, ranks: jnp.maximum(x * 2 - 1, -x) / (1 + jnp.abs(x)) ** 3,
    "functions": lambda x, ranks: jnp.sin(x) + jnp.cos(x) + jnp.tanh(x) + jnp.exp(x) + jnp.log(jnp.abs(x))
    + lax.rsqrt(x * x) + lax.sqrt(x * x),
    "more functions": lambda x, ranks: jax.nn.sigmoid(x) * jnp.sign(x) + jnp.floor(x) - jnp.ceil(x) + lax.pow(jnp.abs(x), x),
    "clamp": lambda x, ranks: lax.clamp(-0.5, x, 0.5) + jnp.minimum(x, 0.1),
    "remainder": lambda x, ranks: lax.rem(x, jnp.float32(0.7)) + lax.rem(ranks, 4)[..., None],
    "truth": lambda x, ranks: jnp.where((x > 0) & ~(x < 1) | (x == 0) ^ (x != x), x, 7) + (ranks >= 2)[..., None] + (x <= 0),
    "any and all": lambda x, ranks: jnp.stack([(x > 1).any(axis=1), (x > -1).all(axis=1)], axis=1),
    "reductions": lambda x, ranks: x.sum(axis=(1, 2)) + x.max(axis=(1, 2)) * x.min(axis=(1, 2)) + x.prod(axis=(1, 2)),
    "argmax": lambda x, ranks: x.argmax(axis=1) - x.argmin(axis=1),
    "cumsum": lambda x, ranks: jnp.cumsum(x, axis=1) + lax.cumsum(x, axis=2, reverse=True),
    "softmax": lambda x, ranks: jax.nn.softmax(x, axis=1),
    "softmax and what it is made of": lambda x, ranks: jax.nn.softmax(x, axis=2) + jnp.exp(x - x.max(axis=2, keepdims=True)),
    "mean and variance": lambda x, ranks: (x - x.mean(axis=1, keepdims=True)) * lax.rsqrt(x.var(axis=1, keepdims=True) + 1),
    "nearly gelu": lambda x, ranks: 0.5 * x * (1 + lax.erf(x * 0.6)),
    "reshape": lambda x, ranks: x.reshape(-1, 15).reshape(-1, 3, 2, 5).swapaxes(1, 2)[:, None, 0],
    "spread": lambda x, ranks: jnp.broadcast_to(x[:, :1, :, None], (*x.shape, 2)).sum(axis=1),
    "slices": lambda x, ranks: x[:, 1:5:2] + x[:, :2] + lax.slice_in_dim(x, 1, 6, 3, axis=1),
    "axes that come and go": lambda x, ranks: lax.squeeze(lax.expand_dims(x, (1, 4)), (1,)),
    "split": lambda x, ranks: jnp.split(x, [2, 3], axis=2)[2] * jnp.split(x, 3, axis=1)[1][:, :1, :2],
    "concatenate": lambda x, ranks: jnp.concatenate([x, x[:, :0], -x], axis=1),
    "stack and tile": lambda x, ranks: jnp.tile(jnp.stack([x, -x], axis=2), (1, 2, 1, 1)),
    "pad": lambda x, ranks: jnp.pad(x, ((0, 0), (2, 0), (0, 1)), constant_values=3),
    "numbers of images": lambda x, ranks: x + jnp.arange(x.shape[0], dtype=x.dtype)[:, None, None] * x.shape[0],
    "what was spread before": lambda x, ranks: jnp.concatenate(
        [jnp.cumsum(numbers := jnp.broadcast_to(jnp.arange(6.0)[None], x.shape[:2]), axis=1), jnp.abs(2 - numbers)], axis=1
    ),
    "products": lambda x, ranks: jnp.einsum("bnd,bmd->bnm", x, x) @ jnp.ones((6, 2))
    + jnp.einsum("bnd,bmd->b", x, x)[:, None, None],
    "outer product": lambda x, ranks: jnp.einsum("bn,bmd->bmdn", x[:, :, 0], x),
    "convolution": lambda x, ranks: lax.conv_general_dilated(
        x[..., None], jnp.arange(18.0).reshape(3, 3, 1, 2), (2, 1), ((1, 0), (0, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "gather rows": lambda x, ranks: jnp.take_along_axis(x, ranks[:, :3, None], axis=1),
    "gather elements": lambda x, ranks: jnp.take_along_axis(x, ranks[..., None] % 4 + jnp.arange(2)[None, None], axis=2),
    "gather of the batch": lambda x, ranks: x[jnp.arange(x.shape[0])[:, None], ranks],
    "look up": lambda x, ranks: jnp.arange(12.0)[ranks * 2] + jnp.arange(60.0).reshape(2, 6, 5)[:, ranks].sum(axis=(0, -1)),
    "columns": lambda x, ranks: x[:, :, np.array([4, 0, 0])],
    "scatter": lambda x, ranks: jax.vmap(lambda x, i, y: x.at[i].set(y, unique_indices=True))(x, ranks[:, :2], -x[:, :2]),
    "scatter and add": lambda x, ranks: x.at[jnp.arange(x.shape[0])[:, None], ranks // 2].add(x),
    "scatter and take the larger": lambda x, ranks: x.at[jnp.arange(x.shape[0])[:, None], ranks // 2].max(x),
    "scatter to fixed places": lambda x, ranks: jnp.zeros_like(x).at[:, np.array([4, 1])].set(x[:, :2]),
    "sort": lambda x, ranks: jnp.sort(x, axis=1) + jnp.argsort(x, axis=1),
    "sort truth": lambda x, ranks: jnp.argsort(ranks % 2 == 0, axis=1, stable=True),
    "top k": lambda x, ranks: lax.top_k(x, 3)[0] + lax.top_k(x, 3)[1],
    "ties": lambda x, ranks: lax.top_k(ranks // 2, 4)[1],
}  # fmt: skip


def on_ranks(function):
    def call(x):
        return [function(x, jnp.argsort(jnp.argsort(x[:, :, 0], axis=1), axis=1).astype(jnp.int32))]

    return call


@pytest.mark.parametrize("name", CASES)
def test_an_operation(name):
    function = on_ranks(CASES[name])
    session = onnxruntime.InferenceSession(graph_of(fused(traced(function, (6, 5))), ["y"], "none"))
    for size in (1, 3):
        x = np.random.default_rng(size).standard_normal((size, 6, 5), np.float32)
        (found,), (expected,) = session.run(["y"], {"images": x}), jax.jit(function)(x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_translation_is_tried():
    """But for what the models have (`test_export`) or what fusion makes of others."""
    tried = {"gelu", "layer_norm"}
    for function in CASES.values():
        program = traced(on_ranks(function), (6, 5))
        tried |= {operation.name for operation in (*program.operations, *fused(program).operations)}
    assert {*onnx_ops.RULES, *onnx_indexing.RULES} <= tried


def test_what_has_no_translation():
    for function, message in [
        (lambda x: [jnp.fft.rfft(x).real], "no translation of fft"),
        (lambda x: [lax.sort((x, x), num_keys=2)[0]], "no translation of sort by several keys"),
        (lambda x: [lax.scan(lambda c, y: (c + y, c), x[:, 0], x.swapaxes(0, 1))[0]], "no translation of scan"),
    ]:
        with pytest.raises(InputError, match=f"'mine' can not be exported to ONNX: .*{message}"):
            graph_of(fused(traced(function, (6, 5))), ["y"], "mine")
