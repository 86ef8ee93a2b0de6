"""DPC-KNN: density-peak clustering with k nearest neighbours (Du, Ding, Jia 2016), as Haurum et al. reduce tokens by it:
"Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCV workshops 2023.

Before some blocks the peaks of density among the patch tokens become centres, every other token goes to the centre nearest to
it, and each cluster becomes its mean.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import cluster, merge, shares
from tif_jax.tokens import join, merged, split, take


@dataclass(frozen=True)
class DpcKnn:
    """Before every site leaves floor(keep_ratio * N) clusters of the N patch tokens there, each its plain mean.

    keep_ratio: one ratio for all sites, or one for each. num_kept: instead, numbers of clusters, one for each site or each
    block. sites: block indices; None is a quarter, a half and three quarters of the way: 3, 6, 9 of 12.
    num_neighbors: of a token's density, itself included.
    """

    keep_ratio: float | tuple[float, ...] = 0.7
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None
    num_neighbors: int = 5

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)
        if self.num_neighbors < 1:
            raise InputError(f"num_neighbors is {self.num_neighbors}; it is a number of tokens, from 1")

    def __call__(self, blocks, x, tokens, rngs=None):
        amounts = schedule.amounts(self.keep_ratio, self.sites, self.num_kept, len(blocks))
        for i, block in enumerate(blocks):
            num_patches = tokens.index.shape[1]
            # A product that is an integer but for rounding is that integer.
            num_left = schedule.count(amounts.get(i, 1.0), num_patches, lambda number: int(number + 1e-9))
            if num_left < num_patches:
                special, patches = split(x, tokens.num_special)
                joined = cluster(jax.lax.stop_gradient(patches), num_left, self.num_neighbors)
                share = shares(jnp.ones(joined.shape, widened(x.dtype)), joined)
                patches, left, row = merge(patches, share, joined, num_left)
                position, _, _ = merge(tokens.position, share, joined, num_left)
                tokens = merged(tokens, row, position)._replace(index=take(tokens.index, left))
                x = join(special, patches)
            x, _ = block(x, tokens, rngs=rngs)
        return x, {"kept": tokens.index, "source": tokens.source}
