"""Layers that compute what Flax's do, in a form that XLA compiles to something faster.

Legend: D width in, E width out.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Linear):
    """nnx.Linear as one product of two matrices.

    With the token axis kept, XLA's CPU gradient of the weights copies and transposes, which takes 1.5 times as long.
    """

    def __call__(self, inputs: Float[Array, "... D"], out_sharding=None) -> Float[Array, "... E"]:
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
        return rows.reshape(*inputs.shape[:-1], rows.shape[-1])


def gelu(x: Float[Array, "..."], approximate: bool) -> Float[Array, "..."]:
    """GELU (Hendrycks & Gimpel 2016), exact or in the tanh approximation, the exact one at least in float32.

    jax.nn.gelu takes erfc for the exact one, which on a CPU is three times as slow as erf and differs where it does not
    matter: in the relative error of outputs near 0.
    """
    if approximate:
        return jax.nn.gelu(x, approximate=True)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)
