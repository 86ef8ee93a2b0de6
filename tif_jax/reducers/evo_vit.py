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
from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, class_attention, join, put, split, take, top_k


@dataclass(frozen=True)
class EvoVit:
    """In every stage the floor(keep_ratio * N) patches with the highest global class attention are slow.

    stages: blocks at which the slow tokens are selected anew, from 1; None is (4, 8) of 12. Blocks before are dense.
    representative: False leaves placeholders as they are during a stage, as the published DeiT code does.
    momentum: how much of the global class attention of a slow token is kept when a block's is averaged into it.
    """

    keep_ratio: float = 0.5
    stages: tuple[int, ...] | None = None
    representative: bool = True
    momentum: float = 0.5

    def __post_init__(self):
        check_keep_ratio(self.keep_ratio)
        if not 0 <= self.momentum <= 1:
            raise InputError(f"momentum is {self.momentum}; it is a share, in [0, 1]")
        stages = self.stages
        if stages is not None and (not stages or stages[0] < 1 or list(stages) != sorted(set(stages))):
            raise InputError(
                f"stages is {stages}; it lists block indices in ascending order, from 1 (block 0 is dense)"
            )

    def __call__(self, blocks, x, tokens, rngs=None):
        num_special, (num_images, num_patches) = tokens.num_special, tokens.index.shape
        if num_special == 0:
            raise InputError("Evo-ViT ranks patches by the attention of the class token; this model has none")
        stages = _resolve(self.stages, len(blocks))
        num_slow = max(1, math.floor(self.keep_ratio * num_patches))
        everyone = jnp.broadcast_to(jnp.arange(num_patches, dtype=jnp.int32)[None], (num_images, num_patches))
        if num_slow == num_patches:
            x, _ = Full()(blocks, x, tokens, rngs)
            return x, {"kept": tokens.index, "source": everyone}

        for block in blocks[: stages[0]]:
            x, qk = block(x, rngs=rngs)
        score = class_attention(qk, num_special)  # of the newest dense block alone: nothing is averaged yet
        for start, stop in zip(stages, (*stages[1:], len(blocks)), strict=True):
            slow = top_k(score, num_slow)
            x, score = self._stage(blocks[start:stop], x, score, slow, num_special, rngs)
        return x, {"kept": take(tokens.index, slow), "source": everyone}

    def _stage(
        self,
        blocks: Sequence[Any],
        x: Float[Array, "B T D"],
        score: Float[Array, "B N"],
        slow: Int[Array, "B K"],
        num_special: int,
        rngs: Any,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N"]]:
        """The tokens, in raster order again, and the global class attention after some blocks with these slow tokens."""
        special, patches = split(x, num_special)
        y = join(special, take(patches, slow))
        if self.representative:
            before = _represent(patches, score, slow)
            y = join(y, before)
        slow_score, num_slow = take(score, slow), slow.shape[1]
        for block in blocks:
            y, qk = block(y, rngs=rngs)
            newest = class_attention(qk, num_special)[:, :num_slow]  # without the representative's column
            slow_score = self.momentum * slow_score + (1 - self.momentum) * newest
        if self.representative:
            # The sum of the residual increments of all branches telescopes. Slow tokens get it too and are overwritten.
            wide = jnp.promote_types(x.dtype, jnp.float32)
            increment = y[:, -1:].astype(wide) - before.astype(wide)
            patches = (patches.astype(wide) + increment).astype(x.dtype)
        patches = put(patches, slow, y[:, num_special : num_special + num_slow])
        return join(y[:, :num_special], patches), put(score, slow, slow_score)


def _represent(
    patches: Float[Array, "B N D"], score: Float[Array, "B N"], slow: Int[Array, "B K"]
) -> Float[Array, "B 1 D"]:
    """The mean of the placeholders, weighted by their global class attention; no gradient through the weights."""
    wide = jnp.promote_types(patches.dtype, jnp.float32)
    # `tiny` matters only where the attention to every placeholder is 0: they then count alike.
    weight = jax.lax.stop_gradient(score) + jnp.finfo(score.dtype).tiny
    weight = put(weight, slow, jnp.zeros(slow.shape, score.dtype))
    weight = (weight / weight.sum(axis=1, keepdims=True)).astype(wide)
    return jnp.einsum("bn,bnd->bd", weight, patches.astype(wide))[:, None].astype(patches.dtype)


def _resolve(stages: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The stages for this number of blocks; None is a third and two thirds of the way."""
    if stages is None:
        stages = tuple(sorted({max(1, depth * third // 3) for third in (1, 2)}))
    if stages[-1] >= depth:
        raise InputError(f"stages is {stages}; the model has blocks 0..{depth - 1}")
    return stages
