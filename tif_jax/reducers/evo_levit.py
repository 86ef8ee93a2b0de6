"""Evo-LeViT: slow-fast token evolution in a pyramid (Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision
Transformer", 2021).

As in `evo_vit`, but stages begin at the blocks that shrink the raster, where the global class attention shrinks with it;
how fast it follows the newest attention is learned; and the loss reaches it through the weights of the representative.

Legend: B images, T and S tokens, N and M patch tokens, D and E width before and after a shrink block.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tif_jax.reducers.evo_vit import evolve
from tif_jax.reducers.full import Full
from tif_jax.tokens import Tokens, check_keep_ratio, class_attention, require_class, take, top_k

_DENSE = 2  # blocks of the first stage before the first selection


class EvoLevit(nnx.Module):
    """In every stage the floor(keep_ratio * N) patches with the highest global class attention are slow.

    A stage begins at every block that shrinks the raster; a plain ViT is one stage. The first two blocks of the first
    stage and all shrinking blocks are dense.
    layer_wise: the slow tokens are selected anew before every block, as in the first 200 of the paper's 300 epochs;
      else once a stage.
    representative: False leaves placeholders as they are while slow tokens go through the blocks.

    Its parameter `theta` has one entry per block: the share of the newest class attention in the global one is its sigmoid.
    """

    walks_pyramids = True

    def __init__(
        self, keep_ratio: float = 0.5, layer_wise: bool = False, representative: bool = True, *, depth: int | None
    ):
        check_keep_ratio(keep_ratio)
        self.keep_ratio, self.layer_wise, self.representative = keep_ratio, layer_wise, representative
        self.theta = nnx.Param(jnp.zeros((depth or 0,)))

    def __call__(self, blocks, x, tokens, rngs=None):
        require_class(tokens, "evo_levit")
        if self.keep_ratio == 1:
            x, _ = Full()(blocks, x, tokens, rngs)
            for i, block in enumerate(filter(_shrinks, blocks)):
                tokens = _subsample(block, tokens, 1 + i)
            return x, {"kept": tokens.index, "source": tokens.source}

        share = jax.nn.sigmoid(self.theta[...])
        momenta = [0.0] + [1 - share[i] for i in range(1, len(blocks))]  # the first block has nothing to average with
        runs, num_dense = _runs(blocks, self.layer_wise)
        score, num_shrinks = jnp.zeros(tokens.index.shape, share.dtype), 0
        for start, stop in runs:
            if _shrinks(blocks[start]):
                x, score = _shrink(blocks[start], x, tokens, score, momenta[start], rngs)
                num_shrinks += 1
                tokens = _subsample(blocks[start], tokens, num_shrinks)
                continue
            num_patches = tokens.index.shape[1]
            num_slow = num_patches if start < num_dense else max(1, math.floor(self.keep_ratio * num_patches))
            slow = top_k(score, num_slow)
            x, score = evolve(
                blocks[start:stop], x, tokens, score, slow, momenta[start:stop], self.representative, rngs
            )
        return x, {"kept": take(tokens.index, slow), "source": tokens.source}


def _shrinks(block: Any) -> bool:
    return getattr(block, "stride", 1) > 1


def _runs(blocks: Sequence[Any], layer_wise: bool) -> tuple[list[tuple[int, int]], int]:
    """Blocks that go together, as (start, stop), a shrink block alone; and how many dense blocks there are in front."""
    shrinks = [i for i, block in enumerate(blocks) if _shrinks(block)]
    depth = len(blocks)
    num_dense = min(_DENSE, *shrinks, depth)
    cuts = {0, num_dense, *shrinks, *(i + 1 for i in shrinks), depth}
    return list(itertools.pairwise(range(depth + 1) if layer_wise else sorted(cuts))), num_dense


def _shrink(
    block: Any, x: Float[Array, "B T D"], tokens: Tokens, score: Float[Array, "B N"], momentum: Any, rngs: Any
) -> tuple[Float[Array, "B S E"], Float[Array, "B M"]]:
    """The tokens and the global class attention of the smaller raster; the latter keeps its sum."""
    total = score.sum(axis=1, keepdims=True)
    x, qk = block(x, tokens, rngs=rngs)
    newest = block.subsample(class_attention(qk, tokens.num_special))
    score = momentum * block.subsample(score) + (1 - momentum) * newest
    # `tiny` matters only where the class token attends to none of these patches.
    return x, score * (total / jnp.maximum(score.sum(axis=1, keepdims=True), jnp.finfo(score.dtype).tiny))


def _subsample(block: Any, tokens: Tokens, num_shrinks: int) -> Tokens:
    """The tokens that a shrink block, so many with those before it, leaves of a complete raster."""
    source = jnp.broadcast_to(_cells(tokens.grid, num_shrinks)[None], tokens.source.shape)
    index, position = block.subsample(tokens.index), block.subsample(tokens.position)
    return tokens._replace(index=index, position=position, source=source)


def _cells(grid: tuple[int, int], num_shrinks: int) -> Int[Array, " N"]:
    """For each patch the token, after so many shrink blocks, whose cell of the coarser raster covers it."""
    cell = 2**num_shrinks
    rows, columns = (jnp.arange(side, dtype=jnp.int32) // cell for side in grid)
    return (rows[:, None] * -(-grid[1] // cell) + columns[None]).reshape(-1)
