"""How a ViT makes one vector of its patch tokens.

Legend: B images, S patch tokens left, D width, H heads, C channels of a head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.layers import Linear, at_least_float32
from tif_jax.models.vit_blocks import FeedForward
from tif_jax.tokens import attention_logits

# In which a class token, a mean and a learned query are read: see `ViT`.
POOLS = ("class", "mean", "normed_mean", "class_and_mean", "attention")


def weighted_mean(patches: Float[Array, "B S D"], weight: Float[Array, "B S"] | None) -> Float[Array, "B D"]:
    """The mean of the tokens, each with its weight. 0 where a mask left nothing."""
    rows = at_least_float32(patches)
    weight = jnp.ones(rows.shape[:2], rows.dtype) if weight is None else weight
    total = weight.sum(axis=1, keepdims=True)
    return (jnp.einsum("bnd,bn->bd", rows, weight) / jnp.where(total > 0, total, 1)).astype(patches.dtype)


class AttentionPooling(nnx.Module):
    """A learned query attends to the patch tokens, and a feed-forward network follows (Zhai et al. 2022; SigLIP).

    The same as timm's AttentionPoolLatent with one latent, and the `map` head of big_vision.
    """

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, gelu: str, norm_eps: float, dtype, rngs: nnx.Rngs):
        normal = nnx.initializers.truncated_normal(0.02)
        linear = partial(Linear, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.num_heads, self.dtype = num_heads, dtype
        self.latent = nnx.Param(normal(rngs.params(), (1, 1, width), jnp.float32))
        self.query, self.key_value, self.out = linear(width, width), linear(width, 2 * width), linear(width, width)
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)
        self.mlp = FeedForward(width, mlp_dim, gelu=gelu, dtype=dtype, rngs=rngs)

    def __call__(
        self, patches: Float[Array, "B S D"], weight: Float[Array, "B S"] | None = None
    ) -> Float[Array, "B D"]:
        """weight: how many times each token's exponential counts in the softmax."""
        latent = jnp.broadcast_to(self.latent[...].astype(self.dtype), (patches.shape[0], 1, patches.shape[2]))
        query = rearrange(self.query(latent), "b t (h c) -> b t h c", h=self.num_heads)
        key, value = rearrange(self.key_value(patches), "b s (two h c) -> two b s h c", two=2, h=self.num_heads)
        logits = attention_logits(query, key)
        shares = jax.nn.softmax(logits, axis=-1) if weight is None else _weighted_softmax(logits, weight)
        mixed = jnp.einsum("bhts,bshc->bthc", shares.astype(value.dtype), value)
        y = self.out(rearrange(mixed, "b t h c -> b t (h c)"))
        return (y + self.mlp(self.norm(y)))[:, 0]


def _weighted_softmax(logits: Float[Array, "B H 1 S"], weight: Float[Array, "B S"]) -> Float[Array, "B H 1 S"]:
    """The softmax in which exp(logit) counts `weight` times; a gradient reaches a weight of 0, too. 0 where all are 0."""
    weight = weight[:, None, None].astype(logits.dtype)
    highest = jnp.where(weight > 0, logits, -jnp.inf).max(axis=-1, keepdims=True)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    # A token without weight may be far above all others: its exponential is bounded, where nobody but a gradient asks.
    exponential = jnp.exp(jnp.minimum(logits - highest, 30)) * weight
    total = exponential.sum(axis=-1, keepdims=True)
    return exponential / jnp.where(total > 0, total, 1)
