"""A ranking that never looks at the image: where in the raster, over the training set, tokens were worth keeping."""

import jax.numpy as jnp
from flax import nnx

from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, keep


class Prior(nnx.Module):
    """Keeps the round(keep_ratio * N) raster positions whose mean training label is highest; round_to as of tif.

    `logits` is not trained but read off the impact shards (`impact.labels.position_prior`).
    """

    def __init__(self, keep_ratio: float = 0.5, round_to: int = 1, *, num_patches: int):
        check_keep_ratio(keep_ratio, round_to)
        self.keep_ratio, self.round_to = keep_ratio, round_to
        self.logits = nnx.Param(jnp.zeros(num_patches))

    def __call__(self, blocks, x, tokens, rngs=None):
        scores = self.logits[...][tokens.index]
        x, tokens = keep(x, tokens, scores, self.keep_ratio, self.round_to)
        x, aux = Full()(blocks, x, tokens, rngs)
        return x, {**aux, "kept": tokens.index, "source": tokens.source}
