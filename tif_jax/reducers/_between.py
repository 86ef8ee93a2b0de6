"""What methods have in common that drop patches between two blocks, by what the attention of the former says.

Legend: B images, K kept patch tokens.
"""

from collections.abc import Callable

from jaxtyping import Array, Int

from tif_jax.errors import InputError
from tif_jax.reducers import _schedule as schedule
from tif_jax.tokens import QueryKey, Tokens, keep_rows

# The places of the patches kept. Given: a block's attention, the tokens that it was among, the block's number, how many.
Choice = Callable[[QueryKey, Tokens, int, int], Int[Array, "B K"]]


def amounts(
    keep_ratio: schedule.Ratios, sites: tuple[int, ...] | None, num_kept: tuple[int, ...] | None, depth: int
) -> dict[int, schedule.Amount]:
    """`schedule.amounts` before blocks. sites: None is one after a quarter, a half and three quarters: 4, 7, 10 of 12."""
    if sites is None and not schedule.is_per_block(sites, num_kept, depth):
        sites = tuple(sorted({1 + depth * quarter // 4 for quarter in (1, 2, 3)} & {*range(depth)}))
    return schedule.amounts(keep_ratio, sites, num_kept, depth)


def walk(blocks, x, tokens: Tokens, rngs, amounts: dict[int, schedule.Amount], choose: Choice):
    """Drops patches before the blocks that `amounts` names, and returns x and aux of what is left. Ratios' products round.

    Raises InputError if it is to drop some before block 0, which no attention precedes.
    """
    qk = None
    for i, block in enumerate(blocks):
        num_patches = tokens.index.shape[1]
        num_kept = schedule.count(amounts.get(i, 1.0), num_patches, round)
        if num_kept < num_patches:
            if qk is None:
                raise InputError(
                    "patches are to be dropped before block 0, but what ranks them is the attention of the block before: "
                    "let sites begin with 1, or num_kept with all patches"
                )
            x, tokens = keep_rows(x, tokens, choose(qk, tokens, i - 1, num_kept))
        x, qk = block(x, tokens, rngs=rngs)
    return x, {"kept": tokens.index, "source": tokens.source}
