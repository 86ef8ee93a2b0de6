"""PiToMe (Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024).

In every block, between attention and feed-forward, each patch token has an energy: how many others are like it. Tokens of
high energy, which are many of a kind, merge; those of low energy, which stand alone, are protected.

Legend: B images, N patch tokens, M those left, R those that merge, D width, C channels of a head.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._fusion import destination, fuse, fusion_of
from tif_jax.reducers.tome import unit_keys
from tif_jax.tokens import gates_to_log_weight, join, merged, rows_of, split, take


@dataclass(frozen=True)
class Pitome:
    """At every site ceil(keep_ratio * M) of the M patch tokens are left, and never fewer than half of them.

    sites: block indices; None is all blocks. num_kept: instead of ratios, patch tokens left, one number for each site or
    block. margin: the similarity above which a token counts as alike, in block 0; it falls in a straight line to 0 behind the
    last block. proportional: attention in proportion to how many patches a token stands for; aux['size'] (B, M) says it.
    """

    keep_ratio: float | tuple[float, ...] = 0.925
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None
    margin: float = 0.75
    proportional: bool = False

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)
        if not 0 <= self.margin <= 1:
            raise InputError(f"margin is {self.margin}; it is a cosine, in [0, 1]")

    def __call__(self, blocks, x, tokens, rngs=None):
        depth = len(blocks)
        sites = tuple(range(depth)) if self.sites is None else self.sites
        amounts = schedule.amounts(self.keep_ratio, sites, self.num_kept, depth)
        size = jnp.ones(tokens.position.shape[:2], widened(x.dtype))
        log_size = None  # nothing to add while every size is 1
        for i, block in enumerate(blocks):
            x, qk = block.attend(x, tokens, log_size, rngs)
            special, patches = split(x, tokens.num_special)
            num_patches = patches.shape[1]
            num_left = schedule.count(amounts.get(i, 1.0), num_patches, math.ceil)
            if num_merged := min(num_patches - num_left, num_patches // 2):
                margin, protecting = self.margin * (1 - i / depth), i >= (depth + 1) // 2
                gone, target = match(unit_keys(qk, tokens.num_special), num_merged, margin, protecting)
                fusion = fusion_of(gone, target, num_patches)
                position, _ = fuse(tokens.position, size, fusion)
                patches, size = fuse(patches, size, fusion)
                tokens = merged(tokens, destination(fusion), position)
                x = join(special, patches)
                log_size = gates_to_log_weight(size, tokens.num_special) if self.proportional else None
            x = block.feed_forward(x, rngs)
        return x, {"source": tokens.source} | ({} if log_size is None else {"size": size})


def match(
    metric: Float[Array, "B N C"], num_merged: int, margin: float, protecting: bool
) -> tuple[Int[Array, "B R"], Int[Array, "B R"]]:
    """Which tokens merge, and which token each of them merges into, as rows. metric: of length 1; no gradient.

    In the order of their energy tokens are sources and targets in turns, the one of highest energy is a source. With
    `protecting` only the 2 * num_merged tokens of highest energy are either, and every source merges into its most similar
    target. Without it all are, and the num_merged most similar of these pairs merge. Ties go to the lower row.
    """
    num = metric.shape[1]
    similarity = jnp.einsum("bnc,bmc->bnm", metric, metric, precision="highest")
    _, order = jax.lax.top_k(energy(similarity, margin), num)
    rank = rows_of(order.astype(jnp.int32), num, others=0)
    candidate = rank < (2 * num_merged if protecting else num)
    similarity = jnp.where((candidate & (rank % 2 == 1))[:, None], similarity, -jnp.inf)
    best = jnp.where(candidate & (rank % 2 == 0), similarity.max(axis=2), -jnp.inf)
    _, gone = jax.lax.top_k(best, num_merged)
    gone = gone.astype(jnp.int32)
    return gone, take(similarity, gone).argmax(axis=2).astype(jnp.int32)


def energy(similarity: Float[Array, "B N N"], margin: float) -> Float[Array, "B N"]:
    """Mean over all tokens of similarity - margin, where it is negative bent to exp(similarity - margin) - 1: (-1, 1]."""
    above = similarity - margin
    return jnp.where(above > 0, above, jnp.exp(above) - 1).mean(axis=2)
