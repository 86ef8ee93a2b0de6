"""BAT (Long et al., "Beyond Attentive Tokens: Incorporating Token Importance and Diversity", CVPR 2023).

Between the two half-steps of a block, class attention decouples the tokens into attentive and inattentive ones; similar
inattentive tokens are clustered and combined, homogeneous attentive tokens are matched and combined.

Legend: B images, N patch tokens (of one kind, in `cluster` and `match`), K attentive tokens, M tokens left, D width.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import cluster, merge, products, shares
from tif_jax.tokens import (
    class_attention,
    join,
    merged,
    require_class,
    split,
    take,
    top_k,
)

# The paper leaves these open, as it does what is compared, by which rule, and the weights. Of all other choices tried with
# DeiT-Ti at keep_ratio 0.5, without fine-tuning, one did better (docs/results.md): attention in proportion to the patches
# in a token, as in ToMe, gained 3.8 points. It is not done, because nothing says that BAT has it.
_MATCH_RATIO = 0.25  # pairs per attentive token
_NEIGHBOURS = 5  # of a token's density, itself included; no other number was tried
# Clusters less pairs at a site, by the nearest keep_ratio: what the authors' logged costs suggest.
_EXTRA_CLUSTERS = {0.7: 0, 0.6: -2, 0.5: 3, 0.4: 3, 0.3: 1, 0.2: 1}
_LEAST_WEIGHT = 1e-12  # class attention may underflow


class Counts(NamedTuple):
    """Of the patch tokens at a site: attentive - pairs + clusters of them are left."""

    attentive: int
    pairs: int
    clusters: int


@dataclass(frozen=True)
class Bat:
    """Leaves about keep_ratio of the patches at each site: attentive ones, some merged in pairs, and cluster tokens.

    keep_ratio: the attentive share at each site, or one for each. num_kept: instead, numbers of patch tokens left, or as
    few less as the counts allow, one for each site or each block. sites: block indices; None is a quarter, a half and
    three quarters of the way: 3, 6, 9 of 12.
    """

    keep_ratio: float | tuple[float, ...] = 0.7
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)

    def __call__(self, blocks, x, tokens, rngs=None):
        require_class(tokens, "bat")
        amounts = schedule.amounts(self.keep_ratio, self.sites, self.num_kept, len(blocks))
        for i, block in enumerate(blocks):
            x, qk = block.attend(x, tokens, rngs=rngs)
            counts = counts_at(tokens.index.shape[1], amounts.get(i, 1.0))
            if counts.clusters:
                special, patches = split(x, tokens.num_special)
                scores = class_attention(qk, tokens.num_special)
                patches, position, left, row = reduce(patches, tokens.position, scores, counts)
                x = join(special, patches)
                tokens = merged(tokens, row, position)._replace(index=take(tokens.index, left))
            x = block.feed_forward(x, rngs=rngs)
        return x, {"kept": tokens.index, "source": tokens.source}


def counts_at(num_patches: int, amount: schedule.Amount) -> Counts:
    """What becomes of num_patches tokens at a site; no clusters: nothing is to be done.

    A ratio says how many are attentive; a number how many tokens are left, or as few less as the counts allow.
    """
    if isinstance(amount, int):
        num_left = schedule.count(amount, num_patches, math.ceil)
        choices = [_counts(num_patches, attentive) for attentive in range(num_patches, 0, -1)]
        fitting = [c for c in choices if row_count(c) <= num_left]
        return max(fitting, key=row_count, default=choices[-1])
    return _counts(num_patches, math.ceil(amount * num_patches - 1e-9))


def _counts(num_patches: int, attentive: int) -> Counts:
    if attentive == num_patches:
        return Counts(attentive, 0, 0)
    extra = _EXTRA_CLUSTERS[min(_EXTRA_CLUSTERS, key=lambda ratio: abs(ratio - attentive / num_patches))]
    # Few inattentive tokens make few clusters; without as many pairs less the tokens left would be fewer for it.
    pairs = min(math.floor(_MATCH_RATIO * attentive + 1e-9), max(0, num_patches - attentive - extra))
    return Counts(attentive, pairs, min(max(1, pairs + extra), num_patches - attentive))


def row_count(counts: Counts) -> int:
    """How many patch tokens are left."""
    return counts.attentive - counts.pairs + counts.clusters


def reduce(
    x: Float[Array, "B N D"], position: Float[Array, "B N 2"], scores: Float[Array, "B N"], counts: Counts
) -> tuple[Float[Array, "B M D"], Float[Array, "B M 2"], Int[Array, "B M"], Int[Array, "B N"]]:
    """The tokens left, in raster order; where in the raster they lie; the row that each had (of a merged one: of the token
    it was merged to); where each of the N tokens went. Gradients pass through the tokens and the weights, not through the
    assignment."""
    order = decouple(scores)
    attentive, inattentive = order[:, : counts.attentive], order[:, counts.attentive :]
    compared = jax.lax.stop_gradient(x)
    partner = match(take(compared, attentive), counts.pairs)
    centre = cluster(take(compared, inattentive), counts.clusters, _NEIGHBOURS)
    joined = jnp.concatenate([take(attentive, partner), take(inattentive, centre)], axis=1)
    joined = take(joined, jnp.argsort(order, axis=1))  # back to raster order
    share = shares(jnp.maximum(scores, _LEAST_WEIGHT), joined)
    merged, left, row = merge(x, share, joined, row_count(counts))
    return merged, merge(position, jax.lax.stop_gradient(share), joined, row_count(counts))[0], left, row


def decouple(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """Positions from the most to the least attentive token: the first K are the attentive ones. Ties: in raster order."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores), scores.shape[1])[1].astype(jnp.int32)


def match(x: Float[Array, "B K D"], num_pairs: int) -> Int[Array, "B K"]:
    """The token that each of the tokens, given from the most attentive down, is merged into; itself, if it stays.

    Tokens of even rank look for the most similar one (cosine) of odd rank, which may take several; the num_pairs most
    similar pairs merge.
    """
    ranks = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    if num_pairs == 0:
        return ranks
    wide = x.astype(widened(x.dtype))
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    similarity = products(unit[:, ::2], unit[:, 1::2])
    even = ranks[:, ::2]
    chosen = top_k(similarity.max(axis=-1), num_pairs)
    moves = (chosen[:, :, None] == ranks[:, None, : even.shape[1]]).any(axis=1)
    even = jnp.where(moves, 2 * similarity.argmax(axis=-1).astype(jnp.int32) + 1, even)
    return jnp.where(ranks % 2 == 0, jnp.repeat(even, 2, axis=1)[:, : x.shape[1]], ranks)
