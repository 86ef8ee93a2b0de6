"""TokenLearner (Ryoo et al., "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", NeurIPS 2021), version 1.1.

Before one block the patch tokens become a few new ones: each is a mean of all patches, with weights that a small network
gives every patch. The network learns with the ViT in fine-tuning.

Legend: B images, N patch tokens, S learned tokens, D width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import Linear, gelu, widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, join, merged, num_kept, split

_HIDDEN = 64


class TokenWeights(nnx.Module):
    """How much of each patch token is in each learned one: a share, which sums to 1 over the patches."""

    def __init__(self, width: int, num_tokens: int, *, rngs: nnx.Rngs):
        linear = partial(Linear, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.up, self.down = linear(width, _HIDDEN), linear(_HIDDEN, num_tokens)

    def __call__(self, patches: Float[Array, "B N D"]) -> Float[Array, "B S N"]:
        """At least float32."""
        y = self.down(gelu(self.up(self.norm(patches.astype(widened(patches.dtype)))), approximate=True))
        return jax.nn.softmax(jnp.swapaxes(y, 1, 2), axis=-1)


class TokenLearner(nnx.Module):
    """From block `site` on, round(keep_ratio * N) learned tokens in place of the N patches of the raster.

    site: how many blocks run on all patches; None is a third of them. keep_ratio=1 has no parameters.

    aux has `source`: a patch is taken to live in the token of which it is the largest share.
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        site: int | None = None,
        *,
        width: int,
        num_patches: int,
        rngs: nnx.Rngs,
    ):
        check_keep_ratio(keep_ratio)
        schedule.check_site(site)
        self.keep_ratio, self.site, self.num_tokens = keep_ratio, site, num_kept(keep_ratio, num_patches)
        self.weights = TokenWeights(width, self.num_tokens, rngs=rngs) if self.num_tokens < num_patches else None

    def __call__(self, blocks, x, tokens, rngs=None):
        site = schedule.site_of(self.site, len(blocks))
        x, _ = Full()(blocks[:site], x, tokens, rngs)
        if self.weights is not None:
            x, tokens = self._learned(self.weights, x, tokens)
        x, _ = Full()(blocks[site:], x, tokens, rngs)
        return x, {"source": tokens.source}

    def _learned(self, weigh: TokenWeights, x, tokens):
        special, patches = split(x, tokens.num_special)
        if self.num_tokens >= patches.shape[1]:
            raise InputError(
                f"token_learner would make {self.num_tokens} tokens of the {patches.shape[1]} patches that arrive; its "
                f"keep_ratio, {self.keep_ratio}, is of all patches of the raster: lower it"
            )
        weights = weigh(patches)
        learned = jnp.einsum("bsn,bnd->bsd", weights, patches.astype(weights.dtype)).astype(x.dtype)
        share = jax.lax.stop_gradient(weights)
        place = jnp.einsum("bsn,bnp->bsp", share.astype(tokens.position.dtype), tokens.position, precision="highest")
        return join(special, learned), merged(tokens, jnp.argmax(share, axis=1).astype(jnp.int32), place)
