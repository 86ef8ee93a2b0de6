"""ATC (Haurum, Escalera, Taylor, Moeslund, "Agglomerative Token Clustering", ECCV 2024).

In some blocks, between attention and feed-forward, the two most similar clusters of patch tokens become one, over and over,
until as many clusters are left as are to be kept. At first every token is a cluster; in the end each becomes one token.

Legend: B images, N patch tokens, M clusters, C channels of a head.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import merge, products, shares
from tif_jax.reducers.tome import unit_keys
from tif_jax.tokens import gates_to_log_weight, join, merged, split, take

LINKAGES = ("average", "complete", "single")


@dataclass(frozen=True)
class Atc:
    """At every site leaves floor(keep_ratio * N) clusters of the N patch tokens there.

    keep_ratio: one ratio for all sites, or one for each. num_kept: instead, numbers of clusters, one for each site or each
    block. sites: block indices; None is a quarter, a half and three quarters of the way: 3, 6, 9 of 12.
    linkage: how far two clusters are apart, of the distances (1 - cosine of keys) between their tokens: their 'average', the
    largest ('complete') or the least ('single').
    proportional: attention in proportion to how many patches a token stands for; aux['size'] says it of the tokens left.
    """

    keep_ratio: float | tuple[float, ...] = 0.7
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None
    linkage: str = "average"
    proportional: bool = True

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)
        if self.linkage not in LINKAGES:
            raise InputError(f"linkage is {self.linkage!r}; allowed: {', '.join(map(repr, LINKAGES))}")

    def __call__(self, blocks, x, tokens, rngs=None):
        amounts = schedule.amounts(self.keep_ratio, self.sites, self.num_kept, len(blocks))
        size = jnp.ones(tokens.position.shape[:2], widened(x.dtype))
        log_size = None  # nothing to add while every size is 1
        for i, block in enumerate(blocks):
            x, qk = block.attend(x, tokens, log_size, rngs)
            special, patches = split(x, tokens.num_special)
            num_patches = patches.shape[1]
            # A product like 196 * 0.7 * 0.7 must not fall below its integer by rounding.
            num_left = schedule.count(amounts.get(i, 1.0), num_patches, lambda number: int(number + 1e-9))
            if num_left < num_patches:
                unit = unit_keys(qk, tokens.num_special)
                joined = cluster(1 - products(unit, unit), num_left, self.linkage)
                share = shares(size, joined)
                patches, left, row = merge(patches, share, joined, num_left)
                position, _, _ = merge(tokens.position, share, joined, num_left)
                tokens = merged(tokens, row, position)
                size = take(size / share, left)
                x = join(special, patches)
                log_size = gates_to_log_weight(size, tokens.num_special) if self.proportional else None
            x = block.feed_forward(x, rngs)
        return x, {"source": tokens.source} | ({} if log_size is None else {"size": size})


def cluster(distance: Float[Array, "B N N"], num_clusters: int, linkage: str = "average") -> Int[Array, "B N"]:
    """For each token the first token of its cluster, after agglomerative clustering down to num_clusters of them.

    distance: symmetric, at least float32. Of equally near pairs the one with the lowest token is first, then that with
    the lowest other token. N - num_clusters steps in a row, each of which looks through N x N distances.
    """
    return jax.vmap(lambda table: _cluster(table, num_clusters, linkage))(jax.lax.stop_gradient(distance))


def _cluster(distance: Float[Array, "N N"], num_clusters: int, linkage: str) -> Int[Array, " N"]:
    """Of one image. A cluster has the row of its first token; rows of the others, and the diagonal, are infinite."""
    num = len(distance)
    distance = jnp.minimum(distance, distance.T)  # a product of matrices need not be symmetric to the last bit
    distance = jnp.where(jnp.eye(num, dtype=bool), jnp.inf, distance)

    def step(_, state):
        distance, count, joined = state
        first = jnp.argmin(distance.min(axis=0))  # its nearest comes later, or the nearest were first
        second = jnp.argmin(distance[first])
        own, other = count[first], count[second]
        one, two = distance[first], distance[second]
        if linkage == "average":
            row = (own * one + other * two) / (own + other)  # Lance and Williams 1967
        else:
            row = jnp.maximum(one, two) if linkage == "complete" else jnp.minimum(one, two)
        row = row.at[jnp.stack([first, second])].set(jnp.inf)
        gone = jnp.full(num, jnp.inf, distance.dtype)
        distance = distance.at[first].set(row).at[:, first].set(row).at[second].set(gone).at[:, second].set(gone)
        joined = jnp.where(joined == second, first, joined)
        return distance, count.at[first].add(other), joined.astype(jnp.int32)

    start = distance, jnp.ones(num, distance.dtype), jnp.arange(num, dtype=jnp.int32)
    return jax.lax.fori_loop(0, num - num_clusters, step, start)[2]
