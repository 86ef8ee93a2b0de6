"""Evo-ViT, slow-fast token evolution (Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", 2021).

Informative tokens go through the blocks (slow); the rest, the placeholders, stay where they are and take over what the
blocks did to one representative of them (fast). No patch is dropped.

Legend: B images, T tokens, N patch tokens, K slow tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers.full import Full
from tif_jax.tokens import (
    Tokens,
    class_attention,
    join,
    mean_position,
    put,
    require_class,
    set_aside,
    split,
    take,
    top_k,
)

_MOMENTUM = (
    0.5  # how much of a slow token's global class attention is kept when a block's is averaged into it: the authors'
)


@dataclass(frozen=True)
class EvoVit:
    """In every stage the floor(keep_ratio * N) patches with the highest global class attention are slow.

    stages: blocks at which the slow tokens are selected anew, counted from 0, at least 1; None is (4, 8) of 12.
    Blocks before are dense.
    keep_ratio, num_kept: ratios or numbers of slow tokens, one for each stage (a ratio: or one for all). With numbers
    for each block instead, a stage begins where the number changes.
    representative: False leaves placeholders as they are during a stage, as the published DeiT code does.
    """

    keep_ratio: float | tuple[float, ...] = 0.5
    stages: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None
    representative: bool = True

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.stages, self.num_kept, name="stages")
        if self.stages is not None and (not self.stages or self.stages[0] < 1):
            raise InputError(f"stages is {self.stages}; it lists block indices, at least 1 (block 0 is dense)")

    def __call__(self, blocks, x, tokens, rngs=None):
        require_class(tokens, "evo_vit")
        stages = self._stages(len(blocks), tokens.index.shape[1])
        if not stages:
            x, _ = Full()(blocks, x, tokens, rngs)
            return x, {"kept": tokens.index, "source": tokens.source}

        for block in blocks[: min(stages)]:
            x, qk = block(x, tokens, rngs=rngs)
        score = class_attention(qk, tokens.num_special)  # of the newest dense block alone: nothing is averaged yet
        for (start, num_slow), stop in zip(stages.items(), (*list(stages)[1:], len(blocks)), strict=True):
            score = jax.lax.stop_gradient(score)
            slow = top_k(score, num_slow)
            momenta = [_MOMENTUM] * (stop - start)
            x, score = evolve(blocks[start:stop], x, tokens, score, slow, momenta, self.representative, rngs)
        return x, {"kept": take(tokens.index, slow), "source": tokens.source}

    def _stages(self, depth: int, num_patches: int) -> dict[int, int]:
        """The number of slow tokens of each stage, by the block that it begins with; none if all tokens are slow."""
        default = tuple(sorted({max(1, depth * third // 3) for third in (1, 2)}))
        per_block = schedule.is_per_block(self.stages, self.num_kept, depth)
        stages = None if per_block else self.stages or default
        amounts = schedule.amounts(self.keep_ratio, stages, self.num_kept, depth, name="stages")
        slow = {start: schedule.count(amount, num_patches, math.floor) for start, amount in amounts.items()}
        if per_block:
            schedule.check_dense_start(slow[0], num_patches)
            slow = {i: number for i, number in slow.items() if i and number != slow[i - 1]}
        return {} if all(number == num_patches for number in slow.values()) else slow


def evolve(
    blocks: Sequence[Any],
    x: Float[Array, "B T D"],
    tokens: Tokens,
    score: Float[Array, "B N"],
    slow: Int[Array, "B K"],
    momenta: Sequence[Any],
    representative: bool,
    rngs: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N"]]:
    """The tokens, in raster order again, and the global class attention after some blocks with these slow tokens.

    momenta: for each block, how much of the global class attention is kept. Its gradient passes through the weights of
    the representative. Without placeholders (K = N) the blocks are dense.
    """
    num_special, num_slow = tokens.num_special, slow.shape[1]
    special, patches = split(x, num_special)
    representative &= num_slow < patches.shape[1]
    y = join(special, take(patches, slow))
    if not representative:
        walking = set_aside(tokens, slow, patches)
    else:
        weight = _placeholder_weights(score, slow)
        wide = widened(x.dtype)
        before = jnp.einsum("bn,bnd->bd", weight.astype(wide), patches.astype(wide))[:, None].astype(x.dtype)
        y = join(y, before)
        walking = set_aside(tokens, slow, patches - before, others=num_slow)
        walking = walking._replace(position=join(walking.position, mean_position(tokens.position, weight)))
    slow_score = take(score, slow)
    for block, momentum in zip(blocks, momenta, strict=True):
        y, qk = block(y, walking, rngs=rngs)
        newest = class_attention(qk, num_special)[:, :num_slow]  # without the representative's column
        slow_score = momentum * slow_score + (1 - momentum) * newest
    if representative:
        # The sum of the residual increments of all branches telescopes. Slow tokens get it too and are overwritten.
        increment = y[:, -1:].astype(wide) - before.astype(wide)
        patches = (patches.astype(wide) + increment).astype(x.dtype)
    patches = put(patches, slow, y[:, num_special : num_special + num_slow])
    return join(y[:, :num_special], patches), put(score, slow, slow_score)


def _placeholder_weights(score: Float[Array, "B N"], slow: Int[Array, "B K"]) -> Float[Array, "B N"]:
    """What each patch weighs in the representative: the placeholders in proportion to their global class attention."""
    # `tiny` matters only where the attention to every placeholder is 0: they then count alike.
    weight = score + jnp.finfo(score.dtype).tiny
    weight = put(weight, slow, jnp.zeros(slow.shape, score.dtype))
    return weight / weight.sum(axis=1, keepdims=True)
