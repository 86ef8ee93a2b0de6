"""ToMe, token merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023).

In every block, between attention and feed-forward, the patch tokens are dealt alternately into two sets; the pairs across the
sets whose keys are most alike become one token each: nothing is dropped, nothing is learned.

Legend: B images, N patch tokens, R merged ones, D width, C channels of a head.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._steps import limited, log_sizes, walk
from tif_jax.tokens import QueryKey, join, merged, split, take


class Pairs(NamedTuple):
    """Which patch tokens merge. Of N tokens the odd rows are the sources, the even rows the targets.

    Afterwards come the sources that stay, then the targets, both in the order they had.
    """

    unmerged: Int[Array, "B _"]  # rows of the sources that stay, ascending
    merged: Int[Array, "B R"]  # rows of the sources that merge, the most similar pair first
    target: Int[Array, "B R"]  # which target each of them merges into: 0 is row 0, 1 is row 2, ...


@dataclass(frozen=True)
class Tome:
    """Merges `num_merged` patch tokens per block: one number for all, or one for each block; at most half of those there.

    A number with a fraction is a mean over the blocks: 8.5 is 8 and 9 in turns.
    schedule: of one number: 'constant', or ToMe's ramps: 'decreasing' from twice the number to 0, or 'increasing'.
    proportional: attention in proportion to how many patches a token stands for (log size is added to its logits), that of
    attention pooling, too, for which aux['size'] (B, M) says it of the tokens left.
    """

    num_merged: int | float | tuple[int, ...] = 13
    schedule: str = "constant"
    proportional: bool = True

    def __post_init__(self):
        schedule.check_merged(self.num_merged)
        if self.schedule not in schedule.RAMPS:
            raise InputError(f"schedule is {self.schedule!r}; allowed: {', '.join(map(repr, schedule.RAMPS))}")
        if isinstance(self.num_merged, tuple) and self.schedule != "constant":
            raise InputError(
                f"schedule {self.schedule!r} is for one number; num_merged {self.num_merged} is a schedule itself"
            )

    def per_block(self, depth: int, num_patches: int) -> tuple[int, ...]:
        """How many of num_patches merge in each of `depth` blocks. Raises InputError for a tuple of another length."""
        return limited(schedule.merged_per_block(self.num_merged, depth, trend=self.schedule), self, num_patches)

    def most(self, num_patches: int) -> int:
        """How many of num_patches can merge in one block."""
        return num_patches // 2

    def step(self, block, x, tokens, size, number, rngs=None):
        x, qk = block.attend(x, tokens, log_sizes(size, tokens, self.proportional), rngs)
        if number:
            special, patches = split(x, tokens.num_special)
            size = jnp.ones(patches.shape[:2], widened(x.dtype)) if size is None else size
            pairs = match(unit_keys(qk, tokens.num_special), number)
            position, _ = merge(tokens.position, size, pairs)
            tokens = merged(tokens, destination(pairs, patches.shape[1]), position)
            patches, size = merge(patches, size, pairs)
            x = join(special, patches)
        return block.feed_forward(x, rngs), tokens, size

    def __call__(self, blocks, x, tokens, rngs=None):
        return walk(self, blocks, x, tokens, rngs)


def unit_keys(qk: QueryKey, num_special: int) -> Float[Array, "B N C"]:
    """The metric: keys of the patch tokens, mean over heads, of length 1, at least float32. No gradient.

    Before rotary positions, where there are any: two patches alike would otherwise differ the more the farther apart they are
    (our choice; the paper has no such model, and the other was not measured).
    """
    key = jax.lax.stop_gradient(qk.content_key[:, num_special:])
    # Lengths become 1: a sum will do, and head by head it is faster on a CPU than a reduction.
    key = reduce(jnp.add, (key[:, :, head].astype(widened(key.dtype)) for head in range(key.shape[2])))
    return key * jax.lax.rsqrt(jnp.maximum(jnp.sum(key**2, axis=-1, keepdims=True), 1e-24))


def match(metric: Float[Array, "B N C"], num_merged: int) -> Pairs:
    """Bipartite soft matching: every source's most similar target, and the num_merged most similar of these pairs.

    Ties go to the lower row, of sources as of targets. num_merged is at most N // 2, the number of sources.
    """
    sources, targets = metric[:, 1::2], metric[:, ::2]
    similarity = jnp.einsum("bsc,btc->bst", sources, targets, precision="highest")
    _, order = jax.lax.top_k(similarity.max(axis=2), sources.shape[1])
    merged, unmerged = order[:, :num_merged], jnp.sort(order[:, num_merged:], axis=1)
    target = jnp.argmax(take(similarity, merged), axis=2)  # only where it is needed: slower than max
    return Pairs(*(row.astype(jnp.int32) for row in (2 * unmerged + 1, 2 * merged + 1, target)))


def merge(
    patches: Float[Array, "B N D"], size: Float[Array, "B N"], pairs: Pairs
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """Tokens and their sizes after merging: means weighted by size, and sums.

    The mean is written target + sum of size/(new size) (source - target), which touches only what changes.
    """
    image = jnp.arange(patches.shape[0])[:, None]
    row = pairs.unmerged.shape[1] + pairs.target
    added = take(size, pairs.merged)
    size = jnp.concatenate([take(size, pairs.unmerged), size[:, ::2]], axis=1).at[image, row].add(added)
    share = added / take(size, row)
    left = jnp.concatenate([take(patches, pairs.unmerged), patches[:, ::2]], axis=1).astype(widened(patches.dtype))
    difference = take(patches, pairs.merged).astype(left.dtype) - take(left, row)
    return left.at[image, row].add(share[..., None].astype(left.dtype) * difference).astype(patches.dtype), size


def destination(pairs: Pairs, num_patches: int) -> Int[Array, "B N"]:
    """The row where each of the num_patches tokens is after merging."""
    num_images, num_unmerged = pairs.unmerged.shape
    image = jnp.arange(num_images)[:, None]
    targets = num_unmerged + jnp.arange((num_patches + 1) // 2, dtype=jnp.int32)
    stay = jnp.arange(num_unmerged, dtype=jnp.int32)[None]
    rows = jnp.zeros((num_images, num_patches), jnp.int32).at[:, ::2].set(targets[None])
    return rows.at[image, pairs.unmerged].set(stay).at[image, pairs.merged].set(num_unmerged + pairs.target)
