"""DiffRate (Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023).

In every block, between attention and feed-forward, the patch tokens to which the class token attends least are dropped, and
those above them merge into the most similar of the others. How many in which block is data: DiffRate's training searches
for these lists and leaves the weights as they are; `rates` reads the published ones.

Legend: B images, N patch tokens, M those left, R those that merge, D width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import products
from tif_jax.reducers._fusion import Fusion, fuse_tokens, unit
from tif_jax.tokens import class_attention, gates_to_log_weight, require_class, split, take


@dataclass(frozen=True)
class Diffrate:
    """Drops `num_dropped` and merges `num_merged` patch tokens per block: one number for all, or one for each block.

    A number with a fraction is a mean over the blocks. At least one patch token is left: what goes beyond is cut off, first
    from the merged ones. proportional: attention in proportion to the size of each token; a token that merges adds its size
    times its similarity. aux['size'] (B, M) is that of the tokens left.
    """

    num_merged: int | float | tuple[int, ...] = 13
    num_dropped: int | float | tuple[int, ...] = 0
    proportional: bool = True

    def __post_init__(self):
        schedule.check_merged(self.num_merged)
        schedule.check_merged(self.num_dropped, name="num_dropped", done="dropped")

    def __call__(self, blocks, x, tokens, rngs=None):
        require_class(tokens, "diffrate")
        per_block = zip(
            schedule.merged_per_block(self.num_dropped, len(blocks), name="num_dropped"),
            schedule.merged_per_block(self.num_merged, len(blocks)),
            strict=True,
        )
        size = jnp.ones(tokens.position.shape[:2], widened(x.dtype))
        log_size = None  # nothing to add while every size is 1
        for block, (num_dropped, num_merged) in zip(blocks, per_block, strict=True):
            x, qk = block.attend(x, tokens, log_size, rngs)
            patches = split(x, tokens.num_special)[1]
            num_patches = patches.shape[1]
            num_staying = max(1, num_patches - num_dropped)
            num_left = max(1, num_staying - num_merged)
            if num_left < num_patches:
                scores = class_attention(qk, tokens.num_special, log_size)
                fusion, similarity = match(patches, *ranked(scores, num_left, num_staying))
                one = jnp.ones_like(size)  # a mean of the tokens as they arrive, whatever they are made of
                x, tokens = fuse_tokens(x, tokens, one, fusion)
                size = grown(size, fusion, similarity)
                log_size = gates_to_log_weight(size, tokens.num_special) if self.proportional else None
            x = block.feed_forward(x, rngs)
        return x, {"source": tokens.source} | ({} if log_size is None else {"size": size})


def rates(
    prune_kept_num: Sequence[int] | str, merge_kept_num: Sequence[int] | str, num_tokens: int | None = None
) -> dict[str, tuple[int, ...]]:
    """num_dropped and num_merged of lists as DiffRate publishes them, in `compression_rate.json`.

    The lists say for each block how many tokens there may be at most after dropping and after merging, the class token
    included; as lists, or as text of lists, which they are there. num_tokens: before block 0; None: as many as the lists
    begin with, since DiffRate leaves block 0 dense. Raises InputError for what is no such pair of lists.
    """
    pruned, kept = _numbers(prune_kept_num, "prune_kept_num"), _numbers(merge_kept_num, "merge_kept_num")
    if len(pruned) != len(kept):
        raise InputError(
            f"prune_kept_num has {len(pruned)} entries and merge_kept_num {len(kept)}; both have one for each block"
        )
    number = max(pruned[0], kept[0]) if num_tokens is None else num_tokens
    num_dropped, num_merged = [], []
    for after_dropping, after_merging in zip(pruned, kept, strict=True):
        num_dropped.append(max(0, number - after_dropping))
        num_merged.append(max(0, number - num_dropped[-1] - after_merging))
        number -= num_dropped[-1] + num_merged[-1]
    return {"num_dropped": tuple(num_dropped), "num_merged": tuple(num_merged)}


def _numbers(given: Sequence[int] | str, name: str) -> list[int]:
    try:
        numbers = json.loads(given) if isinstance(given, str) else list(given)
        fits = isinstance(numbers, list) and all(type(number) is int and number > 1 for number in numbers)
    except (TypeError, json.JSONDecodeError):
        fits = False
    if not fits or not numbers:
        raise InputError(
            f"{name} is {given!r}; it lists for each block how many tokens it leaves, the class token included"
        )
    return numbers


def ranked(scores: Float[Array, "B N"], num_left: int, num_staying: int) -> tuple[Int[Array, "B _"], Int[Array, "B _"]]:
    """Rows of the num_left highest scores, ascending, and of the next ones up to num_staying, the highest first.

    Ties go to the lower row. No gradient.
    """
    _, order = jax.lax.top_k(jax.lax.stop_gradient(scores), num_staying)
    order = order.astype(jnp.int32)
    return jnp.sort(order[:, :num_left], axis=1), order[:, num_left:]


def match(
    patches: Float[Array, "B N D"], left: Int[Array, "B M"], gone: Int[Array, "B R"]
) -> tuple[Fusion, Float[Array, "B R"]]:
    """Each token that merges goes into the most similar one of those left; and how similar: the cosine, from 0. No gradient.

    Ties go to the lower row. A cosine below 0 counts as 0, so that no size falls below 1, which has a logarithm.
    """
    direction = unit(patches)
    similarity = products(take(direction, gone), take(direction, left))
    return Fusion(left, gone, similarity.argmax(axis=2).astype(jnp.int32)), jnp.maximum(similarity.max(axis=2), 0)


def grown(size: Float[Array, "B N"], fusion: Fusion, similarity: Float[Array, "B R"]) -> Float[Array, "B M"]:
    """Sizes of the tokens left: their own and, as much as they are alike, of those that merge into them."""
    image = jnp.arange(size.shape[0])[:, None]
    return take(size, fusion.left).at[image, fusion.into].add(take(size, fusion.gone) * similarity)
