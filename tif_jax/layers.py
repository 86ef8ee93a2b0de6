"""Layers: what Flax's compute, in a form that XLA compiles to something faster, and what several models share.

Legend: B images, T tokens, D width in, E width out.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# What a model has learned: its parameters, and the running statistics that it normalises with. They live in one tree, so
# that a checkpoint's `params` are all that a prediction needs.
WEIGHTS = (nnx.Param, nnx.BatchStat)


class Linear(nnx.Linear):
    """nnx.Linear as one product of two matrices.

    With the token axis kept, XLA's CPU gradient of the weights copies and transposes, which takes 1.5 times as long.
    """

    def __call__(self, inputs: Float[Array, "... D"], out_sharding=None) -> Float[Array, "... E"]:
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
        return rows.reshape(*inputs.shape[:-1], rows.shape[-1])

    def outputs(self, inputs: Float[Array, "... D"], which: slice) -> Float[Array, "... E"]:
        """Some of the outputs, computed alone."""
        bias = None if self.bias is None else self.bias[...][which]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...][:, which], bias), dtype=self.dtype)
        rows = inputs.reshape(-1, inputs.shape[-1]) @ kernel
        return (rows if bias is None else rows + bias[None]).reshape(*inputs.shape[:-1], rows.shape[-1])


def gelu(x: Float[Array, "..."], approximate: bool) -> Float[Array, "..."]:
    """GELU (Hendrycks & Gimpel 2016), exact or in the tanh approximation, the exact one at least in float32.

    jax.nn.gelu takes erfc for the exact one, which on a CPU is three times as slow as erf and differs where it does not
    matter: in the relative error of outputs near 0.
    """
    if approximate:
        return jax.nn.gelu(x, approximate=True)
    y = at_least_float32(x)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), which Hendrycks & Gimpel (2016) name as the faster approximation of GELU: OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy 2015), computed in at least float32.

    training: by the mean and variance of these inputs, which also move `mean` and `var` a tenth of the way (to the
    unbiased variance, as PyTorch does); else by `mean` and `var`, an affine map.
    """

    def __init__(self, width: int, *, scale: float = 1.0, epsilon: float = 1e-5, momentum: float = 0.9):
        self.scale = nnx.Param(jnp.full((width,), scale))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.mean = nnx.BatchStat(jnp.zeros((width,)))
        self.var = nnx.BatchStat(jnp.ones((width,)))
        self.epsilon, self.momentum = epsilon, momentum

    def __call__(self, x: Float[Array, "... D"], training: bool = False) -> Float[Array, "... D"]:
        rows = at_least_float32(x.reshape(-1, x.shape[-1]))
        if training:
            mean, var = rows.mean(axis=0), rows.var(axis=0)
            unbiased = var * (rows.shape[0] / max(1, rows.shape[0] - 1))
            for running, newest in ((self.mean, mean), (self.var, unbiased)):
                newest = jax.lax.stop_gradient(newest).astype(running.dtype)
                running[...] = self.momentum * running[...] + (1 - self.momentum) * newest
        else:
            # They lie among the parameters: what differentiates by all of those must find them constant.
            mean, var = (jax.lax.stop_gradient(leaf[...]).astype(rows.dtype) for leaf in (self.mean, self.var))
        factor = self.scale[...].astype(rows.dtype) / jnp.sqrt(var + self.epsilon)
        offset = self.bias[...].astype(rows.dtype) - mean * factor
        return (rows * factor[None] + offset[None]).astype(x.dtype).reshape(x.shape)


def drop_path(y: Float[Array, "B T D"], rate: float, rngs: nnx.Rngs | None) -> Float[Array, "B T D"]:
    """Stochastic depth (Huang et al. 2016): a fraction `rate` of the images skips the branch, the rest is rescaled."""
    if rngs is None or rate == 0.0:
        return y
    keep = jax.random.bernoulli(rngs.drop_path(), 1 - rate, (y.shape[0], 1, 1))
    return jnp.where(keep, y / (1 - rate), jnp.zeros((), y.dtype))


def true_float32(dtype: Any) -> AbstractContextManager[Any]:
    """While a model of this dtype is traced in it: float32 is float32 in matrix products, too. Other dtypes stay as they are.

    JAX's default is that TPUs round the factors to bfloat16 and GPUs to TF32 (10 bits of fraction) first, which training
    bears and small differences of losses do not.
    """
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext()


def widened(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 where we compute in that."""
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def at_least_float32(y: Float[Array, "..."]) -> Float[Array, "..."]:
    return y.astype(widened(y.dtype))
