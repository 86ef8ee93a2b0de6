"""Merging by importance and similarity together; ours, after DiffRate and MCTF.

In a block, between attention and feed-forward, those patch tokens merge that cost least: a token's price is how much
attention it gets times how unlike it is to the nearest token that gets more. Those that merge count by their importance.

Legend: B images, T tokens, N patch tokens, R that merge into others, M that are left, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import products
from tif_jax.reducers._fusion import Fusion, fuse_tokens, fusion_of, length, total
from tif_jax.reducers._steps import limited, log_sizes, walk
from tif_jax.reducers.mctf import informativeness
from tif_jax.tokens import class_attention, put, row_numbers, split, take

_CANDIDATES = 3  # tokens looked at for each that merges: those of least importance
_LEAST = 1e-6  # weight of a patch in a mean, however little attention it gets


@dataclass(frozen=True)
class ImportanceMerge:
    """Merges `num_merged` patch tokens per block: one number for all, or one for each block; all but one may go.

    A number with a fraction is a mean over the blocks: 8.5 is 8 and 9 in turns. `tif calibrate` finds the list.
    power: of importance in the price; 0 asks for similarity alone.
    size_power: attention is in proportion to that power of how many patches a token stands for; 1 is ToMe's. Patches that
    merged are not the same, and together draw less attention than so many copies of their mean.
    proportional: False leaves sizes out; aux['size'] says how many patches those left stand for.
    """

    num_merged: int | float | tuple[int, ...] = 13
    power: float = 1.0
    size_power: float = 0.85
    proportional: bool = True

    def __post_init__(self):
        schedule.check_merged(self.num_merged)
        for name in ("power", "size_power"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it is a number, 0 or more")

    def per_block(self, depth, num_patches):
        return limited(schedule.merged_per_block(self.num_merged, depth), self, num_patches)

    def most(self, num_patches):
        return num_patches - 1

    def step(self, block, x, tokens, size, number, rngs=None):
        log_size = log_sizes(size, tokens, self.proportional)
        log_size = None if log_size is None else self.size_power * log_size
        x, qk = block.attend(x, tokens, log_size, rngs)
        if number:
            patches = split(x, tokens.num_special)[1]
            if tokens.has_class:
                importance = class_attention(qk, tokens.num_special, log_size)
            else:
                importance = informativeness(qk, log_size)[:, tokens.num_special :]
            importance = jax.lax.stop_gradient(importance)
            fusion = match(patches, importance, number, self.power)
            size = jnp.ones(patches.shape[:2], widened(x.dtype)) if size is None else size
            x, tokens = fuse_tokens(x, tokens, importance + _LEAST * size, fusion, keep_length=True)
            size = total(size, fusion)
        return block.feed_forward(x, rngs), tokens, size

    def __call__(self, blocks, x, tokens, rngs=None):
        return walk(self, blocks, x, tokens, rngs)


def match(x: Float[Array, "B N D"], importance: Float[Array, "B N"], number: int, power: float = 1.0) -> Fusion:
    """The `number` tokens of the lowest price, each with the most similar of those that stay. These keep their order.

    Token i's price is importance_i^power (1 - the largest cosine of i with a token of more importance). Only the
    3 * number tokens of the least importance are asked. Of equal ones that at the higher row counts as more
    important; of equal prices the less important one goes. Similarities are at least float32 and pass no gradient.
    """
    num_patches = x.shape[1]
    x, per_length = jax.lax.stop_gradient(x), 1 / length(x)
    _, asked = jax.lax.top_k(-importance, min(_CANDIDATES * number, num_patches))
    # Cosines, with lengths divided out of the products: there are fewer of these than of what they are made of.
    similarity = products(take(x, asked), x) * take(per_length, asked)[:, :, None] * per_length[:, None, :]
    theirs, row = take(importance, asked)[:, :, None], row_numbers(*importance.shape)[:, None, :]
    is_more = (importance[:, None, :] > theirs) | ((importance[:, None, :] == theirs) & (row > asked[:, :, None]))
    nearest = jnp.where(is_more, similarity, -1).max(axis=2)
    _, cheapest = jax.lax.top_k(-(theirs[..., 0] ** power * (1 - nearest)), number)
    gone = take(asked, cheapest).astype(jnp.int32)
    stays = put(jnp.ones(importance.shape, jnp.int32), gone, jnp.zeros_like(gone))
    target = jnp.where(stays[:, None, :] > 0, take(similarity, cheapest), -jnp.inf).argmax(axis=2).astype(jnp.int32)
    return fusion_of(gone, target, num_patches)
