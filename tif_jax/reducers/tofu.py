"""ToFu (Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024).

ToMe's pairs, but in the early blocks, which do not respond linearly to mixtures of tokens, the one of a pair is dropped, and
in the later ones, where both merge, the token that they become is as long as the longest of them.

Legend: B images, N patch tokens, M those left, D width, C channels of a head.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._fusion import Fusion, as_long, destination, fuse, length
from tif_jax.reducers.tome import match, unit_keys
from tif_jax.tokens import join, merged, row_numbers, split, take


@dataclass(frozen=True)
class Tofu:
    """In every block `num_merged` patch tokens leave: one number for all, or one for each block; at most half of those there.

    A number with a fraction is a mean over the blocks. merging: the blocks where they merge into their most similar token;
    in the others they are dropped. None: those beyond the middle, 7 to 11 of 12.
    """

    num_merged: int | float | tuple[int, ...] = 13
    merging: tuple[int, ...] | None = None

    def __post_init__(self):
        schedule.check_merged(self.num_merged, done="dropped or merged")
        if self.merging is not None and any(block < 0 for block in self.merging):
            raise InputError(f"merging is {self.merging}; it lists block indices, from 0")

    def __call__(self, blocks, x, tokens, rngs=None):
        depth = len(blocks)
        merging = range(depth // 2 + 1, depth) if self.merging is None else self.merging
        if beyond := [block for block in merging if block >= depth]:
            raise InputError(f"merging names block {beyond[0]}; the model has blocks 0..{depth - 1}")
        per_block = schedule.merged_per_block(self.num_merged, depth)
        for i, (block, number) in enumerate(zip(blocks, per_block, strict=True)):
            x, qk = block.attend(x, tokens, rngs=rngs)
            special, patches = split(x, tokens.num_special)
            num_patches = patches.shape[1]
            if number := min(number, num_patches // 2):
                fusion = fusion_of(unit_keys(qk, tokens.num_special), number, i in merging)
                if i in merging:
                    patches, position = mlerp(patches, fusion), _means(tokens.position, fusion)[0]
                else:
                    patches, position = take(patches, fusion.left), take(tokens.position, fusion.left)
                tokens = merged(tokens, destination(fusion, num_patches), position)
                x = join(special, patches)
            x = block.feed_forward(x, rngs=rngs)
        return x, {"source": tokens.source}


def fusion_of(metric: Float[Array, "B N C"], number: int, merging: bool) -> Fusion:
    """The pairs of ToMe, of which one token goes into the other; or, without `merging`, goes."""
    pairs = match(metric, number)
    num_images, num_targets = metric.shape[0], (metric.shape[1] + 1) // 2
    left = jnp.concatenate([pairs.unmerged, 2 * row_numbers(num_images, num_targets)], axis=1)
    gone, into = (index[:, : number * merging] for index in (pairs.merged, pairs.unmerged.shape[1] + pairs.target))
    return Fusion(left, gone, into)


def mlerp(patches: Float[Array, "B N D"], fusion: Fusion) -> Float[Array, "B M D"]:
    """Tokens after merging: in the direction of the plain mean of their members, as long as the longest of these.

    At least in float32; rows that nothing merges into stay bit for bit. The factor passes no gradient, so that a token that
    merged is, to first order, a mixture of its members.
    """
    wide = patches.astype(widened(patches.dtype))
    mean, members = _means(wide, fusion)
    long = length(wide)
    image = jnp.arange(long.shape[0])[:, None]
    longest = take(long, fusion.left).at[image, fusion.into].max(take(long, fusion.gone))
    return as_long(mean, longest, members > 1).astype(patches.dtype)


def _means(rows: Float[Array, "B N D"], fusion: Fusion) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """Plain means of those that merge, whatever they are made of, and how many tokens each is the mean of."""
    return fuse(rows, jnp.ones(rows.shape[:2], widened(rows.dtype)), fusion)
